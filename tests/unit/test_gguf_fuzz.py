"""Damaged GGUF files by the thousand: each is read whole or refused with ModelError, in little time and memory."""

from __future__ import annotations

import os
import random
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
from gguf.gguf_writer import GGUFValue

from gguf_files import random_blocks, write_gguf
from kvik.errors import ModelError
from kvik.files.gguf import GGUFFile, parse_gguf
from tiers import RANDOM_SEEDS, run_seed

CASES = [range(2000), pytest.param(range(2000, 20_000), marks=pytest.mark.full)]
SEED = os.environ.get("KVIK_FUZZ_SEED", str(run_seed("gguf")) if RANDOM_SEEDS else "kvik")
MAX_CASE_S = 1.0
MAX_CASE_BYTES = 1 << 20  # some 300 times the file

HOSTILE_VALUES = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]
METADATA = {
    "general.architecture": "llama",
    "general.alignment": 32,
    "llama.block_count": 2,
    "llama.rope.freq_base": 10_000.0,
    "tokenizer.ggml.tokens": ["<s>", "Ġthe", "ø", ""],
    "tokenizer.ggml.token_type": [3, 1, 1, 1],
    "tokenizer.ggml.scores": [0.0, -1.0, -2.0, -3.0],
    "flags": [True, False],
    "flag": True,
    "byte": GGUFValue(7, GGUFValueType.UINT8),
    "large": GGUFValue(2**40, GGUFValueType.UINT64),
}
TENSORS = {
    "token_embd.weight": ((4, 32), GGMLQuantizationType.Q8_0),
    "blk.0.attn_norm.weight": ((1, 32), GGMLQuantizationType.F32),
    "blk.0.attn_q.weight": ((2, 32), GGMLQuantizationType.Q4_1),
    "blk.0.ffn_down.weight": ((1, 256), GGMLQuantizationType.Q4_K),
    "output_norm.weight": ((1, 32), GGMLQuantizationType.F16),
}


class Victim:
    """A good file, and where in it the integers of 4 and 8 bytes lie that a reader goes by."""

    def __init__(self, path: Path) -> None:
        rng = np.random.default_rng(11)
        tensors: dict[str, Any] = {n: (random_blocks(kind, *size, rng), kind) for n, (size, kind) in TENSORS.items()}
        self.content = write_gguf(path, METADATA, tensors).read_bytes()
        reader = GGUFReader(path)
        self.fields = [(4, 4), (8, 8), (16, 8)]  # version, tensor_count, metadata_kv_count
        fields = [field for key, field in reader.fields.items() if not key.startswith("GGUF.")]
        for field in [*fields, *(tensor.field for tensor in reader.tensors)]:
            offset = int(field.offset)
            for part in field.parts:
                if part.dtype.itemsize >= 4:
                    self.fields.extend(
                        (offset + at, part.dtype.itemsize) for at in range(0, part.nbytes, part.itemsize)
                    )
                offset += int(part.nbytes)
        self.header_bytes = int(reader.data_offset)


def flip_bits(content: bytearray, victim: Victim, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 4)):
        content[rng.randrange(min(victim.header_bytes, len(content)))] ^= rng.randint(1, 255)


def overwrite_field(content: bytearray, victim: Victim, rng: random.Random) -> None:
    offset, size = rng.choice(victim.fields)
    content[offset : offset + size] = (rng.choice(HOSTILE_VALUES) % (1 << 8 * size)).to_bytes(size, "little")


def nudge_field(content: bytearray, victim: Victim, rng: random.Random) -> None:
    """Change an integer a little: a neighbouring type, a length that is off by one, an offset that is shifted."""
    offset, size = rng.choice(victim.fields)
    value = int.from_bytes(content[offset : offset + size], "little") + rng.choice([-64, -32, -8, -1, 1, 2, 8, 32, 64])
    content[offset : offset + size] = (value % (1 << 8 * size)).to_bytes(size, "little")


def set_type(content: bytearray, victim: Victim, rng: random.Random) -> None:
    """Put a small number, as all types are, into a field of 4 bytes."""
    offset, size = rng.choice([field for field in victim.fields if field[1] == 4])
    content[offset : offset + size] = rng.randrange(48).to_bytes(size, "little")


