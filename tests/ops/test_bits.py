"""The exactness rule, op by op: the native backend gives the same bits in any arrangement of the same work."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import given, note, settings
from hypothesis import strategies as st

from kvik import _native
from kvik.config import ActivationDType
from kvik.models.spec import RopeSpec
from kvik.ops.base import Norm
from kvik.ops.native import NativeOps
from looped import looped
from ops.arrangement import KV_DTYPES, FloatArray, Heads, History, random_history, random_weights
from ops.digest import digest, digest_of, products
from subprocesses import python
from tiers import TESTED_TYPES, examples

THREADS = (1, 2, 3)

every_thread_count = pytest.mark.parametrize("threads", THREADS)
every_kv_type = looped("dtype", KV_DTYPES)

pytestmark = pytest.mark.sanitize


def same_bits(left: FloatArray, right: FloatArray) -> None:
    """Stricter than equality: zeros of both signs differ, NaNs of the same bits do not."""
    np.testing.assert_array_equal(left.view(np.uint32), right.view(np.uint32))


@pytest.mark.parametrize("activations", ["int8", "int16"])
@looped("kind", TESTED_TYPES, lambda kind: kind.name)
def test_project_row_by_row(kind: GGMLQuantizationType, activations: ActivationDType) -> None:
    """A decode step's row of one is a prompt's row of seventy, however many threads share the outputs."""
    rng = np.random.default_rng(1)
    rows = 53  # 7 row blocks, the last one not full
    weight = random_weights(kind, rows, 256, rng)
    x = rng.normal(0, 1, (70, 256)).astype(np.float32)
    alone = NativeOps(activations, threads=1)
    packed = weight.linear(alone)
    one_by_one = np.concatenate([alone.linear(x[i : i + 1], packed) for i in range(70)])
    for threads in THREADS:
        ops = NativeOps(activations, threads=threads)
        for count in (1, 2, 3, 4, 5, 7, 8, 9, 31, 63, 64, 65, 70):
            same_bits(ops.linear(x[:count], packed), one_by_one[:count])
            same_bits(ops.linear(x[70 - count :], packed), one_by_one[70 - count :])


@pytest.mark.tiny
@looped("kind", [GGMLQuantizationType.Q4_1, GGMLQuantizationType.F16], lambda kind: kind.name)
def test_project_every_number_of_rows(kind: GGMLQuantizationType) -> None:
    rng = np.random.default_rng(2)
    ops = NativeOps(threads=2)
    packed = random_weights(kind, 24, 96, rng).linear(ops)
    x = rng.normal(0, 1, (71, 96)).astype(np.float32)
    whole = ops.linear(x, packed)
    for count in range(1, 71):
        same_bits(ops.linear(x[:count], packed), whole[:count])


@pytest.mark.parametrize("rows", [1150, 1173])
@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0, GGMLQuantizationType.F16])
def test_project_one_token_over_many_row_blocks(kind: GGMLQuantizationType, rows: int) -> None:
    """One token's row blocks are computed 32 to a call: here a thread's chunk has 36 of them, or 35 at the end."""
    rng = np.random.default_rng(4)
    ops = NativeOps(threads=1)
    packed = random_weights(kind, rows, 64, rng).linear(ops)
    x = rng.normal(0, 1, (3, 64)).astype(np.float32)
    whole = ops.linear(x, packed)
    for i in range(3):
        same_bits(ops.linear(x[i : i + 1], packed), whole[i : i + 1])


@every_thread_count
def test_project_of_several_weights_is_each_alone(threads: int) -> None:
    rng = np.random.default_rng(3)
    ops, alone = NativeOps(threads=threads), NativeOps(threads=1)
    weights = [random_weights(kind, int(rng.integers(1, 70)), 256, rng).linear(alone) for kind in TESTED_TYPES]
    x = rng.normal(0, 1, (5, 256)).astype(np.float32)
    for weight, out in zip(weights, ops.project(x, weights), strict=True):
        same_bits(out, alone.linear(x, weight))


@settings(max_examples=examples(60))
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    cut=st.integers(0, 70),
    threads=st.sampled_from(THREADS),
)
def test_rows_of_norm_activation_and_rope(seed: int, shape: tuple[int, int], cut: int, threads: int) -> None:
    """Cut anywhere, the two parts give what the whole gives."""
    rng = np.random.default_rng(seed)
    tokens, width = shape
    cut = min(cut, tokens)
    note(f"default_rng({seed})")
    x, y = (rng.normal(0, 10.0 ** rng.integers(-20, 3), shape).astype(np.float32) for _ in range(2))
    weight = rng.normal(0, 1, width).astype(np.float32)
    heads = rng.normal(0, 1, (tokens, 2, 2 * width)).astype(np.float32)
    positions = rng.integers(0, 100, tokens, dtype=np.int32)
    table = RopeSpec(10_000.0, 2 * width, adjacent_pairs=bool(seed % 2)).table(100)
    alone, shared = NativeOps(threads=1), NativeOps(threads=threads)

    def results(ops: NativeOps, part: slice) -> list[FloatArray]:
        return [
            ops.norm(x[part], Norm(weight, 1e-5)),
            ops.activate(x[part], "silu", y[part]),
            ops.rope(heads[part], positions[part], table),
        ]

    whole = results(shared, slice(None))
    for first, second, together in zip(
        results(alone, slice(cut)), results(alone, slice(cut, None)), whole, strict=True
    ):
        same_bits(np.concatenate([first, second]), together)


def written_in_chunks(
    history: History, ops: NativeOps, dtype: str, chunk: int, window: int | None = None
) -> FloatArray:
    """The first sequence computed `chunk` tokens at a time, each written before it looks back."""
    kv = history.allocate(ops, dtype)
    outs = []
    for start in range(0, len(history.q[0]), chunk):
        part = [(0, start, min(start + chunk, len(history.q[0])))]
        history.write(ops, kv, part)
        outs.append(history.attend(ops, kv, part, window))
    return np.concatenate(outs)


@every_kv_type
@pytest.mark.parametrize("queries_per_kv", [1, 3, 4])
def test_attend_in_chunks(queries_per_kv: int, dtype: str) -> None:
    """One token at a time, a segment a task, up to all at once, a row a task; 530 positions make three segments."""
    history = random_history(Heads(queries_per_kv, 1, 40), [530], np.random.default_rng(queries_per_kv), sharpness=2.0)
    one_by_one = written_in_chunks(history, NativeOps(threads=1), dtype, 1)
    assert np.isfinite(one_by_one).all()
    for threads in THREADS:
        ops = NativeOps(threads=threads)
        for chunk in (7, 32, 33, 256, 530) if threads > 1 else (7, 33, 530):
            same_bits(written_in_chunks(history, ops, dtype, chunk), one_by_one)


@every_kv_type
@every_thread_count
def test_attend_few_rows_and_many(dtype: str, threads: int) -> None:
    """With few rows a task is a segment, with many a row: the switch lies at four rows a thread."""
    history = random_history(Heads(4, 2, 16), [600, 300], np.random.default_rng(5), sharpness=2.0)
    ops = NativeOps(threads=threads)
    kv = history.allocate(ops, dtype)
    history.write(ops, kv, history.everything)
    many = history.attend(ops, kv, [(0, 560, 600)])
    for count in range(1, 2 * threads + 3):
        same_bits(history.attend(ops, kv, [(0, 600 - count, 600)]), many[-count:])


@pytest.mark.parametrize("dtype", KV_DTYPES)
@settings(max_examples=examples(25))
@given(seed=st.integers(0, 2**32 - 1), threads=st.sampled_from(THREADS))
def test_attend_does_not_see_placement_or_company(dtype: str, seed: int, threads: int) -> None:
    """Other blocks, other batch mates, another width of the table: the same bits for the same history."""
    rng = np.random.default_rng(seed)
    note(f"default_rng({seed})")
    group, head_dim = int(rng.integers(1, 6)), 8 * int(rng.integers(1, 5))
    lengths = rng.integers(1, 300, int(rng.integers(2, 5))).tolist()
    together = random_history(Heads(group, 1, head_dim), lengths, rng)
    ops = NativeOps(threads=threads)
    kv = together.allocate(ops, dtype)
    together.write(ops, kv, together.everything)
    chunks = [(index, int(rng.integers(0, length)), length) for index, length in enumerate(lengths)]
    outs = iter(together.attend(ops, kv, chunks))
    alone = NativeOps(threads=1)
    for index, start, stop in chunks:
        only = random_history(Heads(group, 1, head_dim), [lengths[index]], rng)
        for mine, theirs in ((only.q, together.q), (only.k, together.k), (only.v, together.v)):
            mine[0] = theirs[index]
        kv_alone = only.allocate(alone, dtype)
        only.write(alone, kv_alone, only.everything)
        for out in only.attend(alone, kv_alone, [(0, start, stop)]):
            same_bits(next(outs), out)


@every_kv_type
@pytest.mark.parametrize("window", [1, 33, 255, 257])
def test_a_window_in_chunks(window: int, dtype: str) -> None:
    """Where a tile's rows begin and end at different tokens, each still adds its own in order."""
    history = random_history(Heads(6, 2, 24), [530], np.random.default_rng(window), sharpness=2.0)
    one_by_one = written_in_chunks(history, NativeOps(threads=1), dtype, 1, window)
    assert np.isfinite(one_by_one).all()
    for threads, chunk in ((1, 16), (2, 5), (3, 64), (2, 33), (3, 512)):
        same_bits(written_in_chunks(history, NativeOps(threads=threads), dtype, chunk, window), one_by_one)


