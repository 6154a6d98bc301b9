"""A small local web page and HTTP API over the search."""