def swap_fields(content: bytearray, victim: Victim, rng: random.Random) -> None:
    (first, size), (second, other_size) = rng.sample(victim.fields, 2)
    size = min(size, other_size)
    content[first : first + size], content[second : second + size] = (
        content[second : second + size],
        content[first : first + size],
    )


def truncate(content: bytearray, victim: Victim, rng: random.Random) -> None:
    del content[rng.randrange(len(content) + 1) :]


def delete_run(content: bytearray, victim: Victim, rng: random.Random) -> None:
    start = rng.randrange(victim.header_bytes)
    del content[start : start + rng.choice([1, 4, 8, rng.randint(1, 64)])]


def insert_run(content: bytearray, victim: Victim, rng: random.Random) -> None:
    start = rng.randrange(victim.header_bytes)
    content[start:start] = rng.randbytes(rng.choice([1, 4, 8, rng.randint(1, 64)]))


def duplicate_run(content: bytearray, victim: Victim, rng: random.Random) -> None:
    """Repeat a stretch where it stands or, whole entries among them, somewhere else."""
    start = rng.randrange(victim.header_bytes)
    run = content[start : start + rng.randint(1, 128)]
    target = rng.choice([start, rng.randrange(victim.header_bytes)])
    content[target:target] = run


def scramble_data(content: bytearray, victim: Victim, rng: random.Random) -> None:
    """Data can hold anything: this alone must never be refused."""
    content[victim.header_bytes :] = rng.randbytes(max(0, len(content) - victim.header_bytes))


MUTATIONS: list[Callable[[bytearray, Victim, random.Random], None]] = [
    flip_bits,
    overwrite_field,
    nudge_field,
    set_type,
    swap_fields,
    truncate,
    delete_run,
    insert_run,
    duplicate_run,
    scramble_data,
]


def read_all(content: bytes, path: Path) -> GGUFFile:
    """Read the file and touch all that it gives, as a loader would."""
    file = parse_gguf(np.frombuffer(content, dtype=np.uint8), path)
    total_bytes = 0
    for name, tensor in file.tensors.items():
        assert tensor.name == name
        assert tensor.data.nbytes == tensor.num_bytes > 0
        assert tensor.data.tobytes() == content[tensor.offset : tensor.offset + tensor.num_bytes]
        assert tensor.offset % 8 == 0
        assert int(tensor.data.sum(dtype=np.uint64)) >= 0
        total_bytes += tensor.num_bytes
    assert total_bytes <= len(content)
    return file


def refusal_of(content: bytes) -> ModelError | None:
    """Return the error that reading raises, or None where the file is read."""
    try:
        read_all(content, Path("fuzz.gguf"))
    except ModelError as error:
        return error
    return None


@pytest.mark.parametrize("cases", CASES, ids=str)
def test_damaged_files(tmp_path: Path, cases: range) -> None:
    victim = Victim(tmp_path / "good.gguf")
    assert len(read_all(victim.content, Path("good.gguf")).tensors) == len(TENSORS)
    outcomes: Counter[str] = Counter()
    tracemalloc.start()
    try:
        for case in cases:
            rng = random.Random(f"{SEED}/{case}")  # so that one case can be run again by itself
            content = bytearray(victim.content)
            mutations = rng.choices(MUTATIONS, k=rng.choice([1, 1, 2, 3]))
            for mutate in mutations:
                if len(content) > 0:
                    mutate(content, victim, rng)
            name = f"KVIK_FUZZ_SEED={SEED} case {case} ({', '.join(mutate.__name__ for mutate in mutations)})"
            tracemalloc.reset_peak()
            before_bytes, start_s = tracemalloc.get_traced_memory()[0], time.process_time()
            try:
                refusal = refusal_of(bytes(content))
            except Exception as error:
                raise AssertionError(f"{name}: {error!r}") from error
            assert time.process_time() - start_s < MAX_CASE_S, name
            assert tracemalloc.get_traced_memory()[1] - before_bytes < MAX_CASE_BYTES, name
            outcomes["read" if refusal is None else "refused"] += 1
            if refusal is not None:
                assert refusal.hint, name
                assert refusal.message.startswith("fuzz.gguf: "), name
                assert "\n" not in refusal.message, name
                assert set(mutations) != {scramble_data}, name
    finally:
        tracemalloc.stop()
    # Neither outcome is so rare that the test would be about the other alone.
    assert min(outcomes["read"], outcomes["refused"]) > len(cases) // 10, outcomes