@every_kv_type
@pytest.mark.parametrize("group", [5, 7, 13, 71, 128])
def test_groups_of_any_size_in_chunks(group: int, dtype: str) -> None:
    """Tiles of a few tokens or one, slices of rows that mix heads of neighbouring tokens."""
    history = random_history(Heads(group, 1, 8), [270], np.random.default_rng(group), sharpness=2.0)
    kv = history.allocate(NativeOps(), dtype)
    alone = NativeOps(threads=1)
    history.write(alone, kv, history.everything)
    one_by_one = np.concatenate([history.attend(alone, kv, [(0, at, at + 1)]) for at in range(230, 270)])
    for threads in THREADS:
        same_bits(history.attend(NativeOps(threads=threads), kv, [(0, 230, 270)]), one_by_one)


@pytest.mark.parametrize("seeds", [range(4), pytest.param(range(4, 15), marks=pytest.mark.full)], ids=str)
@every_kv_type
def test_ragged_batches_by_chance(seeds: range, dtype: str) -> None:
    for seed in seeds:
        check_ragged_batch(seed, dtype)


def check_ragged_batch(seed: int, dtype: str) -> None:
    """Any chunks of several sequences at once, of any shape: each token's bits are those it has alone."""
    rng = np.random.default_rng(seed)
    heads = Heads(int(rng.integers(1, 13)), 1, 8 * int(rng.integers(1, 33)))
    lengths = rng.integers(1, 700, 4).tolist()
    history = random_history(heads, lengths, rng, sharpness=2.0)
    window = [None, 1, 31, 256, 300][int(rng.integers(5))]
    alone = NativeOps(threads=1)
    kv = history.allocate(alone, dtype)
    history.write(alone, kv, history.everything)
    chunks = [(index, int(rng.integers(max(0, length - 100), length)), length) for index, length in enumerate(lengths)]
    wanted = np.concatenate(
        [history.attend(alone, kv, [(index, at, at + 1)], window) for index, a, b in chunks for at in range(a, b)]
    )
    for threads in THREADS:
        same_bits(history.attend(NativeOps(threads=threads), kv, chunks, window), wanted)


