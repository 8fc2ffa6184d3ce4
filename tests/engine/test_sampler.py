"""Choosing a token: each setting by its formula, and draws that depend on (seed, position) alone."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvik.config import MAX_SEED, SamplingParams
from kvik.engine import sampler_reference
from kvik.engine.output import TokenLogprobs
from kvik.engine.sampler import NumpySampler, SampleRow
from kvik.engine.sampler_reference import adjust, token_logprobs, uniform, weights_of
from kvik.engine.sampling import LOG2_E, WEIGHT_ONE, WHOLE_MASS, DrawSettings
from models import FloatArray

VOCAB = 50


def row_of(
    prompt: SequenceOf[int] = (1, 2, 3),
    completion: SequenceOf[int] = (),
    *,
    index: int = 0,
    seed: int = 0,
    forbidden: SequenceOf[int] = (),
    mask: bytes | None = None,
    **params: Any,
) -> SampleRow:
    tokens = [*prompt, *completion]
    return SampleRow(index, SamplingParams(**params), seed, len(tokens), tokens, len(prompt), forbidden, mask)


def draw(logits: FloatArray, row: SampleRow) -> int:
    """Without penalties."""
    return sampler_reference.draw(logits, row.params, row.seed, row.position)


def random_logits(seed: int, std: float = 3.0) -> FloatArray:
    return np.random.default_rng(seed).normal(0, std, VOCAB).astype(np.float32)


def sample(rows: FloatArray, sampled_with: SequenceOf[SampleRow]) -> list[int]:
    """One token for each row."""
    return [sampled.token_id for sampled in NumpySampler().sample(rows, sampled_with)]


def logprobs_of(logits: FloatArray, row: SampleRow) -> TokenLogprobs | None:
    (sampled,) = NumpySampler().sample(logits[None], [row])
    return sampled.logprobs


def slow_probabilities(logits: FloatArray, params: SamplingParams) -> dict[int, float]:
    """Temperature, top_k, top_p, min_p, one token after the other; what is left, in the order of draws, sums to 1."""
    most = max(float(logit) for logit in logits)
    weights = {token: math.exp((float(logit) - most) / params.temperature) for token, logit in enumerate(logits)}
    ranked = sorted(weights, key=lambda token: (-weights[token], token))
    if params.top_k > 0:
        ranked = ranked[: params.top_k]
    total = sum(weights[token] for token in ranked)
    kept, mass = [], 0.0
    for token in ranked:  # the smallest set whose probability reaches top_p
        if mass >= params.top_p * total:
            break
        kept.append(token)
        mass += weights[token]
    kept = [token for token in kept if weights[token] >= params.min_p * weights[ranked[0]]]
    if not is_filtered(params, len(logits)):
        kept.sort()
    total = sum(weights[token] for token in kept)
    return {token: weights[token] / total for token in kept}


def is_filtered(params: SamplingParams, vocab_size: int) -> bool:
    return 0 < params.top_k < vocab_size or params.top_p < 1.0 or params.min_p > 0.0


def plain_draw(logits: FloatArray, row: SampleRow) -> int:
    """The definition, one token after the other: sort the whole vocabulary, filter, add up, look up."""
    params, settings = row.params, DrawSettings.of(row.params)
    weights: list[int] = weights_of(logits, float(logits.max()), settings.scale).tolist()
    order = list(range(len(logits)))
    if is_filtered(params, len(logits)):
        order.sort(key=lambda token: (-float(logits[token]), token))
    if params.top_k:
        order = order[: params.top_k]
    total, mass, kept = sum(weights[token] for token in order), 0, []
    for token in order:
        if params.top_p < 1.0 and mass * WHOLE_MASS >= settings.top_p * total:
            break
        kept.append(token)
        mass += weights[token]
    kept = [token for token in kept if weights[token] >= settings.min_weight]
    total, mass = sum(weights[token] for token in kept), 0
    target = int(uniform(row.seed, row.position) * WHOLE_MASS) * total // WHOLE_MASS
    for token in kept:
        mass += weights[token]
        if mass > target:
            return token
    raise AssertionError("the uniform number is below 1")


FILTERS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 50.0},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 1.0, "top_k": VOCAB + 5},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 2.0, "top_p": 0.3},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 0.7, "top_k": 3, "top_p": 0.5, "min_p": 0.9},
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_each_token_is_drawn_as_often_as_its_probability_says(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], seed: int
) -> None:
    """Over an even grid of the uniform number, which needs no luck: counts are right to one or two."""
    logits, count = random_logits(seed), 2000
    row = row_of(**options)
    counts = np.zeros(VOCAB)
    for index in range(count):
        monkeypatch.setattr(sampler_reference, "uniform", lambda *_, value=(index + 0.5) / count: value)
        counts[draw(logits, row)] += 1
    wanted = slow_probabilities(logits, row.params)
    assert set(np.flatnonzero(counts)) <= wanted.keys()
    for token, probability in wanted.items():
        assert abs(counts[token] - probability * count) <= 2


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_the_ends_of_the_uniform_number_are_tokens_that_were_kept(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    logits = random_logits(3)
    row = row_of(**options)
    kept = list(slow_probabilities(logits, row.params))
    for value, token in ((0.0, kept[0]), (math.nextafter(1.0, 0.0), kept[-1])):
        monkeypatch.setattr(sampler_reference, "uniform", lambda *_, value=value: value)
        assert draw(logits, row) == token


def rows_of(kind: str, vocab_size: int, rng: np.random.Generator) -> FloatArray:
    """One row of logits: like a model's, flat, full of equals, mostly impossible, or huge."""
    logits: npt.NDArray[Any] = rng.normal(0, 2, vocab_size)
    if kind == "peaked":
        logits[rng.integers(0, vocab_size, 5)] += 12
    if kind == "equals":
        logits = np.round(logits)
    if kind == "two values":
        logits = rng.integers(0, 2, vocab_size)
    if kind == "impossible":
        logits[rng.random(vocab_size) < 0.9] = -np.inf
        logits[rng.integers(vocab_size)] = 0.0
    if kind == "huge":
        logits *= 1e37
    return logits.astype(np.float32)


