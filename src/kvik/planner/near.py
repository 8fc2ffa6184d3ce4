"""Names that people type, and the ones they meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def plain(name: str) -> str:
    """The name without case and separators: `Llama 3-8B` and `llama_3_8b` are one."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def near(name: str, known: Iterable[str], *, most: int = 5) -> list[str]:
    """Known names like this one, the likest first: those that contain it, then those that are spelled alike."""
    by_plain: dict[str, str] = {}
    for one in known:
        by_plain.setdefault(plain(one), one)
    wanted = plain(name)
    inside = [key for key in by_plain if wanted and (wanted in key or (len(key) > 3 and key in wanted))]
    alike = difflib.get_close_matches(wanted, by_plain, n=most, cutoff=0.6)
    return [by_plain[key] for key in dict.fromkeys([*inside, *alike])][:most]
