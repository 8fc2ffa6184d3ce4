"""Models that llama.cpp's gguf-split cut into several files, known by their names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from kvik.errors import ModelError

_NAME = re.compile(r"(?P<base>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a split model."""

    base: str | None  # the file's name before the numbers; None where the file has another name
    number: int  # from 1
    count: int

    @classmethod
    def of(cls, name: str) -> Part | None:
        """The part that a file's name says it is; `None` for the name of a whole file."""
        found = _NAME.fullmatch(name)
        if found is None or int(found["count"]) < 2:
            return None
        return cls(found["base"], int(found["number"]), int(found["count"]))

    def paths(self, path: Path) -> list[Path]:
        """The files of all parts, in order, where `path` is that of this one."""
        name = path.name[: -len("-00001-of-00001.gguf")]
        ending = path.name[-len(".gguf") :]
        return [path.with_name(f"{name}-{number:05}-of-{self.count:05}{ending}") for number in range(1, self.count + 1)]

    @property
    def merge_command(self) -> str:
        """What makes one file of the parts."""
        first = "FIRST-PART.gguf" if self.base is None else f"{self.base}-00001-of-{self.count:05}.gguf"
        whole = "WHOLE.gguf" if self.base is None else f"{self.base}.gguf"
        return f"`llama-gguf-split --merge {first} {whole}` (of llama.cpp)"

    def error(self, where: str, *, hint: str) -> ModelError:
        """What to say of it."""
        what = f"part {self.number:,} of {self.count:,} of a model that was split"
        return ModelError(f"{where}: {what}; kvik reads whole files", hint=hint)