@every_kv_type
def test_a_later_token_that_is_no_number_leaves_earlier_ones_their_bits(dtype: str) -> None:
    """Rows of a tile share what is loaded, and zero times NaN is NaN: it must not be added even so."""
    history = random_history(Heads(6, 2, 16), [64], np.random.default_rng(19), sharpness=2.0)
    ops = NativeOps(threads=2)
    kv = history.allocate(ops, dtype)
    history.write(ops, kv, history.everything)
    before = history.attend(ops, kv, [(0, 0, 64)])
    for cut in (62, 33, 31, 1):
        history.k[0][cut] = history.v[0][cut] = np.nan
        history.write(ops, kv, [(0, cut, cut + 1)])
        outs = history.attend(ops, kv, [(0, 0, 64)])
        same_bits(outs[:cut], before[:cut])
        assert np.isnan(outs[cut:]).all()


def test_a_batch_is_its_tokens_one_by_one() -> None:
    """Tokens of several sequences in any order."""
    rng = np.random.default_rng(6)
    history = random_history(Heads(6, 2, 24), [290, 40, 257], rng)
    ops = NativeOps(threads=2)
    kv = history.allocate(ops, "f16")
    history.write(ops, kv, history.everything)
    tokens = [(0, 289), (2, 256), (1, 0), (0, 255), (0, 256), (2, 3), (1, 39), (2, 255)]
    batch = history.attend(ops, kv, [(sequence, position, position + 1) for sequence, position in tokens])
    for out, (sequence, position) in zip(batch, tokens, strict=True):
        same_bits(history.attend(ops, kv, [(sequence, position, position + 1)])[0], out)


