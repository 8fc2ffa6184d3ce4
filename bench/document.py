"""Parts of a document that a program writes, between two comments that name them; the rest is left as it is."""

from __future__ import annotations

from pathlib import Path


def replace_part(path: Path, name: str, text: str) -> None:
    """Put `text` between `<!-- name: begin -->` and `<!-- name: end -->`. Raises ValueError where they are not."""
    content = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, found, rest = content.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{path} has no part named {name!r}")
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(f"{before}{begin}{text.rstrip()}\n{end}{after}", encoding="utf-8")
    partial.replace(path)