@pytest.mark.parametrize("vocab_size", [1, 2, 50, 513, 5000])
@pytest.mark.parametrize("kind", ["flat", "peaked", "equals", "two values", "impossible", "huge"])
@pytest.mark.parametrize("seed", [20240])
def test_a_draw_is_that_of_the_full_stable_sort(kind: str, vocab_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(60 if vocab_size < 5000 else 6):
        logits = rows_of(kind, vocab_size, rng)
        options: dict[str, Any] = {"temperature": float(rng.choice([5e-324, 1e-3, 0.7, 1.0, 3.0, 100.0]))}
        if rng.random() < 0.4:
            options["top_k"] = int(rng.choice([1, 2, 5, 40, 64, 1000, vocab_size, vocab_size + 1]))
        if rng.random() < 0.5:
            options["top_p"] = float(rng.choice([5e-324, 0.01, 0.5, 0.9, 0.999, 1 - 1e-12]))
        if rng.random() < 0.3:
            options["min_p"] = float(rng.choice([5e-324, 1e-3, 0.1, 1.0]))
        for own_seed in range(3):
            row = row_of(seed=own_seed, **options)
            assert draw(logits, row) == plain_draw(logits, row), (options, own_seed)


@pytest.mark.parametrize("options", [{}, {"top_k": 40}, {"top_p": 0.999999}, {"min_p": 1e-300}], ids=str)
def test_what_is_impossible_is_never_drawn(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """At both ends of the uniform number, with impossible tokens at both ends of the vocabulary."""
    logits = np.full(3000, -np.inf, np.float32)
    logits[[700, 1500, 2100]] = [0.3, 1.0, 0.2]
    row = row_of(temperature=0.9, **options)
    drawn = set()
    for value in (0.0, 5e-324, 0.3, 0.5, 0.7, math.nextafter(1.0, 0.0)):
        monkeypatch.setattr(sampler_reference, "uniform", lambda *_, value=value: value)
        drawn.add(draw(logits, row))
    assert drawn == {700, 1500, 2100}


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}], ids=str)
def test_where_nothing_is_allowed_there_is_no_token(options: dict[str, Any]) -> None:
    for row in (row_of(mask=bytes(7), logprobs=3, **options), row_of(forbidden=range(VOCAB), **options)):
        (sampled,) = NumpySampler().sample(random_logits(1)[None], [row])
        assert (sampled.token_id, sampled.logprobs) == (-1, None)


