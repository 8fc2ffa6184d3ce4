"""The command line: results on stdout, the rest on stderr, exit codes 0, 1, 2 and 130."""
