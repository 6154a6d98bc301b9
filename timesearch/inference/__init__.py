"""Episodes in bulk (stage `infer`) and one at a time (`ask`)."""