def test_only_what_the_mask_allows_is_chosen() -> None:
    """And of its bits, the lowest of a byte is the first token."""
    logits = np.zeros(VOCAB, np.float32)
    logits[[3, 12]] = 5.0
    allowed = {8, 12, 13, 49}
    mask = sum(1 << token for token in allowed).to_bytes(7, "little")
    assert sample(logits[None], [row_of(mask=mask)]) == [12]
    drawn = {sample(logits[None], [row_of(mask=mask, seed=seed, temperature=4.0)])[0] for seed in range(60)}
    assert drawn == allowed


def test_a_bias_is_added_behind_the_penalties() -> None:
    logits = random_logits(16)
    adjusted = adjust(logits, row_of([4], repetition_penalty=2.0, logit_bias={4: 1.5, 7: -100}))
    assert adjusted[4] == pytest.approx((logits[4] / 2 if logits[4] > 0 else logits[4] * 2) + 1.5)
    assert adjusted[7] == logits[7] - np.float32(100)
    assert sample(logits[None], [row_of(logit_bias={9: 100.0})]) == [9]


@pytest.mark.parametrize("temperature", [0.1, 0.8, 1.0, 10.0])
def test_weights_are_those_of_the_softmax(temperature: float) -> None:
    logits = random_logits(17, 5.0)
    highest = float(logits.max())
    weights = weights_of(logits, highest, LOG2_E / temperature) / WEIGHT_ONE
    wanted = np.exp((logits.astype(np.float64) - highest) / temperature)
    np.testing.assert_allclose(weights, wanted, rtol=2e-7, atol=0.5 / WEIGHT_ONE)
    assert weights[logits.argmax()] == 1.0


@pytest.mark.parametrize("options", [{}, {"top_p": 0.95}, {"top_k": 30}, {"min_p": 0.01}], ids=str)
@pytest.mark.parametrize("seed", [77, MAX_SEED])
def test_draws_over_positions_are_as_frequent_as_probable(options: dict[str, Any], seed: int) -> None:
    """A chi-square test with the real generator."""
    count = 4000
    logits = random_logits(15, 1.0)
    counts = np.zeros(VOCAB)
    for position in range(1, count + 1):
        counts[draw(logits, row_of([0] * position, seed=seed, temperature=1.0, **options))] += 1
    wanted = slow_probabilities(logits, SamplingParams(temperature=1.0, **options))
    assert set(np.flatnonzero(counts)) <= wanted.keys()
    chi_square = sum((counts[token] - count * chance) ** 2 / (count * chance) for token, chance in wanted.items())
    freedom = len(wanted) - 1
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom), "four standard deviations; the draws never change"


def test_temperature_zero_takes_the_lowest_of_the_most_likely() -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[[7, 11, 30]] = 2.5
    assert draw(logits, row_of()) == 7
    assert draw(-logits, row_of()) == 0


def test_of_equals_the_lowest_ids_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    row = row_of(temperature=1.0, top_k=2)
    drawn = set()
    for value in (0.0, 0.4, 0.6, 0.99):
        monkeypatch.setattr(sampler_reference, "uniform", lambda *_, value=value: value)
        drawn.add(draw(np.zeros(VOCAB, np.float32), row))
    assert drawn == {0, 1}


