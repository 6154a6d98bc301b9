"""Commands: inference."""
