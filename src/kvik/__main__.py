"""`python -m kvik`."""

from kvik.cli.app import main

main()
