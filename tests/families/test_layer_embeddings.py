"""Gemma 4's table of all layers' embeddings stays in its file: rows of it are read, and memory does not grow by it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from families.cases import CASES
from families.checkpoints import write_folder
from families.gguf_cases import tensors_of
from families.gguf_of import gguf_of
from kvik import LLM, plan
from kvik.models.loader import load_model
from kvik.ops.native import NativeOps
from models import random_prompt
from oracle.teacher_forcing import teacher_forced
from subprocesses import python

TABLE = "model.embed_tokens_per_layer.weight"
VOCAB = 6_000
CONFIG: Mapping[str, Any] = {
    **CASES["gemma4-e2b"],
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size": 16,
    "hidden_size_per_layer_input": 240,
}
"""With a table of 40 MB, and not 1 MB of anything else."""

SCRIPT = """
import ctypes, gc, json, mmap, os, re, sys
from kvik import LLM, SamplingParams

def anonymous_bytes():
    with open("/proc/self/smaps_rollup") as file:
        return 1024 * int(re.search(r"Anonymous: +(\\d+) kB", file.read())[1])

def cached_bytes(path):
    with open(path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
    pages = (ctypes.c_ubyte * -(-len(mapping) // mmap.PAGESIZE))()
    address = ctypes.addressof(ctypes.c_ubyte.from_buffer(mapping))
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapping)), pages) == 0
    return mmap.PAGESIZE * sum(page & 1 for page in pages)

def forget(path):
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cached_bytes(path)

model, path = sys.argv[1:]
llm = LLM(model, threads=2, kv_memory="4MiB")
llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2, ignore_eos=True))
del llm
gc.collect()
before, left = anonymous_bytes(), forget(path)
llm = LLM(model, threads=2, kv_memory="4MiB")
prompts = [list(range(1000 * user, 1000 * user + 10)) for user in range(3)]
llm.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True))
print(json.dumps([anonymous_bytes() - before, left, cached_bytes(path)]))
"""


def folder_of(path: Path) -> Path:
    return write_folder(path, CONFIG, {name: values.shape for name, values in tensors_of(CONFIG).items()})


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
@pytest.mark.parametrize("kind", ["gguf", "folder"])
def test_memory_does_not_grow_by_the_table(kind: str, tmp_path: Path) -> None:
    path = folder_of(tmp_path) if kind == "folder" else gguf_of(tmp_path / "model.gguf", CONFIG, tensors_of(CONFIG))
    table_bytes = 4 * VOCAB * 240 * 7
    done = python("-c", SCRIPT, str(path), str(path / "model.safetensors" if kind == "folder" else path))
    assert done.returncode == 0, done.stderr
    held, left, cached = json.loads(done.stdout)
    print(f"{held / 1e6:.1f} MB more in memory, {cached / 1e6:.1f} MB of the file cached")  # noqa: T201  # if it fails
    assert held < table_bytes / 4  # the cache and a step
    if left < table_bytes / 100:  # not of a file system in memory
        assert cached < table_bytes / 2  # pages about the rows that were read, and all else of the file
    planned = plan(str(path), context=300)
    assert planned.weights is not None
    assert planned.weights.held_bytes < table_bytes / 8
    assert planned.weights.file_bytes > table_bytes


def test_rows_are_looked_up_while_the_model_runs(tmp_path: Path) -> None:
    """What the file holds then is what counts, and only the rows of the tokens in the text."""
    folder = write_folder(
        tmp_path, CASES["gemma4-e2b"], {name: values.shape for name, values in tensors_of(CASES["gemma4-e2b"]).items()}
    )
    decoder = load_model(folder, NativeOps("int8", threads=1)).decoder
    tensors = load_file(folder / "model.safetensors")
    before = teacher_forced(decoder, [7, 8, 9])
    start = (folder / "model.safetensors").read_bytes().index(tensors[TABLE][8].tobytes())
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(start)
        file.write(np.zeros_like(tensors[TABLE][8]).tobytes())
    after = teacher_forced(decoder, [7, 8, 9])
    np.testing.assert_array_equal(after[0], before[0])
    assert (after[1] != before[1]).any()


def test_quantising_leaves_the_table_as_it_is(tmp_path: Path) -> None:
    """Its rows are not in memory, and the packed weights' file does without them."""
    folder = folder_of(tmp_path / "model")
    packed = tmp_path / "packed"
    models = [load_model(folder, NativeOps("int8", threads=1), weights="q8", packed_cache=packed) for _ in range(2)]
    for model in models:
        table = model.decoder.weights.layer_embeddings
        assert table is not None
        assert table.table.num_bytes == 4 * VOCAB * 240 * 7
        assert model.decoder.weights.num_bytes < table.table.num_bytes / 8
    prompt = random_prompt(models[0], 20, seed=1)
    first, second = (teacher_forced(model.decoder, prompt) for model in models)
    np.testing.assert_array_equal(first, second)
    assert sum(path.stat().st_size for path in packed.iterdir()) < 4 * VOCAB * 240 * 7 / 8


def test_a_table_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, TABLE: tensors[TABLE][:-1].copy()}, folder / "model.safetensors")
    with pytest.raises(Exception, match=r"embed_tokens_per_layer.*has the shape"):
        LLM(str(folder))
