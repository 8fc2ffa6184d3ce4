"""Choosing a token: each setting by its formula, and draws that depend on (seed, position) alone."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvik.cache import BlockTable
from kvik.cache.radix import Namespace
from kvik.config import MAX_SEED, SamplingParams
from kvik.engine import sampler as sampler_module
from kvik.engine.output import TextStream
from kvik.engine.sampler import StepLogits, apply_penalties, choose, draw, prompt_logprobs, token_logprobs, uniform
from kvik.engine.sequence import Sequence
from kvik.models.loader import LoadedModel
from models import FloatArray

VOCAB = 50


@pytest.fixture
def text(tiny: LoadedModel) -> TextStream:
    return TextStream(tiny.tokenizer)


def sequence_of(
    text: TextStream,
    prompt: SequenceOf[int] = (1, 2, 3),
    completion: SequenceOf[int] = (),
    *,
    seed: int = 0,
    stop_token_ids: SequenceOf[int] = (),
    **params: Any,
) -> Sequence:
    return Sequence(
        token_ids=[*prompt, *completion],
        num_prompt_tokens=len(prompt),
        params=SamplingParams(**params),
        seed=seed,
        stop_token_ids=frozenset(stop_token_ids),
        text=text,
        table=BlockTable(Namespace("f16")),
        most_tokens=1 << 20,
    )


def random_logits(seed: int, std: float = 3.0) -> FloatArray:
    return np.random.default_rng(seed).normal(0, std, VOCAB).astype(np.float32)


def sample(rows: FloatArray, sequences: SequenceOf[Sequence]) -> list[int]:
    """One token for each row and sequence."""
    step = StepLogits(rows)
    return [choose(step, row, sequence) for row, sequence in enumerate(sequences)]


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


def plain_draw(logits: FloatArray, sequence: Sequence) -> int:
    """The definition: sort the whole vocabulary, filter, add up, look up."""
    params = sequence.params
    with np.errstate(over="ignore"):
        scaled = (logits.astype(np.float64) - float(logits.max())) / params.temperature
    order = np.argsort(-logits, kind="stable")
    if not is_filtered(params, len(logits)):
        order = np.arange(len(logits))
    if params.top_k:
        order = order[: params.top_k]
    weights = np.exp(scaled[order])
    if params.top_p < 1.0:
        mass_before = np.concatenate([[0.0], np.cumsum(weights)[:-1]])
        order = order[mass_before < params.top_p * weights.sum()]
    order = order[np.exp(scaled[order]) >= params.min_p]
    cumulative = np.cumsum(np.exp(scaled[order]))
    chosen = np.searchsorted(cumulative, uniform(sequence.seed, sequence.num_tokens) * cumulative[-1], side="right")
    return int(order[chosen])


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
    text: TextStream, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], seed: int
) -> None:
    """Over an even grid of the uniform number, which needs no luck: counts are right to one or two."""
    logits, count = random_logits(seed), 2000
    sequence = sequence_of(text, **options)
    counts = np.zeros(VOCAB)
    for index in range(count):
        monkeypatch.setattr(sampler_module, "uniform", lambda *_, value=(index + 0.5) / count: value)
        counts[draw(logits, sequence)] += 1
    wanted = slow_probabilities(logits, sequence.params)
    assert set(np.flatnonzero(counts)) <= wanted.keys()
    for token, probability in wanted.items():
        assert abs(counts[token] - probability * count) <= 2


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_the_ends_of_the_uniform_number_are_tokens_that_were_kept(
    text: TextStream, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    logits = random_logits(3)
    sequence = sequence_of(text, **options)
    kept = list(slow_probabilities(logits, sequence.params))
    for value, token in ((0.0, kept[0]), (math.nextafter(1.0, 0.0), kept[-1])):
        monkeypatch.setattr(sampler_module, "uniform", lambda *_, value=value: value)
        assert draw(logits, sequence) == token


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


@pytest.mark.parametrize("vocab_size", [1, 2, 50, 513, 5000, 49152])
@pytest.mark.parametrize("kind", ["flat", "peaked", "equals", "two values", "impossible", "huge"])
@pytest.mark.parametrize("seed", [20240])
def test_a_draw_is_that_of_the_full_stable_sort(text: TextStream, kind: str, vocab_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(60 if vocab_size <= 5000 else 12):
        logits = rows_of(kind, vocab_size, rng)
        options: dict[str, Any] = {"temperature": float(rng.choice([5e-324, 1e-3, 0.7, 1.0, 3.0, 100.0]))}
        if rng.random() < 0.4:
            options["top_k"] = int(rng.choice([1, 2, 5, 40, 64, 1000, vocab_size, vocab_size + 1]))
        if rng.random() < 0.5:
            options["top_p"] = float(rng.choice([5e-324, 0.01, 0.5, 0.9, 0.999, 1 - 1e-12]))
        if rng.random() < 0.3:
            options["min_p"] = float(rng.choice([5e-324, 1e-3, 0.1, 1.0]))
        for own_seed in range(3):
            sequence = sequence_of(text, seed=own_seed, **options)
            assert draw(logits, sequence) == plain_draw(logits, sequence), (options, own_seed)


@pytest.mark.parametrize("options", [{}, {"top_k": 40}, {"top_p": 0.999999}, {"min_p": 1e-300}], ids=str)
def test_what_is_impossible_is_never_drawn(
    text: TextStream, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """At both ends of the uniform number, with impossible tokens at both ends of the vocabulary."""
    logits = np.full(3000, -np.inf, np.float32)
    logits[[700, 1500, 2100]] = [0.3, 1.0, 0.2]
    sequence = sequence_of(text, temperature=0.9, **options)
    drawn = set()
    for value in (0.0, 5e-324, 0.3, 0.5, 0.7, math.nextafter(1.0, 0.0)):
        monkeypatch.setattr(sampler_module, "uniform", lambda *_, value=value: value)
        drawn.add(draw(logits, sequence))
    assert drawn == {700, 1500, 2100}


def test_where_rounding_leaves_nothing_the_last_possible_token_is_taken() -> None:
    """Sums in two steps may differ in the last bit from the sum in one, so a target may lie a little too high."""
    cumulative = np.cumsum([0.5, 0.25, 0.25, 0.0, 0.0])
    found = [sampler_module._first_above(cumulative, target) for target in (0.0, 0.5, 0.75, 1.0, 1.0 + 1e-15)]
    assert found == [0, 1, 2, 2, 2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_everything_is_impossible_the_first_token_is_taken(text: TextStream, temperature: float) -> None:
    logits = np.full(VOCAB, -np.inf, np.float32)
    assert draw(logits, sequence_of(text, temperature=temperature, top_p=0.5)) == 0


@pytest.mark.parametrize("options", [{}, {"top_p": 0.95}, {"top_k": 30}, {"min_p": 0.01}], ids=str)
@pytest.mark.parametrize("seed", [77, MAX_SEED])
def test_draws_over_positions_are_as_frequent_as_probable(text: TextStream, options: dict[str, Any], seed: int) -> None:
    """A chi-square test with the real generator."""
    count = 4000
    logits = random_logits(15, 1.0)
    sequence = sequence_of(text, [0], seed=seed, temperature=1.0, **options)
    counts = np.zeros(VOCAB)
    for _ in range(count):
        counts[draw(logits, sequence)] += 1
        sequence.token_ids.append(0)
    wanted = slow_probabilities(logits, sequence.params)
    assert set(np.flatnonzero(counts)) <= wanted.keys()
    chi_square = sum((counts[token] - count * chance) ** 2 / (count * chance) for token, chance in wanted.items())
    freedom = len(wanted) - 1
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom), "four standard deviations; the draws never change"


def test_temperature_zero_takes_the_lowest_of_the_most_likely(text: TextStream) -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[[7, 11, 30]] = 2.5
    assert draw(logits, sequence_of(text)) == 7
    assert draw(-logits, sequence_of(text)) == 0


def test_of_equals_the_lowest_ids_are_kept(text: TextStream, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = sequence_of(text, temperature=1.0, top_k=2)
    drawn = set()
    for value in (0.0, 0.4, 0.6, 0.99):
        monkeypatch.setattr(sampler_module, "uniform", lambda *_, value=value: value)
        drawn.add(draw(np.zeros(VOCAB, np.float32), sequence))
    assert drawn == {0, 1}


@pytest.mark.parametrize("seed", [0, 1, 2**32, MAX_SEED])
def test_a_draw_depends_on_seed_and_position_alone(text: TextStream, seed: int) -> None:
    logits = random_logits(4)

    def draws(prompt: SequenceOf[int], completion: SequenceOf[int], own_seed: int) -> int:
        return draw(logits, sequence_of(text, prompt, completion, seed=own_seed, temperature=1.0))

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


def test_repetition_penalty_divides_what_is_above_zero_and_multiplies_the_rest(text: TextStream) -> None:
    logits = random_logits(5)
    sequence = sequence_of(text, [4, 5, 5, 6], [7, 4], repetition_penalty=1.5)
    wanted = logits.copy()
    for token in (4, 5, 6, 7):  # once each, in prompt or completion
        wanted[token] = wanted[token] / np.float32(1.5) if wanted[token] > 0 else wanted[token] * np.float32(1.5)
    np.testing.assert_array_equal(apply_penalties(logits, sequence), wanted)
    assert (wanted[[4, 5, 6, 7]] < logits[[4, 5, 6, 7]]).all()


@pytest.mark.parametrize(("presence", "frequency"), [(0.5, 0.0), (0.0, 0.25), (1.5, -0.5), (-2.0, 2.0)])
def test_presence_and_frequency_count_the_completion_alone(text: TextStream, presence: float, frequency: float) -> None:
    logits = random_logits(6)
    sequence = sequence_of(text, [1, 2], [7, 8, 7, 7], presence_penalty=presence, frequency_penalty=frequency)
    wanted = logits.copy()
    for token, count in ((7, 3), (8, 1)):
        wanted[token] -= np.float32(presence + frequency * count)
    np.testing.assert_array_equal(apply_penalties(logits, sequence), wanted)


def test_penalties_together_and_before_the_first_token(text: TextStream) -> None:
    logits = random_logits(7)
    options: dict[str, Any] = {"repetition_penalty": 2.0, "presence_penalty": 1.0, "frequency_penalty": 0.5}
    adjusted = apply_penalties(logits, sequence_of(text, [3], [9], **options))
    for token, seen in ((3, 0), (9, 1)):
        repeated = logits[token] / 2 if logits[token] > 0 else logits[token] * 2
        assert adjusted[token] == pytest.approx(repeated - 1.5 * seen)
    untouched = [token for token in range(VOCAB) if token not in (3, 9)]
    np.testing.assert_array_equal(adjusted[untouched], logits[untouched])
    first = apply_penalties(logits, sequence_of(text, [3], [], presence_penalty=1.0))
    np.testing.assert_array_equal(first, logits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_end_tokens_are_forbidden_before_min_tokens(text: TextStream, temperature: float) -> None:
    logits = random_logits(8)
    logits[[10, 20]] = 30.0
    options: dict[str, Any] = {"stop_token_ids": [10, 20], "min_tokens": 2, "temperature": temperature}
    for completion, may_end in (([], False), ([4], False), ([4, 5], True), ([4, 5, 6], True)):
        sequence = sequence_of(text, [1], completion, **options)
        assert (sample(logits[None], [sequence])[0] in (10, 20)) == may_end


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
def test_every_accepted_value_chooses_a_token_without_a_warning(text: TextStream, options: dict[str, Any]) -> None:
    for std in (0.0, 3.0, 1e4):
        sequence = sequence_of(text, range(10), [11, 12, 12], **options)
        (token,) = sample(random_logits(9, std)[None], [sequence])
        assert 0 <= token < VOCAB


def test_logits_are_left_alone(text: TextStream) -> None:
    logits = random_logits(10)
    before = logits.copy()
    options: dict[str, Any] = {
        "repetition_penalty": 2.0,
        "presence_penalty": 1.0,
        "min_tokens": 5,
        "temperature": 1.0,
        "logprobs": 3,
    }
    sample(logits[None], [sequence_of(text, stop_token_ids=[4], **options)])
    np.testing.assert_array_equal(logits, before)


def test_each_row_goes_to_its_own_sequence(text: TextStream) -> None:
    rows = np.stack([random_logits(seed) for seed in range(3)])
    sequences = [sequence_of(text), sequence_of(text, temperature=1.0), sequence_of(text, repetition_penalty=3.0)]
    alone = [sample(row[None], [sequence])[0] for row, sequence in zip(rows, sequences, strict=True)]
    assert sample(rows, sequences) == alone
    assert sample(np.zeros((0, VOCAB), np.float32), []) == []


@pytest.mark.parametrize("seed", [5, 6])
def test_a_token_depends_neither_on_the_other_rows_nor_on_their_order(text: TextStream, seed: int) -> None:
    count = 16
    rng = np.random.default_rng(seed)
    rows = rng.normal(0, 3, (count, 2000)).astype(np.float32)
    choices = [*FILTERS, {}, {"repetition_penalty": 1.3}, {"logprobs": 3}]

    def sequences(order: SequenceOf[int]) -> list[Sequence]:
        return [sequence_of(text, [1] * (i + 1), [2, 3], seed=i, **choices[i % len(choices)]) for i in order]

    alone = [sample(rows[[i]], sequences([i]))[0] for i in range(count)]
    for _ in range(5):
        order = rng.permutation(count)[: rng.integers(1, count + 1)].tolist()
        assert sample(rows[order], sequences(order)) == [alone[i] for i in order]


def test_several_rows_of_one_sequence_are_drawn_as_one_after_the_other(text: TextStream) -> None:
    """As a speculative check does: each row with the tokens that the sequence has by then."""
    rows = np.stack([random_logits(seed) for seed in range(6)])
    options: dict[str, Any] = {"temperature": 1.0, "repetition_penalty": 1.5, "logprobs": 2}
    together, single = sequence_of(text, seed=3, **options), sequence_of(text, seed=3, **options)
    step = StepLogits(rows)
    for row in range(len(rows)):
        together.token_ids.append(choose(step, row, together))
        single.token_ids += sample(rows[[row]], [single])
    assert together.token_ids == single.token_ids
    assert together.logprobs == single.logprobs


@pytest.mark.parametrize("vocab_size", [1, 7, 64, 1000, 49152])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_no_number_is_found_whatever_its_place(vocab_size: int, bad: float) -> None:
    rng = np.random.default_rng(vocab_size)
    for place in {0, vocab_size - 1, *rng.integers(0, vocab_size, 20).tolist()}:
        rows = rng.normal(0, 3, (3, vocab_size)).astype(np.float32)
        rows[1, place] = bad
        rows[2, : vocab_size - 1] = -np.inf
        step = StepLogits(rows)
        assert [step.is_finite(row) for row in range(3)] == [True, False, True]
        assert step.most_likely[2] == vocab_size - 1
    both = np.full((2, vocab_size), -np.inf, np.float32)
    both[1, :] = np.inf
    both[1, 0] = math.nan
    assert not StepLogits(both).is_finite(0)
    assert not StepLogits(both).is_finite(1)


def test_a_greedy_row_is_not_copied(text: TextStream, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(14)
    assert apply_penalties(logits, sequence_of(text)) is logits
    step = StepLogits(logits[None])
    step.most_likely[0] = 31  # what was found once is not looked for again
    assert choose(step, 0, sequence_of(text)) == 31


def test_a_penalty_does_not_carry_a_logit_beyond_float32(text: TextStream) -> None:
    logits = np.array([3e38, -3e38, 1.0, 2e38], np.float32)
    for temperature in (0.0, 1.0):
        sequence = sequence_of(text, [0, 1, 3], repetition_penalty=0.01, temperature=temperature)
        adjusted = apply_penalties(logits, sequence)
        assert np.isfinite(adjusted).all()
        assert draw(adjusted, sequence) in (0, 3)
    assert apply_penalties(logits, sequence_of(text, [1], repetition_penalty=100.0))[1] == -np.inf


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


def test_logprobs_are_raw_and_as_many_as_asked_for(text: TextStream) -> None:
    logits = random_logits(12)
    options: dict[str, Any] = {"repetition_penalty": 5.0, "temperature": 2.0, "top_k": 3, "min_tokens": 2}
    for count in (0, 1, 20):
        sequence = sequence_of(text, stop_token_ids=[int(logits.argmax())], logprobs=count, **options)
        (token,) = sample(logits[None], [sequence])
        (entry,) = sequence.logprobs
        raw = token_logprobs(logits, token, VOCAB)
        assert entry.token_id == token
        assert entry.logprob == raw.top[token]
        assert list(entry.top.items()) == list(raw.top.items())[:count]


def test_without_the_wish_no_logprobs_are_kept(text: TextStream) -> None:
    sequence = sequence_of(text)
    sample(random_logits(13)[None], [sequence])
    assert sequence.logprobs == []


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
    entries = prompt_logprobs(rows, next_ids, 4)
    assert entries == [token_logprobs(row, token_id, 4) for row, token_id in zip(rows, next_ids, strict=True)]
    assert prompt_logprobs(rows[3:5], next_ids[3:5], 4) == entries[3:5]
    assert prompt_logprobs(rows[:0], [], 4) == []
    with pytest.raises(ValueError, match="zip"):
        prompt_logprobs(rows, next_ids[:-1], 4)
