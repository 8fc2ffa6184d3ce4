"""What a page is limited to; without NumPy, for the command line's sake."""

MAX_PAGE_TOKENS = 256
"""Of prompt and answer together."""
