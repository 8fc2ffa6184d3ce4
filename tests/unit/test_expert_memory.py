"""Where experts lie in memory and in files, and models that memory does not hold."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from gguf_files import tiny_llama
from kvik.engine.engine import Engine
from kvik.errors import NotEnoughMemory
from kvik.hub.progress import Progress, silent
from kvik.models import loader
from kvik.models.gguf_source import GGUFSource
from kvik.models.loader import LoadedModel, load_model
from kvik.models.packed_cache import PackedCache
from kvik.models.weights import Kinds, OneByOne, read_matrices, wanted_together
from kvik.ops.base import Expert, ExpertsWeights, Linear, Routing, Vector, Weight, WeightPlace
from kvik.ops.native import NativeOps, packed_data
from kvik.store import fingerprints
from kvik.store.packed import packed_files
from models import FloatArray, random_prompt, run
from ops.arrangement import Matrix, random_weights

HIDDEN, INNER, NUM_EXPERTS, NUM_LAYERS = 128, 96, 3, 2
TRIPLE = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of these tests are new."""
    monkeypatch.setattr(fingerprints, "SETTLED_S", 0.0)


class Mixture:
    """A source as files are: of each layer all gates, then all ups, then all downs."""

    quantization = None

    def __init__(self) -> None:
        self.ops = NativeOps(threads=2)
        self.num_read = 0
        rng = np.random.default_rng(1)
        self.matrices: dict[str, Matrix] = {"token_embd.weight": random_weights(Type.F32, 40, HIDDEN, rng)}
        for layer in reversed(range(NUM_LAYERS)):
            for name in TRIPLE:
                shape = (HIDDEN, INNER) if name == "ffn_down_exps" else (INNER, HIDDEN)
                for expert in range(NUM_EXPERTS):
                    full = f"blk.{layer}.{name}.{expert}.weight"
                    self.matrices[full] = random_weights(Type.Q8_0, *shape, rng)

    @property
    def num_bytes(self) -> int:
        return sum(matrix.blocks.nbytes for matrix in self.matrices.values())

    def kinds(self) -> Kinds:
        return {name: (one.kind.name, *one.values.shape) for name, one in self.matrices.items()}

    def matrix(self, name: str, place: WeightPlace | None = None) -> Weight:
        self.num_read += 1
        one = self.matrices[name]
        rows, columns = one.values.shape
        return self.ops.load_rows(one.kind.name, [one.blocks.reshape(-1)], rows, columns, place)

    def vector(self, name: str) -> Vector:
        raise AssertionError(name)

    def table(self, name: str) -> Weight:
        raise AssertionError(name)


def address(weight: Weight) -> int:
    return int(np.asarray(packed_data(weight)).__array_interface__["data"][0])


