"""One line for each family: its name and the bits of its logits, to be compared between instruction sets.

Run as a program, it prints them. A prompt and two branches of it are computed, which part from it inside a block.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from families.goldens import all_goldens
from kvik.config import EngineConfig, SamplingParams
from kvik.engine.engine import Engine
from kvik.models.loader import load_model
from kvik.ops.native import NativeOps
from models import random_prompt, run

PARAMS = SamplingParams(max_tokens=2, ignore_eos=True)


def digests() -> dict[str, str]:
    """By family."""
    found = {}
    for golden in all_goldens():
        with tempfile.TemporaryDirectory() as folder:
            model = load_model(golden.write_folder(Path(folder)), NativeOps("int8", threads=2))
            prompt = random_prompt(model, 45, seed=5)
            engine, total = Engine(model, EngineConfig(token_budget=40)), hashlib.sha256()
            for branch in (prompt, [*prompt, 3, 4, 5], [*prompt[:40], 6, 7]):
                total.update(run(engine, branch, PARAMS).logits.tobytes())
            found[golden.name] = total.hexdigest()
    return found


if __name__ == "__main__":
    for name, digest in digests().items():
        print(name, digest)  # noqa: T201
