"""Names that people type, and the ones they meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

_SEPARATOR = re.compile(r"(?<!\d)\.|\.(?!\d)|[^\w.]|_")


def plain(name: str) -> str:
    """The name without case and separators: `Llama 3-8B` and `llama_3_8b` are one; a decimal point counts."""
    return _SEPARATOR.sub("", name.casefold())


def near(name: str, known: Mapping[str, str], *, max_names: int = 5) -> list[str]:
    """Known names like this one: those that begin with it, that contain it, that are spelled alike.

    `known` has each name and alias as `plain` writes it, and the name that it stands for.
    """
    wanted = plain(name)
    begins = [key for key in known if wanted and key.startswith(wanted)]
    contains = [key for key in known if wanted and (wanted in key or (len(key) > 3 and key in wanted))]
    alike = difflib.get_close_matches(wanted, known, n=max_names, cutoff=0.6)
    return list(dict.fromkeys(known[key] for key in (*begins, *contains, *alike)))[:max_names]