def assert_together(matrices: dict[str, Weight]) -> None:
    """One expert's gate, up and down follow each other from a page's beginning."""
    for layer in range(NUM_LAYERS):
        for expert in range(NUM_EXPERTS):
            gate, up, down = (matrices[f"blk.{layer}.{name}.{expert}.weight"] for name in TRIPLE)
            assert address(gate) % 4096 == 0
            for before, after in ((gate, up), (up, down)):
                assert address(after) == address(before) + -(-before.num_bytes // 64) * 64


def test_an_experts_matrices_lie_together_in_memory() -> None:
    source = Mixture()
    matrices = read_matrices(source)
    assert list(matrices) == list(source.kinds()), "read in the order of the file"
    assert_together(matrices)
    for name, matrix in matrices.items():
        np.testing.assert_array_equal(packed_data(matrix), packed_data(source.matrix(name)))


def test_names_wanted_together() -> None:
    groups = wanted_together(Mixture().kinds())
    assert groups[0] == ["token_embd.weight"]
    wanted = [
        [f"blk.{layer}.{name}.{expert}.weight" for name in TRIPLE]
        for layer in range(NUM_LAYERS)
        for expert in range(NUM_EXPERTS)
    ]
    assert groups[1:] == wanted


def test_a_place_takes_one_matrix_of_its_size() -> None:
    ops = NativeOps(threads=1)
    (place,) = ops.places_together([("F32", 32, 32)])
    rows = np.zeros(32 * 32 * 4, np.uint8)
    with pytest.raises(ValueError, match="another size"):
        ops.load_rows("F32", [rows], 16, 64 - 32, place)
    ops.load_rows("F32", [rows], 32, 32, place)
    with pytest.raises(ValueError, match="a matrix already"):
        ops.load_rows("F32", [rows], 32, 32, place)
    assert ops.places_together([]) == []


def cache_of(tmp_path: Path, ops: NativeOps) -> PackedCache:
    """Of a model whose files have nothing to do with it: they only name what is kept."""
    return PackedCache(tmp_path / "packed", tiny_llama(tmp_path / "tiny.gguf"), ops, None)


def test_an_experts_matrices_lie_together_in_a_file_and_give_the_same_bits(tmp_path: Path) -> None:
    source = Mixture()
    cache, packed = cache_of(tmp_path, source.ops), read_matrices(source)
    cache.write(OneByOne(source), source)
    rng = np.random.default_rng(2)
    x, logits = (rng.normal(0, 1, (5, width)).astype(np.float32) for width in (HIDDEN, NUM_EXPERTS))
    wanted = experts_of(source.ops, packed, x, logits)
    for on_demand in (False, True):
        mapped = cache.read(source.kinds(), on_demand=on_demand)
        assert mapped is not None
        assert_together(mapped)
        for rows in (slice(0, 5), slice(2, 3)):
            found = experts_of(source.ops, mapped, x[rows], logits[rows])
            np.testing.assert_array_equal(found, wanted[rows])


def experts_of(ops: NativeOps, matrices: dict[str, Weight], x: FloatArray, logits: FloatArray) -> FloatArray:
    """Through the experts of all layers, as one step after the other."""
    for layer in range(NUM_LAYERS):
        experts = []
        for expert in range(NUM_EXPERTS):
            gate, up, down = (Linear(matrices[f"blk.{layer}.{name}.{expert}.weight"]) for name in TRIPLE)
            experts.append(Expert(up, down, gate))
        weights = ExpertsWeights(Routing(2, renormalize=True), tuple(experts))
        x = ops.experts(x, logits, weights, "silu")
    return x


def test_matrices_one_by_one_are_never_all_held() -> None:
    source = Mixture()
    one_by_one = OneByOne(source)
    assert (list(one_by_one), len(one_by_one)) == (list(source.kinds()), len(source.kinds()))
    assert source.num_read == 0
    for name in one_by_one:
        np.testing.assert_array_equal(packed_data(one_by_one[name]), packed_data(source.matrix(name)))


# Larger than memory.


def load(path: Path, folder: Path | None, progress: Progress = silent) -> LoadedModel:
    return load_model(path, NativeOps("int8", threads=2), packed_cache=folder, progress=progress)


def logits_of(model: LoadedModel) -> FloatArray:
    return run(Engine(model), random_prompt(model, 20, seed=3)).logits


def test_what_memory_does_not_hold_stays_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, folder = tiny_llama(tmp_path / "tiny.gguf"), tmp_path / "packed"
    wanted = logits_of(load(path, None))
    monkeypatch.setattr(loader, "available_memory_bytes", lambda: 20_000)
    with pytest.raises(NotEnoughMemory, match="the weights take") as caught:
        load(path, None)
    assert "--packed-cache" in caught.value.hint
    told = []
    with caplog.at_level(logging.WARNING):
        model = load(path, folder, lambda what, done, total: told.append((what.partition(": ")[2], done, total)))
    assert max(done / total for what, done, total in told if what == "loading") == 1, "each is packed once"
    assert "they stay in" in caplog.text
    assert "slower" in caplog.text
    np.testing.assert_array_equal(logits_of(model), wanted)
    written = packed_files(folder)[0].path.stat()
    monkeypatch.setattr(GGUFSource, "matrix", None)  # nothing is packed again
    np.testing.assert_array_equal(logits_of(load(path, folder)), wanted)
    assert packed_files(folder)[0].path.stat().st_ino == written.st_ino


def test_a_cache_that_cannot_be_written_is_no_place_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_llama(tmp_path / "tiny.gguf")
    monkeypatch.setattr(loader, "available_memory_bytes", lambda: 20_000)
    monkeypatch.setattr(fingerprints, "SETTLED_S", 1e9)  # changed a moment ago, so nothing is kept
    with pytest.raises(NotEnoughMemory, match="the weights take"):
        load(path, tmp_path / "packed")