@pytest.mark.parametrize("seed", [0, 1, 2**32, MAX_SEED])
def test_a_draw_depends_on_seed_and_position_alone(seed: int) -> None:
    logits = random_logits(4)

    def draws(prompt: SequenceOf[int], completion: SequenceOf[int], own_seed: int) -> int:
        return draw(logits, row_of(prompt, completion, seed=own_seed, temperature=1.0))

    for length in range(2, 20):
        wanted = draws(range(length), (), seed)
        assert draws([9] * (length - 1), [3], seed) == wanted
    others = [[draws(range(n), (), other) for n in range(1, 30)] for other in (seed, (seed + 1) % MAX_SEED)]
    assert others[0] != others[1]


def test_uniform_numbers_are_in_range_and_all_different() -> None:
    values = [uniform(seed, position) for seed in (0, 1, 77, MAX_SEED) for position in range(2000)]
    assert all(0.0 <= value < 1.0 for value in values)
    assert len(set(values)) == len(values)
    histogram, _ = np.histogram(values, bins=10, range=(0, 1))
    assert abs(histogram - 800).max() < 4 * math.sqrt(800)  # four standard deviations; the numbers never change
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.05


def test_uniform_numbers_are_the_same_in_every_version() -> None:
    """A seed that someone wrote down repeats its text."""
    golden = {
        (0, 0): 0.011546754286331562,
        (1, 0): 0.3035680343067586,
        (1, 1): 0.9002684531124185,
        (MAX_SEED, 2**31): 0.4927357250286325,
    }
    assert {arguments: uniform(*arguments) for arguments in golden} == golden


def test_repetition_penalty_divides_what_is_above_zero_and_multiplies_the_rest() -> None:
    logits = random_logits(5)
    row = row_of([4, 5, 5, 6], [7, 4], repetition_penalty=1.5)
    wanted = logits.copy()
    for token in (4, 5, 6, 7):  # once each, in prompt or completion
        wanted[token] = wanted[token] / np.float32(1.5) if wanted[token] > 0 else wanted[token] * np.float32(1.5)
    np.testing.assert_array_equal(adjust(logits, row), wanted)
    assert (wanted[[4, 5, 6, 7]] < logits[[4, 5, 6, 7]]).all()


@pytest.mark.parametrize(("presence", "frequency"), [(0.5, 0.0), (0.0, 0.25), (1.5, -0.5), (-2.0, 2.0)])
def test_presence_and_frequency_count_the_completion_alone(presence: float, frequency: float) -> None:
    logits = random_logits(6)
    row = row_of([1, 2], [7, 8, 7, 7], presence_penalty=presence, frequency_penalty=frequency)
    wanted = logits.copy()
    for token, count in ((7, 3), (8, 1)):
        wanted[token] -= np.float32(presence + frequency * count)
    np.testing.assert_array_equal(adjust(logits, row), wanted)


