"""The native sampler gives the bits of the reference, whatever the rows, their mates and the number of threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import pytest

from kvik import _native
from kvik.config import MAX_SEED, SamplingParams
from kvik.engine.sampler import NativeSampler, NumpySampler, Sampled, Sampler, SampleRow, make_sampler
from kvik.engine.sampler_native import OWN_FIELDS, PARAMS_FIELDS
from kvik.engine.sampler_reference import uniform
from kvik.ops.native import NativeOps
from kvik.ops.reference import ReferenceOps
from ops.arrangement import FloatArray
from ops.garbage import GOOD_SAMPLE, POOL, sample_row
from ops.sampling import KINDS, random_logits, random_rows

pytestmark = pytest.mark.sanitize

THREADS = (1, 2, 3)
SAMPLERS: dict[int, Sampler] = {count: make_sampler(NativeOps(threads=count)) for count in THREADS}
REFERENCE = NumpySampler()


def same(left: SequenceOf[Sampled], right: SequenceOf[Sampled]) -> None:
    """Equal tokens and logprobs of equal bits; a repr shows every bit of a float, and NaN as equal to itself."""
    assert list(map(repr, left)) == list(map(repr, right))


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, MAX_SEED])
def test_uniform_numbers_are_those_of_numpy(seed: int) -> None:
    for position in (0, 1, 2, 1000, 2**31, 2**32, 2**63, 2**64 - 1):
        assert _native.uniform_bits(seed, position) == int(uniform(seed, position) * 2**53)


@pytest.mark.parametrize("vocab_size", [1, 2, 7, 8, 15, 16, 17, 63, 255, 256, 257, 1000, 1025, 5003])
@pytest.mark.parametrize("kind", KINDS)
def test_random_rows(kind: str, vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    for _ in range(12):
        logits = random_logits(kind, 4, vocab_size, rng)
        rows = random_rows(logits, 6, rng)
        wanted = REFERENCE.sample(logits, rows)
        for sampler in SAMPLERS.values():
            same(sampler.sample(logits, rows), wanted)


@pytest.mark.parametrize("vocab_size", [49_152, 151_936])
def test_large_vocabularies(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    for kind in KINDS:
        logits = random_logits(kind, 3, vocab_size, rng)
        rows = random_rows(logits, 4, rng)
        same(SAMPLERS[2].sample(logits, rows), REFERENCE.sample(logits, rows))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9, "logprobs": 2}])
def test_a_row_depends_neither_on_the_others_nor_on_threads(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(3)
    logits = random_logits("normal", 9, 3000, rng)
    rows = [SampleRow(i, SamplingParams(**options), i, 5, [1, 2, 3, 4, 5], 3) for i in range(9)]
    alone = [SAMPLERS[1].sample(logits[[i]], [SampleRow(0, *_rest(row))])[0] for i, row in enumerate(rows)]
    for sampler in SAMPLERS.values():
        for _ in range(4):
            order = rng.permutation(9)[: rng.integers(1, 10)].tolist()
            same(sampler.sample(logits, [rows[i] for i in order]), [alone[i] for i in order])


def _rest(row: SampleRow) -> tuple[Any, ...]:
    return row.params, row.seed, row.position, row.token_ids, row.num_prompt_tokens


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.nan])
@pytest.mark.parametrize("vocab_size", [1, 7, 64, 1000, 2050])
def test_rows_that_are_not_finite_are_named_and_the_others_sampled(vocab_size: int, bad: float) -> None:
    rng = np.random.default_rng(vocab_size)
    for place in {0, vocab_size - 1, *rng.integers(0, vocab_size, 10).tolist()}:
        logits = random_logits("huge", 3, vocab_size, rng)  # sums of which overflow, which must not look like a NaN
        logits[1, place] = bad
        logits[2] = -np.inf
        choices: list[dict[str, Any]] = [{}, {"temperature": 1.0, "logprobs": 1}, {"repetition_penalty": 1.5}]
        for options in choices:
            rows = [SampleRow(i, SamplingParams(**options), 0, 1, [0], 1) for i in range(3)]
            found = SAMPLERS[2].sample(logits, rows)
            assert [sampled.token_id < 0 for sampled in found] == [False, True, True]
            same(found, REFERENCE.sample(logits, rows))
        entries = SAMPLERS[2].prompt_logprobs(logits, [0, 0, 0], 1)
        assert [math.isnan(entry.logprob) for entry in entries] == [False, True, True]


@pytest.mark.parametrize("num_top", [0, 4, 20])
def test_prompt_logprobs(num_top: int) -> None:
    rng = np.random.default_rng(4)
    for vocab_size in (1, 9, 3000):
        logits = random_logits("normal", 9, vocab_size, rng)
        next_ids = rng.integers(0, vocab_size, 9).tolist()
        entries = SAMPLERS[2].prompt_logprobs(logits, next_ids, num_top)
        assert repr(entries) == repr(REFERENCE.prompt_logprobs(logits, next_ids, num_top))
        assert SAMPLERS[2].prompt_logprobs(logits[2:5], next_ids[2:5], num_top) == entries[2:5]
        assert SAMPLERS[2].prompt_logprobs(logits[:0], [], num_top) == []
        with pytest.raises(ValueError, match="zip"):
            SAMPLERS[2].prompt_logprobs(logits, next_ids[:-1], num_top)


@pytest.mark.parametrize("std", [0.01, 3.0, 30.0])
def test_logprobs_are_those_of_float64(std: float) -> None:
    logits = np.random.default_rng(5).normal(0, std, (4, 151_936)).astype(np.float32)
    wide = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    wanted = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    for row, entry in zip(wanted, SAMPLERS[2].prompt_logprobs(logits, [5, 6, 7, 8], 20), strict=True):
        assert entry.logprob == pytest.approx(row[entry.token_id], abs=1e-6)
        assert list(entry.top.values()) == pytest.approx([row[token_id] for token_id in entry.top], abs=1e-6)
        assert list(entry.top) == np.argsort(-row, kind="stable")[:20].tolist()


def test_logits_are_left_alone_and_may_be_read_only() -> None:
    rng = np.random.default_rng(6)
    logits = random_logits("normal", 3, 300, rng)
    before = logits.copy()
    logits.flags.writeable = False
    for sampler in (*SAMPLERS.values(), REFERENCE):
        sampler.sample(logits, random_rows(logits, 20, rng))
    np.testing.assert_array_equal(logits, before)


def test_no_rows() -> None:
    none: FloatArray = np.empty((0, 50), np.float32)
    assert SAMPLERS[2].sample(none, []) == []
    assert SAMPLERS[2].sample(np.zeros((2, 50), np.float32), []) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"row": 3},
        {"row": -1},
        {"token_ids": [1, 50]},
        {"token_ids": [-1, 1]},
        {"num_prompt_tokens": 9},
        {"num_prompt_tokens": -1},
        {"forbidden_ids": (50,)},
        {"mask": bytes(6)},
        {"position": -1},
        {"params": SamplingParams(logit_bias={50: 1.0})},
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(wrong: dict[str, Any]) -> None:
    params = SamplingParams(temperature=1.0, repetition_penalty=1.1)
    good: dict[str, Any] = {"row": 1, "params": params, "seed": 1, "position": 2, "token_ids": [1, 2]}
    good |= {"num_prompt_tokens": 1}
    logits = np.zeros((3, 50), np.float32)
    SAMPLERS[2].sample(logits, [SampleRow(**good)])
    with pytest.raises(ValueError, match="Sampler"):
        SAMPLERS[2].sample(logits, [SampleRow(**good), SampleRow(**(good | wrong))])


def test_a_longer_mask_is_read_as_far_as_the_vocabulary_goes() -> None:
    logits = np.arange(50, dtype=np.float32)[None]
    row = SampleRow(0, SamplingParams(), 0, 1, [1], 1, mask=b"\x04" + bytes(6) + b"\xff" * 9)
    assert SAMPLERS[2].sample(logits, [row]) == REFERENCE.sample(logits, [row]) == [Sampled(2, None)]


def test_one_sampler_called_by_several_threads() -> None:
    rng = np.random.default_rng(7)
    logits = random_logits("normal", 5, 4000, rng)
    rows = random_rows(logits, 12, rng)
    wanted = REFERENCE.sample(logits, rows)
    found: list[list[Sampled]] = []

    def work() -> None:
        found.extend(SAMPLERS[3].sample(logits, rows) for _ in range(10))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 30
    for each in found:
        same(each, wanted)


def test_each_backend_has_its_sampler() -> None:
    assert isinstance(SAMPLERS[1], NativeSampler)
    assert isinstance(make_sampler(ReferenceOps()), NumpySampler)
    assert OWN_FIELDS.size + PARAMS_FIELDS.size == _native.SAMPLE_ROW_BYTES


def test_params_may_come_and_go() -> None:
    """The sampler knows params by their identity, so it must hold them as long as it does."""
    logits = np.zeros((1, 50), np.float32)
    for seed in range(300):
        biased = SamplingParams(logit_bias={seed % 50: 1.0}, seed=MAX_SEED)
        assert SAMPLERS[1].sample(logits, [SampleRow(0, biased, 0, 1, [1], 1)])[0].token_id == seed % 50


BAD_FIELDS: dict[str, tuple[float, ...]] = {
    "row": (-1, 3, 2**62),
    "position": (-1,),
    "history": (-1, 2, 2**62),
    "completion": (-1, 5, 2**62),
    "history_end": (0, 13, 2**62),
    "forbidden": (-1, 6),
    "forbidden_end": (2, 13),
    "bias": (-1, 2),
    "bias_end": (-1, 5),  # of four biases
    "mask": (-2, 6, 2**62),  # three bytes of eight
    "given": (-2, 19, 2**40),
    "scale": (-1.0, math.nan, math.inf),
    "presence": (math.nan, math.inf),
    "frequency": (math.nan, -math.inf),
    "top_p": (0, 2**53 + 1, 2**64 - 1),
    "top_k": (-1,),
    "min_weight": (-1, 2**40 + 1),
    "repetition": (0.0, -1.0, math.nan, math.inf),
    "num_top": (-2, 4, 2**31 - 1),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in BAD_FIELDS for value in BAD_FIELDS[name]])
def test_a_packed_field_that_does_not_fit_is_refused(name: str, value: float) -> None:
    good = {key: make() for key, make in GOOD_SAMPLE.items()}
    core: Any = _native.Sampler(POOL)
    core.sample(**good)
    assert good["chosen"].tolist() == [0, 0, 0]
    rows = sample_row() + sample_row(**{name: value}) + sample_row()
    with pytest.raises(ValueError, match="Sampler"):
        core.sample(**good | {"rows": np.frombuffer(rows, np.uint8).reshape(3, -1)})


@pytest.mark.parametrize("name", GOOD_SAMPLE)
def test_arrays_that_do_not_fit_are_refused(name: str) -> None:
    good = {key: make() for key, make in GOOD_SAMPLE.items()}
    array: np.ndarray[Any, Any] = good[name]
    core: Any = _native.Sampler(POOL)
    wrong = [None, array.astype(np.float64), array[None], array.tolist()]
    if name not in ("ids", "biases", "masks", "logits"):  # these may have any length
        wrong += [array[:2], array[:0]]
    if array.ndim > 1:
        wrong += [np.asfortranarray(array) if array.shape[1] > 1 else None, array[:, :1]]
    if name in ("chosen", "totals", "top_ids", "top_logits", "highest_and_own"):
        wrong.append(array.copy())
        wrong[-1].flags.writeable = False
    if name == "logits":
        wrong += [array[:0], np.zeros((3, 0), np.float32)]
    if name == "ids":
        wrong += [array[:3], array + 8, array - 1]
    if array.dtype.itemsize > 1:
        wrong.append(np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape))
    for value in wrong:
        if name == "logits" and isinstance(value, np.ndarray) and value.shape == (3, 1):
            continue  # a vocabulary of one token, outside which the ids are
        with pytest.raises((TypeError, ValueError)):
            core.sample(**good | {name: value})


def test_argmax_is_that_of_numpy() -> None:
    rng = np.random.default_rng(8)
    core = _native.Sampler(POOL)
    for vocab_size in (1, 5, 64, 1023, 1024, 5000):
        logits = np.round(rng.normal(0, 2, (7, vocab_size))).astype(np.float32)
        rows = rng.integers(0, 7, 9, dtype=np.int32)
        out = np.empty(9, np.int32)
        core.argmax(logits, rows, out)
        np.testing.assert_array_equal(out, logits[rows].argmax(axis=1))
    for bad in (-1, 7, 2**31 - 1):
        with pytest.raises(ValueError, match="outside the logits"):
            core.argmax(logits, np.array([0, bad], np.int32), np.empty(2, np.int32))
