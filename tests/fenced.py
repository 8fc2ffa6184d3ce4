"""The fenced blocks of the documents: programs with their output, commands, and consoles."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"  # signatures are no programs
PAGES = sorted(page for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")] if page.parent != REFERENCE)
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block."""

    page: Path
    line: int
    language: str
    text: str
    output: str  # of a `text` or `json` block right behind it; else empty

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True, slots=True)
class Command:
    """What a reader would type, and in a console what it prints."""

    block: Block
    text: str
    output: str = ""

    def __str__(self) -> str:
        return f"{self.block}: {self.text}"


def blocks(page: Path) -> list[Block]:
    """All of a page."""
    text = page.read_text(encoding="utf-8")
    found = [*_BLOCK.finditer(text)]
    result = []
    for match, following in zip(found, [*found[1:], None], strict=False):
        is_output = following is not None and following[1] in ("text", "json")
        output = following[2] if following and is_output and text[match.end() : following.start()].isspace() else ""
        result.append(Block(page, text[: match.start()].count("\n") + 1, match[1], match[2], output))
    return result


def commands(page: Path) -> list[Command]:
    """Each line of `sh` blocks, and what stands behind each `$` of `console` blocks with its output."""
    found = []
    for block in blocks(page):
        if block.language == "sh":
            lines = block.text.replace("\\\n", " ").splitlines()
            found += [Command(block, line, block.output) for line in lines if line.strip()]
        elif block.language == "console":
            for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
                line, _, output = part.partition("\n")
                found.append(Command(block, line, output))
    return found
