"""Packed weights in files: the same bits as packed anew, whatever happened to the files, or no use is made of them."""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from checkpoints import tiny_checkpoint
from gguf_files import tiny_llama
from kvik.config import EngineConfig
from kvik.engine.engine import Engine
from kvik.engine.llm import LLM
from kvik.errors import InvalidInput
from kvik.files.gguf import GGUFTensor, read_gguf
from kvik.files.mapped import MappedFile
from kvik.models import gguf_source, packed_cache
from kvik.models.gguf_source import GGUFSource
from kvik.models.gguf_spec import read_spec
from kvik.models.loader import LoadedModel, load_model
from kvik.models.packed_cache import PackedCache
from kvik.models.weights import Kinds, read_matrices
from kvik.ops.base import Weight
from kvik.ops.native import PACKED_ALIGNMENT, PACKED_VERSION, NativeOps, packed_data
from kvik.ops.reference import ReferenceOps
from kvik.store import fingerprints, packed
from kvik.store.packed import packed_files, sweep_packed
from models import FloatArray, random_prompt, run
from subprocesses import environment, python

KINDS = [GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q8_0, GGMLQuantizationType.F16, GGMLQuantizationType.Q5_1]


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of these tests are new."""
    monkeypatch.setattr(fingerprints, "SETTLED_S", 0.0)


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "tiny.gguf")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "packed"


def load(path: Path, folder: Path | None, **options: Any) -> LoadedModel:
    return load_model(path, NativeOps("int8", threads=2), packed_cache=folder, **options)


def logits_of(model: LoadedModel) -> FloatArray:
    return run(Engine(model), random_prompt(model, 20, seed=3)).logits


def the_file(folder: Path) -> Path:
    (view,) = packed_files(folder)
    return view.path


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def source_of(path: Path) -> GGUFSource:
    file = read_gguf(path)
    return GGUFSource(file, read_spec(file, None), NativeOps(threads=2))


def bytes_of(matrices: dict[str, Weight] | None) -> dict[str, bytes] | None:
    return None if matrices is None else {name: bytes(packed_data(weight)) for name, weight in matrices.items()}


class Kept:
    """A model, what it packs to, and the folder where that is kept."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.ops = NativeOps(threads=2)
        self.source = source_of(model)
        self.kinds: Kinds = self.source.kinds()
        matrices = read_matrices(self.source)
        self.bytes = bytes_of(matrices)
        self.cache().write(matrices, self.source)
        self.path = the_file(folder)
        self.whole = self.path.read_bytes()

    def cache(self) -> PackedCache:
        return PackedCache(self.folder, self.model, self.ops, None)

    def read(self) -> dict[str, bytes] | None:
        return bytes_of(self.cache().read(self.kinds))


@pytest.fixture
def kept(model_path: Path, folder: Path) -> Kept:
    return Kept(model_path, folder)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_logits_are_the_same_bits_with_and_without(tmp_path: Path, folder: Path, kind: GGMLQuantizationType) -> None:
    path = tiny_llama(tmp_path / "tiny.gguf", weight_type=kind, head_dim=64, intermediate_size=512)
    wanted = logits_of(load(path, None))
    np.testing.assert_array_equal(logits_of(load(path, folder)), wanted)
    written = the_file(folder).read_bytes()
    again = load(path, folder)
    np.testing.assert_array_equal(logits_of(again), wanted)
    assert the_file(folder).read_bytes() == written


