"""The search environment, the episode loop, and the engines that policies run in."""
