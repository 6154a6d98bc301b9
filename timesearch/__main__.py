"""`python -m timesearch`: the command line."""

from timesearch.cli import main

main()
