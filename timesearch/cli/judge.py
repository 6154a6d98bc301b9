"""Commands: judge."""
