"""Figures as people read them."""

from __future__ import annotations


def percent(part: float) -> str:
    """A part of one: `94 %`, `98.4 %`, `0.8 %`; with a decimal where it is close to nothing or all."""
    shown = 100 * part
    return f"{shown:.1f} %" if 0 < shown < 9.95 or 97.5 < shown < 100 else f"{shown:.0f} %"


def count(number: int, noun: str) -> str:
    """`1 user`, `10 users`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def params(number: int | None) -> str:
    """Parameters: `135 million`, `70.6 billion`, `unknown`."""
    if number is None:
        return "unknown"
    return f"{number / 1e9:,.4g} billion" if number >= 1e9 else f"{number / 1e6:,.4g} million"


def duration(seconds: float | None) -> str:
    """A time with three digits, or a dash: `0.84 ms`, `65.9 ms`, `1.21 s`, `2.1 min`."""
    if seconds is None:
        return "-"
    if seconds >= 99.95:
        return f"{seconds / 60:,.1f} min"
    size, unit = (seconds * 1e3, "ms") if seconds < 0.9995 else (seconds, "s")
    digits = 2 if size < 9.995 else 1 if size < 99.95 else 0
    return f"{size:.{digits}f} {unit}"