def test_the_second_start_packs_nothing(model_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(model_path, folder)

    def never(*_: object) -> None:
        raise AssertionError("packed or hashed once more")

    monkeypatch.setattr(NativeOps, "load_rows", never)
    monkeypatch.setattr(fingerprints, "_sha256_of", never)
    matrices = PackedCache(folder, model_path, NativeOps(), None).read(source_of(model_path).kinds())
    assert matrices is not None
    for weight in matrices.values():
        assert np.asarray(packed_data(weight)).ctypes.data % PACKED_ALIGNMENT == 0
    load(model_path, folder)


def test_a_quantised_folder_says_again_what_quantising_did(tmp_path: Path, folder: Path) -> None:
    path = tiny_checkpoint(tmp_path / "model")
    models = [load(path, at, weights="q4") for at in (None, folder, folder)]
    for model in models[1:]:
        np.testing.assert_array_equal(logits_of(model), logits_of(models[0]))
        assert model.quantization == models[0].quantization
    load(path, folder, weights="q8")
    load(path, folder)
    assert len(packed_files(folder)) == 3


def test_mutated_files_give_the_same_bits_or_none(kept: Kept) -> None:
    rng = random.Random(21)
    outcomes = {True: 0, False: 0}
    for _ in range(400):
        data = bytearray(kept.whole)
        match rng.randrange(5):
            case 0:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 1:
                data[rng.randrange(200)] = rng.randrange(256)
            case 2:
                del data[rng.randrange(len(data)) :]
            case 3:
                at, size = rng.randrange(len(data)), rng.randrange(1, 5000)
                data[at : at + size] = bytes(len(data[at : at + size]))
            case _:
                a, b, size = rng.randrange(len(data)), rng.randrange(len(data)), 64
                data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
        kept.path.unlink(missing_ok=True)
        kept.path.write_bytes(data)
        found = kept.read()
        assert found in (None, kept.bytes)
        outcomes[found is None] += 1
        assert kept.path.exists() == (found is not None)  # what is bad is removed
    assert outcomes[True] > 200
    assert outcomes[False] > 0  # such as changes of the bytes between matrices, which nobody reads


def test_each_bit_of_a_matrix_is_checked(kept: Kept) -> None:
    start = len(kept.whole) - 4096
    for at in range(start, start + 600, 7):
        data = bytearray(kept.whole)
        data[at] ^= 1 << (at % 8)
        kept.path.write_bytes(data)
        assert kept.read() is None, at


HOSTILE: list[Any] = [
    [],
    {},
    {"matrices": "x"},
    {"matrices": [[]] * 10},
    {"matrices": [["token_embd.weight", "F32", 10**30, 10**30, []]]},
    {"matrices": [["token_embd.weight", "F32", -1, 64, []]]},
    {"matrices": [["token_embd.weight", "F32", 320.0, 64, []]]},
    {"matrices": [["token_embd.weight", "F32", True, 64, []]]},
    {"matrices": [["token_embd.weight", "F32", 320, 64, [1.5]]]},
    {"matrices": [["a", "F32", 1, 1, []]] * (packed.MAX_PACKED_MATRICES + 1)},
    {"key": 7},
    {"key": "../../etc/passwd"},
    {"notes": [1]},
]


@pytest.mark.parametrize("change", HOSTILE, ids=range(len(HOSTILE)))
def test_headers_that_lie_with_a_right_digest_are_refused(kept: Kept, change: Any) -> None:
    json_bytes = int.from_bytes(kept.whole[16:24], "little")
    data, fields = kept.whole[packed.DATA_START : -json_bytes], json.loads(kept.whole[-json_bytes:])
    text = json.dumps(fields | change if change else change).encode()
    num_bytes = packed.DATA_START + len(data) + len(text)
    fixed = packed._FIXED.pack(packed.MAGIC, packed.FILE_VERSION, PACKED_VERSION, len(text), num_bytes)
    head = (fixed + packed._digest(fixed, text)).ljust(packed.DATA_START, b"\0")
    kept.path.write_bytes(head + data + text)
    assert kept.read() is None


@pytest.mark.parametrize("at", [16, 24], ids=["json", "file"])
@pytest.mark.parametrize("number", [0, 1, 2**24 + 1, 2**63, 2**64 - 1])
def test_lengths_that_lie_are_refused(kept: Kept, at: int, number: int) -> None:
    kept.path.write_bytes(kept.whole[:at] + number.to_bytes(8, "little") + kept.whole[at + 8 :])
    assert kept.read() is None


def test_another_version_is_a_miss(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.path.write_bytes(kept.whole[:12] + (PACKED_VERSION + 1).to_bytes(4, "little") + kept.whole[16:])
    assert kept.read() is None
    kept.path.write_bytes(kept.whole)
    assert kept.read() == kept.bytes
    monkeypatch.setattr(packed_cache, "PACKED_VERSION", PACKED_VERSION + 1)
    assert kept.read() is None
    assert kept.path.exists()  # for the kvik that knows it,
    sweep_packed(kept.folder, PACKED_VERSION + 1)
    assert not kept.path.exists()  # until this one writes


def test_another_model_at_the_same_place(kept: Kept, tmp_path: Path) -> None:
    """Of the same size, shape and time."""
    before = kept.model.stat()
    other = tiny_llama(tmp_path / "other.gguf", seed=99)
    wanted = logits_of(load(other, None))
    kept.model.write_bytes(other.read_bytes())
    os.utime(kept.model, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert kept.model.stat().st_size == before.st_size
    assert kept.read() is None
    for _ in range(2):
        np.testing.assert_array_equal(logits_of(load(kept.model, kept.folder)), wanted)
    assert len(packed_files(kept.folder)) == 2


def test_the_file_of_another_model_under_this_ones_name(kept: Kept, tmp_path: Path) -> None:
    other = Kept(tiny_llama(tmp_path / "other.gguf", seed=99), tmp_path / "others")
    kept.path.write_bytes(other.whole)
    assert kept.read() is None


def test_a_model_that_moved_is_packed_once_more_and_found_then(kept: Kept, tmp_path: Path) -> None:
    moved = kept.model.rename(tmp_path / "moved.gguf")
    assert PackedCache(kept.folder, moved, kept.ops, None).read(kept.kinds) is None
    load(moved, kept.folder)
    assert the_file(kept.folder).read_bytes() == kept.whole
    assert bytes_of(PackedCache(kept.folder, moved, kept.ops, None).read(kept.kinds)) == kept.bytes


def test_a_model_that_changes_while_it_is_loaded_is_not_kept(
    model_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = PackedCache(folder, model_path, NativeOps(threads=1), None)
    source = source_of(model_path)
    matrices = read_matrices(source)
    os.utime(model_path)
    cache.write(matrices, source)
    assert packed_files(folder) == []
    assert "changed while it was loaded" in caplog.text


def test_a_model_that_changes_between_the_two_looks_is_not_read(kept: Kept) -> None:
    cache = kept.cache()
    os.utime(kept.model)
    assert cache.read(kept.kinds) is None


def test_a_model_changed_a_moment_ago_is_not_kept(
    model_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "SETTLED_S", 1e6)
    load(model_path, folder)
    assert packed_files(folder) == []


def test_a_link_in_its_place_is_not_followed(kept: Kept, tmp_path: Path) -> None:
    elsewhere = kept.path.rename(tmp_path / "elsewhere")
    kept.path.symlink_to(elsewhere)
    assert kept.read() is None
    assert elsewhere.read_bytes() == kept.whole


def test_a_full_disk_is_no_reason_to_fail(
    model_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    load(model_path, folder)
    assert packed_files(folder) == []
    assert "are not kept: they take" in caplog.text
    assert not [name for name in names_in(folder) if name.startswith(".")]


@pytest.mark.parametrize("failing", range(1, 9))
def test_a_write_that_fails_leaves_nothing(
    model_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    write, count = os.write, 0

    def sometimes(file: int, data: bytes) -> int:
        nonlocal count
        count += 1
        if count == failing:
            raise OSError(28, "No space left on device")
        return write(file, data)

    monkeypatch.setattr(os, "write", sometimes)
    model = load(model_path, folder)
    monkeypatch.undo()
    assert not [name for name in names_in(folder) if name.startswith(".")]
    np.testing.assert_array_equal(logits_of(model), logits_of(load(model_path, None)))


def test_who_may_not_use_it(model_path: Path, folder: Path) -> None:
    with pytest.raises(InvalidInput, match="native backend"):
        load_model(model_path, ReferenceOps(), packed_cache=folder)
    folder.mkdir(mode=0o755)
    with pytest.raises(InvalidInput, match="others than its owner"):
        load(model_path, folder)
    with pytest.raises(InvalidInput, match="packed_cache"):
        EngineConfig(packed_cache="")


def test_folder_and_files_are_the_users_own(kept: Kept) -> None:
    assert kept.folder.stat().st_mode & 0o777 == 0o700
    assert kept.path.stat().st_mode & 0o777 == 0o600


def test_deleting_it_is_safe_while_it_is_used(model_path: Path, folder: Path) -> None:
    load(model_path, folder)
    model = load(model_path, folder)
    shutil.rmtree(folder)
    np.testing.assert_array_equal(logits_of(model), logits_of(load(model_path, None)))


# Processes.

SCRIPT = """
import gc, os, signal, sys, threading
from pathlib import Path
from kvik.models.loader import load_model
from kvik.ops.native import NativeOps
from kvik.store import fingerprints

fingerprints.SETTLED_S = 0.0
path, folder, stage, number = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

def report(what, done_bytes, total_bytes):
    if what.endswith(stage):
        os.kill(os.getpid(), number)

def load():
    load_model(path, NativeOps(threads=3), packed_cache=folder, progress=report)

before = len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
try:
    load()
except KeyboardInterrupt:
    print("interrupted", end=" ")
gc.collect()
after = len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
print(before == after or (before, after), [thread.name for thread in threading.enumerate()])
"""


@pytest.mark.parametrize(
    "stage",
    [
        "loading",
        "hashing",
        "keeping packed weights",
        "checking packed weights",
    ],
)
def test_ctrl_c_leaves_no_thread_and_no_file(model_path: Path, folder: Path, stage: str) -> None:
    if stage.startswith("checking"):
        load(model_path, folder)
    done = python("-c", SCRIPT, str(model_path), str(folder), stage, str(int(signal.SIGINT)))
    assert done.stdout == "interrupted True ['MainThread']\n", done.stderr
    assert not [name for name in names_in(folder) if name.startswith(".")]
    assert len(packed_files(folder)) == stage.startswith("checking")


def test_a_process_killed_while_it_writes(model_path: Path, folder: Path) -> None:
    done = python("-c", SCRIPT, str(model_path), str(folder), "keeping packed weights", str(int(signal.SIGKILL)))
    assert done.returncode == -signal.SIGKILL
    assert packed_files(folder) == []
    (partial,) = [folder / name for name in names_in(folder) if name.startswith(".")]
    model = load(model_path, folder)
    np.testing.assert_array_equal(logits_of(model), logits_of(load(model_path, folder)))
    assert partial.exists()  # another process might be writing it
    os.utime(partial, (time.time() - 7200,) * 2)
    sweep_packed(folder, PACKED_VERSION)
    assert not partial.exists()


def test_two_processes_at_once(model_path: Path, folder: Path) -> None:
    arguments = [sys.executable, "-c", SCRIPT, str(model_path), str(folder), "nothing", "0"]
    processes = [subprocess.Popen(arguments, env=environment(), stderr=subprocess.PIPE) for _ in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert (process.returncode, errors) == (0, b"")
    np.testing.assert_array_equal(logits_of(load(model_path, folder)), logits_of(load(model_path, None)))
    assert names_in(folder) == {the_file(folder).name, fingerprints.MEMORY}


# How a file is read.


def test_no_more_than_a_piece_of_the_file_is_in_memory_beside_what_is_packed(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_source, "MIN_PIECE_BYTES", 1)
    source = source_of(model_path)
    touched: list[tuple[int, int]] = []  # read, not yet given back
    places: list[int] = []
    most = 0

    def pieces(self: GGUFSource, tensor: GGUFTensor) -> Iterator[Any]:
        nonlocal most
        for piece in original(self, tensor):
            start = tensor.offset + piece.ctypes.data - tensor.data.ctypes.data
            touched.append((start, len(piece)))
            places.append(start)
            most = max(most, sum(size for _, size in touched))
            yield piece

    def drop(self: MappedFile, start: int, num_bytes: int) -> None:
        touched.remove((start, num_bytes))

    original = GGUFSource._pieces
    monkeypatch.setattr(GGUFSource, "_pieces", pieces)
    monkeypatch.setattr(MappedFile, "drop_pages", drop)
    matrices = read_matrices(source)
    packed_bytes = sum(weight.num_bytes for weight in matrices.values())
    assert touched == []
    assert len(places) > 2 * len(matrices)
    assert most <= packed_bytes // 20
    assert places == sorted(places)


def test_what_is_read_ahead_is_a_bounded_part_of_the_file(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_source, "AHEAD_BYTES", 4096)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(MappedFile, "ask_for", lambda self, start, num_bytes: asked.append((start, num_bytes)))
    source = source_of(model_path)
    for name, (_, rows, _) in source.kinds().items():
        source.matrix(name)
        tensor = source.tensors[name]
        end = sum(asked[-1])
        assert tensor.offset + tensor.num_bytes <= end <= tensor.offset + tensor.num_bytes + 4096, rows
    assert all(before + size == after for (before, size), (after, _) in itertools.pairwise(asked))


def test_progress_is_told_of_each_piece(model_path: Path, folder: Path) -> None:
    told: dict[str, list[tuple[int, int]]] = {}

    def report(what: str, done_bytes: int, total_bytes: int) -> None:
        told.setdefault(what.partition(": ")[2], []).append((done_bytes, total_bytes))

    load(model_path, folder, progress=report)
    load(model_path, folder, progress=report)
    assert list(told) == [
        "loading",
        "hashing",
        "keeping packed weights",
        "checking packed weights",
    ]
    for stage in ("loading", "hashing"):
        assert told[stage][-1][0] == told[stage][-1][1], stage
        assert told[stage] == sorted(told[stage])


def test_llm_takes_it(model_path: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    texts = [
        LLM(model_path, packed_cache=at, threads=1).generate([1, 2, 3])[0].token_ids for at in (None, folder, folder)
    ]
    assert texts[0] == texts[1] == texts[2]
    assert the_file(folder)
    assert caplog.text == ""