def test_penalties_together_and_before_the_first_token() -> None:
    logits = random_logits(7)
    options: dict[str, Any] = {"repetition_penalty": 2.0, "presence_penalty": 1.0, "frequency_penalty": 0.5}
    adjusted = adjust(logits, row_of([3], [9], **options))
    for token, seen in ((3, 0), (9, 1)):
        repeated = logits[token] / 2 if logits[token] > 0 else logits[token] * 2
        assert adjusted[token] == pytest.approx(repeated - 1.5 * seen)
    untouched = [token for token in range(VOCAB) if token not in (3, 9)]
    np.testing.assert_array_equal(adjusted[untouched], logits[untouched])
    first = adjust(logits, row_of([3], [], presence_penalty=1.0))
    np.testing.assert_array_equal(first, logits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forbidden_tokens_are_never_chosen(temperature: float) -> None:
    logits = random_logits(8)
    logits[[10, 20]] = 30.0
    for forbidden in ((), (10,), (10, 20)):
        (token_id,) = sample(logits[None], [row_of(forbidden=forbidden, temperature=temperature)])
        assert token_id not in forbidden
        assert (token_id in (10, 20)) == (len(forbidden) < 2)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 0.01},
        {"repetition_penalty": 100.0},
        {"temperature": 5e-324},
        {"temperature": 1e-30},
        {"temperature": 100.0},
        {"temperature": 1.0, "top_p": 5e-324},
        {"temperature": 1.0, "min_p": 1.0},
        {"presence_penalty": -100.0, "frequency_penalty": -100.0},
        {"temperature": 1.0, "repetition_penalty": 0.01},
    ],
    ids=str,
)
def test_every_accepted_value_chooses_a_token_without_a_warning(options: dict[str, Any]) -> None:
    for std in (0.0, 3.0, 1e4):
        row = row_of(range(10), [11, 12, 12], **options)
        (token,) = sample(random_logits(9, std)[None], [row])
        assert 0 <= token < VOCAB


def test_logits_are_left_alone() -> None:
    logits = random_logits(10)
    before = logits.copy()
    options: dict[str, Any] = {
        "repetition_penalty": 2.0,
        "presence_penalty": 1.0,
        "logit_bias": {3: 1.0},
        "temperature": 1.0,
        "logprobs": 3,
    }
    sample(logits[None], [row_of(forbidden=[4], mask=bytes(range(7)), **options)])
    np.testing.assert_array_equal(logits, before)


def test_each_row_goes_to_its_own_params() -> None:
    logits = np.stack([random_logits(seed) for seed in range(3)])
    rows = [row_of(index=0), row_of(index=1, temperature=1.0), row_of(index=1, repetition_penalty=3.0)]
    assert sample(logits, rows) == [sample(logits, [row])[0] for row in rows]
    assert sample(np.zeros((0, VOCAB), np.float32), []) == []


@pytest.mark.parametrize("seed", [5, 6])
def test_a_token_depends_neither_on_the_other_rows_nor_on_their_order(seed: int) -> None:
    count = 16
    rng = np.random.default_rng(seed)
    rows = rng.normal(0, 3, (count, 2000)).astype(np.float32)
    choices = [*FILTERS, {}, {"repetition_penalty": 1.3}, {"logprobs": 3}]

    def with_index(order: SequenceOf[int]) -> list[SampleRow]:
        return [
            row_of([1] * (i + 1), [2, 3], index=index, seed=i, **choices[i % len(choices)])
            for index, i in enumerate(order)
        ]

    alone = [sample(rows[[i]], with_index([i]))[0] for i in range(count)]
    for _ in range(5):
        order = rng.permutation(count)[: rng.integers(1, count + 1)].tolist()
        assert sample(rows[order], with_index(order)) == [alone[i] for i in order]


@pytest.mark.parametrize("vocab_size", [1, 7, 64, 1000, 49152])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_no_number_is_found_whatever_its_place(vocab_size: int, bad: float) -> None:
    rng = np.random.default_rng(vocab_size)
    for place in {0, vocab_size - 1, *rng.integers(0, vocab_size, 20).tolist()}:
        rows = rng.normal(0, 3, (3, vocab_size)).astype(np.float32)
        rows[1, place] = bad
        rows[2, : vocab_size - 1] = -np.inf
        assert sample(rows, [row_of(index=i, temperature=i / 2) for i in range(3)])[::2] == [
            int(rows[0].argmax()),
            vocab_size - 1,
        ]
        assert sample(rows, [row_of(index=1, temperature=temperature) for temperature in (0.0, 1.0)]) == [-1, -1]
    both = np.full((2, vocab_size), -np.inf, np.float32)
    both[1, :] = np.inf
    both[1, 0] = math.nan
    assert sample(both, [row_of(index=i) for i in range(2)]) == [-1, -1]
    assert all(math.isnan(entry.logprob) for entry in NumpySampler().prompt_logprobs(both, [0, 0], 2))


