"""Prefect tasks: one a stage, the judge's server, and what the UI is shown besides."""
