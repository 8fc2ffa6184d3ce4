"""Arithmetic behind one protocol: `base` says what, `reference` defines it, `native` makes it fast."""