def test_a_penalty_does_not_carry_a_logit_beyond_float32() -> None:
    logits = np.array([3e38, -3e38, 1.0, 2e38], np.float32)
    for temperature in (0.0, 1.0):
        row = row_of([0, 1, 3], repetition_penalty=0.01, temperature=temperature)
        adjusted = adjust(logits, row)
        assert np.isfinite(adjusted).all()
        assert draw(adjusted, row) in (0, 3)
    assert adjust(logits, row_of([1], repetition_penalty=100.0))[1] == -np.inf


@pytest.mark.parametrize("std", [0.0, 3.0, 100.0])
def test_logprobs_are_a_log_softmax(std: float) -> None:
    logits = random_logits(11, std)
    entry = token_logprobs(logits, 17, VOCAB)
    assert sum(math.exp(value) for value in entry.top.values()) == pytest.approx(1.0)
    assert entry.token_id == 17
    assert entry.logprob == entry.top[17]
    assert list(entry.top.values()) == sorted(entry.top.values(), reverse=True)
    for token in (0, 17, VOCAB - 1):
        assert entry.top[token] - entry.top[5] == pytest.approx(float(logits[token] - logits[5]), abs=1e-4)


def test_logprobs_are_raw_and_as_many_as_asked_for() -> None:
    logits = random_logits(12)
    options: dict[str, Any] = {"repetition_penalty": 5.0, "temperature": 2.0, "top_k": 3}
    for count in (0, 1, 20):
        entry = logprobs_of(logits, row_of(forbidden=[int(logits.argmax())], logprobs=count, **options))
        assert entry is not None
        token = entry.token_id
        assert token != int(logits.argmax())
        raw = token_logprobs(logits, token, VOCAB)
        assert entry.logprob == raw.top[token]
        assert list(entry.top.items()) == list(raw.top.items())[:count]


def test_without_the_wish_no_logprobs_are_kept() -> None:
    assert logprobs_of(random_logits(13), row_of()) is None


@pytest.mark.parametrize("kind", ["flat", "peaked", "equals", "two values", "impossible"])
@pytest.mark.parametrize("vocab_size", [1, 30, 5000])
@pytest.mark.parametrize("seed", [31])
def test_top_logprobs_are_those_of_the_full_stable_sort(kind: str, vocab_size: int, seed: int) -> None:
    logits = rows_of(kind, vocab_size, np.random.default_rng(seed))
    order = np.argsort(-logits, kind="stable")
    with np.errstate(divide="ignore"):
        wanted = np.log(np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum())
    for num_top in (0, 1, 5, 20):
        entry = token_logprobs(logits, vocab_size // 2, num_top)
        assert list(entry.top) == order[:num_top].tolist()
        assert list(entry.top.values()) == pytest.approx(wanted[order[:num_top]].tolist())
        assert entry.logprob == pytest.approx(wanted[vocab_size // 2])


def test_logprobs_of_a_prompt_are_those_of_its_rows() -> None:
    rng = np.random.default_rng(2)
    rows = rng.normal(0, 3, (9, 3000)).astype(np.float32)
    next_ids = rng.integers(0, 3000, 9).tolist()
    sampler = NumpySampler()
    entries = sampler.prompt_logprobs(rows, next_ids, 4)
    assert entries == [token_logprobs(row, token_id, 4) for row, token_id in zip(rows, next_ids, strict=True)]
    assert sampler.prompt_logprobs(rows[3:5], next_ids[3:5], 4) == entries[3:5]
    assert sampler.prompt_logprobs(rows[:0], [], 4) == []
    with pytest.raises(ValueError, match="zip"):
        sampler.prompt_logprobs(rows, next_ids[:-1], 4)
