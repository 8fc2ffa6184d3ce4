"""What transformers made of each case, kept as small files: `make goldens` writes them anew."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from families.cases import CASES
from families.checkpoints import FloatArray, write_folder

FOLDER = Path(__file__).parent / "goldens"
ROWS = (23, 73, 200, 269)  # the last that one window sees whole, one three windows on, and both segments of attention


@dataclass(frozen=True, slots=True)
class Golden:
    """A checkpoint but for its weights, and its logits in float32."""

    name: str
    config: Mapping[str, Any]  # as transformers saves it
    shapes: Mapping[str, tuple[int, ...]]  # of all stored tensors
    token_ids: list[int]
    logits: FloatArray  # (rows, vocab_size), after the tokens of `ROWS`

    def write_folder(self, folder: Path) -> Path:
        """The checkpoint, weights and all."""
        return write_folder(folder, self.config, self.shapes)

    def save(self) -> None:
        """Keep it."""
        kept = {
            "config": self.config,
            "shapes": self.shapes,
            "token_ids": self.token_ids,
            "logits": base64.b64encode(self.logits.astype("<f4").tobytes()).decode(),
        }
        (FOLDER / f"{self.name}.json").write_text(json.dumps(kept, separators=(",", ":")) + "\n")


@cache
def golden_of(name: str) -> Golden:
    """The golden of a case."""
    kept = json.loads((FOLDER / f"{name}.json").read_text())
    logits = np.frombuffer(base64.b64decode(kept["logits"]), "<f4").reshape(len(ROWS), -1)
    shapes = {tensor: tuple(shape) for tensor, shape in kept["shapes"].items()}
    return Golden(name, kept["config"], shapes, kept["token_ids"], logits.astype(np.float32))


def all_goldens() -> list[Golden]:
    """Of all cases."""
    return [golden_of(name) for name in CASES]
