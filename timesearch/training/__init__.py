"""How a policy learns to search: supervised cold start, then GRPO with completeness self-verification."""
