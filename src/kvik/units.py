"""Bytes as people read them, written alike by the planner, the server, its page and the terminal."""

from __future__ import annotations


def amount(num_bytes: int) -> str:
    """Bytes in decimal units and three digits: `0 B`, `23.0 kB`, `1.34 GB`, `107 GB`."""
    if num_bytes < 1000:
        return f"{num_bytes} B"
    size = float(num_bytes)
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        size /= 1000
        if size < 999.5 or unit == "PB":
            break
    digits = 2 if size < 9.995 else 1 if size < 99.95 else 0
    return f"{size:,.{digits}f} {unit}"