NO_AMX = _native.amx_obstacle()
ISAS = [
    *_native.usable_isas(),
    *([pytest.param("amx", marks=pytest.mark.skip(reason=f"no AMX: {NO_AMX}"))] if NO_AMX else []),
]


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets_give_the_same_products(isa: str) -> None:
    """Tiles of every size too, by AMX where this machine has it and by its emulation on every machine."""
    other = python("-m", "ops.digest", "products", KVIK_ISA=isa)
    assert other.returncode == 0, other.stderr
    assert other.stdout.strip() == digest_of(products())


def test_amx_is_used_or_the_reason_is_told() -> None:
    assert ("amx" in _native.usable_isas()) == (NO_AMX == "")
    if NO_AMX:
        result = python("-c", "import kvik._native", KVIK_ISA="amx")
        assert result.returncode == 1
        assert f"cannot be used: {NO_AMX}" in result.stderr or "is not one of" in result.stderr


@pytest.mark.parametrize("isa", _native.usable_isas())
def test_instruction_sets_give_the_same_bits(isa: str) -> None:
    other = python("-m", "ops.digest", KVIK_ISA=isa)
    assert other.returncode == 0, other.stderr
    assert other.stdout.strip() == digest()


def test_the_digest_of_every_thread_count_is_the_same() -> None:
    assert len({digest(threads) for threads in THREADS}) == 1


def test_an_unknown_instruction_set_is_refused_with_the_choices() -> None:
    result = python("-c", "import kvik._native", KVIK_ISA="nonsense")
    assert result.returncode == 1
    assert "ImportError: KVIK_ISA=nonsense is not one of: " in result.stderr
    assert "generic, amx-emulated" in result.stderr


@pytest.mark.parametrize("isa", [*_native.usable_isas(), ""])
def test_the_instruction_set_can_be_asked_for(isa: str) -> None:
    result = python("-c", "import kvik._native; print(kvik._native.isa)", KVIK_ISA=isa)
    assert result.stdout.strip() == (isa or _native.usable_isas()[0]), result.stderr
