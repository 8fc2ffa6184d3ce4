"""The live page's own files, which are the same for everybody; what it draws with is that of `kvik explain`'s page."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

KINDS = {"js": "text/javascript", "css": "text/css"}

_FOLDER = files("kvik.server").joinpath("page")

PAGE = _FOLDER.joinpath("page.html").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class PageFile:
    """One that the page loads."""

    kind: str
    text: str
    tag: str  # names the text, so that a browser which has it need not load it again

    @classmethod
    def read(cls, part: Traversable) -> PageFile:
        """That of a path."""
        text = part.read_text(encoding="utf-8")
        tag = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
        return cls(KINDS[part.name.rpartition(".")[2]], text, f'"{tag}"')


PAGE_FILES = {
    part.name: PageFile.read(part)
    for folder in (files("kvik").joinpath("drawing"), _FOLDER)
    for part in folder.iterdir()
    if part.name.rpartition(".")[2] in KINDS
}
"""By name."""
