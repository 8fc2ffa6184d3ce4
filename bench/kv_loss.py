"""What types of keys and values lose: KL divergence from float32 ones, and how often the likeliest token stays.

python bench/kv_loss.py --text FILE [--model smollm2] [--types int8,k4v4] [--texts 3] [--length 2048] [--every 1]

The figures of docs/compression.md are those of the Jargon File: `apt-get download jargon-text`, `dpkg-deb -x` the
package, and give its jargon.txt.gz, unpacked, as --text. Texts follow each other from character 100,000 on; rows count
from 512 tokens on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvik.hub.store import resolve
from kvik.models.decoder import Decoder
from kvik.models.loader import load_model
from kvik.ops.base import Batch
from kvik.ops.native import NativeOps

CHUNK = 256  # tokens of a step
FIRST_ROW = 512
FIRST_CHARACTER = 100_000

FloatArray = npt.NDArray[np.float64]


def log_probabilities(decoder: Decoder, kv_dtype: str, token_ids: Sequence[int], every: int) -> FloatArray:
    """Of each `every`-th row behind `FIRST_ROW` (rows, vocab_size)."""
    spec = decoder.spec.kv_spec(kv_dtype)
    num_blocks = spec.pool_blocks_for(len(token_ids))
    step = decoder.capture(decoder.ops.allocate_kv(spec, num_blocks))
    tables, found = np.arange(num_blocks, dtype=np.int32)[None], []
    for start in range(0, len(token_ids), CHUNK):
        positions = np.arange(start, min(start + CHUNK, len(token_ids)), dtype=np.int32)
        batch = Batch.in_blocks(
            token_ids=np.asarray(token_ids[start : start + CHUNK], np.int32),
            positions=positions,
            sequence_index=np.zeros(len(positions), np.int32),
            block_tables=tables,
            logit_rows=np.arange(0, len(positions), every, dtype=np.int32),
            num_groups=len(spec.groups),
        )
        logits = np.array(step(batch), np.float64)
        if start >= FIRST_ROW:
            logits -= logits.max(axis=1, keepdims=True)
            found.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    return np.concatenate(found)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="of which the model predicts the tokens")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--types", default="int8,k4v4", help="pairs as k4/v4")
    parser.add_argument("--texts", type=int, default=3)
    parser.add_argument("--length", type=int, default=2048, help="tokens of each text")
    parser.add_argument("--every", type=int, default=1, help="count only each so-many-th row")
    options = parser.parse_args()
    model = load_model(resolve(options.model), NativeOps("int16"))
    text = options.text.read_text(encoding="utf-8", errors="replace")[FIRST_CHARACTER:]
    token_ids = model.tokenizer.encode(text[: 16 * options.texts * options.length])
    if len(token_ids) < options.texts * options.length:
        parser.error(f"{options.text} has {len(token_ids):,} tokens behind character {FIRST_CHARACTER:,}: too few")
    names = [f"k={each.replace('/', ',v=')}" if "/" in each else each for each in options.types.split(",")]
    losses: dict[str, list[FloatArray]] = {name: [] for name in names}
    same: dict[str, list[npt.NDArray[np.bool_]]] = {name: [] for name in names}
    for start in range(0, options.texts * options.length, options.length):
        chosen = token_ids[start : start + options.length]
        exact = log_probabilities(model.decoder, "f32", chosen, options.every)
        for name in names:
            other = log_probabilities(model.decoder, name, chosen, options.every)
            losses[name].append((np.exp(exact) * (exact - other)).sum(axis=1))
            same[name].append(exact.argmax(axis=1) == other.argmax(axis=1))
    print("| | rows | KL divergence | 99 % | 99.9 % | same top-1 |\n|---|---:|---:|---:|---:|---:|")
    for name in names:
        loss, is_same = np.concatenate(losses[name]), np.concatenate(same[name])
        high, higher = np.quantile(loss, (0.99, 0.999))
        print(f"| {name} | {len(loss):,} | {loss.mean():.4f} | {high:.3f} | {higher:.3f} | {is_same.mean():.1%} |")


if __name__ == "__main__":
    main()
