"""The pocket profile: a generated world in which everything is real and small."""
