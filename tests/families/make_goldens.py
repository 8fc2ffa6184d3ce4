"""Writes the goldens anew: needs torch and transformers (`make goldens`)."""

from __future__ import annotations

import tempfile
from pathlib import Path

from families.cases import CASES, NUM_TOKENS
from families.goldens import FOLDER, ROWS, Golden
from oracle.hf_families import random_ids, save_checkpoint


def main() -> None:
    """All of them."""
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.json"):
        path.unlink()
    token_ids = random_ids(NUM_TOKENS)
    for name, config in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            saved = save_checkpoint(Path(folder), config)
            rows = saved.logits(token_ids)[list(ROWS)]
            Golden(name, saved.config, saved.shapes, token_ids, rows).save()


if __name__ == "__main__":
    main()
