"""Choosing a token: each setting by its formula, and draws that depend on (seed, position) alone."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import pytest

from kvik.config import MOST_SEED, SamplingParams
from kvik.engine import sampler as sampler_module
from kvik.engine.output import TextStream
from kvik.engine.sampler import Sampler, apply_penalties, draw, token_logprobs, uniform
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
    )


def random_logits(seed: int, std: float = 3.0) -> FloatArray:
    return np.random.default_rng(seed).normal(0, std, VOCAB).astype(np.float32)


def slow_probabilities(logits: FloatArray, params: SamplingParams) -> dict[int, float]:
    """Temperature, top_k, top_p, min_p, one token after the other; what is left, most likely first, sums to 1."""
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
    total = sum(weights[token] for token in kept)
    return {token: weights[token] / total for token in kept}


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


@pytest.mark.parametrize("seed", [0, 1, 2**32, MOST_SEED])
def test_a_draw_depends_on_seed_and_position_alone(text: TextStream, seed: int) -> None:
    logits = random_logits(4)

    def draws(prompt: SequenceOf[int], completion: SequenceOf[int], own_seed: int) -> int:
        return draw(logits, sequence_of(text, prompt, completion, seed=own_seed, temperature=1.0))

    for length in range(2, 20):
        wanted = draws(range(length), (), seed)
        assert draws([9] * (length - 1), [3], seed) == wanted
    others = [[draws(range(n), (), other) for n in range(1, 30)] for other in (seed, (seed + 1) % MOST_SEED)]
    assert others[0] != others[1]


def test_uniform_numbers_are_in_range_and_all_different() -> None:
    values = [uniform(seed, position) for seed in (0, 1, 77, MOST_SEED) for position in range(2000)]
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
        (MOST_SEED, 2**31): 0.4927357250286325,
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
        assert (Sampler().sample(logits[None], [sequence])[0] in (10, 20)) == may_end


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
        (token,) = Sampler().sample(random_logits(9, std)[None], [sequence])
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
    Sampler().sample(logits[None], [sequence_of(text, stop_token_ids=[4], **options)])
    np.testing.assert_array_equal(logits, before)


def test_each_row_goes_to_its_own_sequence(text: TextStream) -> None:
    rows = np.stack([random_logits(seed) for seed in range(3)])
    sequences = [sequence_of(text), sequence_of(text, temperature=1.0), sequence_of(text, repetition_penalty=3.0)]
    alone = [Sampler().sample(row[None], [sequence])[0] for row, sequence in zip(rows, sequences, strict=True)]
    assert Sampler().sample(rows, sequences) == alone
    assert Sampler().sample(np.zeros((0, VOCAB), np.float32), []) == []


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
        (token,) = Sampler().sample(logits[None], [sequence])
        (entry,) = sequence.logprobs
        raw = token_logprobs(logits, token, VOCAB)
        assert entry.token_id == token
        assert entry.logprob == raw.top[token]
        assert list(entry.top.items()) == list(raw.top.items())[:count]


def test_without_the_wish_no_logprobs_are_kept(text: TextStream) -> None:
    sequence = sequence_of(text)
    Sampler().sample(random_logits(13)[None], [sequence])
    assert sequence.logprobs == []
