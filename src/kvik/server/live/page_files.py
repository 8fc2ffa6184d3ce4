"""The live page's own files, which are the same for everybody; what it draws with is that of `kvik explain`'s page."""

from __future__ import annotations

from importlib.resources import files

KINDS = {"js": "text/javascript", "css": "text/css"}

_FOLDER = files("kvik.server").joinpath("page")

PAGE = _FOLDER.joinpath("page.html").read_text(encoding="utf-8")

PAGE_FILES = {
    part.name: (KINDS[part.name.rpartition(".")[2]], part.read_text(encoding="utf-8"))
    for folder in (files("kvik").joinpath("drawing"), _FOLDER)
    for part in folder.iterdir()
    if part.name.rpartition(".")[2] in KINDS
}
"""By name: the content type and the text."""
