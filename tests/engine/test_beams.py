"""Beam search, against one that is written down plainly: each beam is computed anew, without any cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from kvik.config import EngineConfig, SamplingParams
from kvik.engine.beams import Beam, search_beams
from kvik.engine.engine import Engine
from kvik.engine.events import StepEvent
from kvik.engine.llm import LLM
from kvik.errors import CacheTooSmall, InvalidInput, PromptTooLong, StepFailed
from kvik.models.loader import LoadedModel
from models import assert_idle, random_prompt, run, tiny_model
from runners import failing, watched_engine
from sequences import new_sequence


@dataclass
class Plain:
    token_ids: list[int]
    logprob: float
    reason: str
    penalty: float

    @property
    def score(self) -> float:
        return float(self.logprob / len(self.token_ids) ** self.penalty)


class PlainSearch:
    """Beams one by one; next tokens by a forward pass over all tokens of the beam."""

    def __init__(self, model: LoadedModel, prompt: list[int]) -> None:
        self.engine = Engine(model, EngineConfig(prefix_cache=False))
        self.prompt = prompt
        self.ends = model.tokenizer.eos_token_ids
        self.known: dict[tuple[int, ...], list[tuple[int, float]]] = {}

    def following(self, token_ids: list[int]) -> list[tuple[int, float]]:
        """All next tokens, the likeliest first."""
        key = tuple(token_ids)
        if key not in self.known:
            params = SamplingParams(max_tokens=1, ignore_eos=True)
            row = run(self.engine, [*self.prompt, *token_ids], params, use_cache=False).logits[0].astype(np.float32)
            below = (row - row.max()).astype(np.float64)
            total = math.log(np.exp(below).sum())
            order = np.argsort(-row, kind="stable")
            self.known[key] = [(int(token_id), float(below[token_id]) - total) for token_id in order]
        return self.known[key]

    def search(self, width: int, most: int, penalty: float) -> list[Plain]:
        beams, found = [Plain([], 0.0, "", penalty)], list[Plain]()
        for _ in range(most):
            candidates = [
                Plain([*beam.token_ids, token_id], beam.logprob + logprob, "", penalty)
                for beam in beams
                for token_id, logprob in self.following(beam.token_ids)
            ]
            candidates.sort(key=lambda each: -each.logprob)
            beams = []
            for each in candidates[: 2 * width]:
                if each.token_ids[-1] in self.ends:
                    each.reason = "stop"
                    found.append(each)
                elif len(beams) < width:
                    beams.append(each)
            if not beams:
                break
        for beam in beams:
            beam.reason = "length"
        return sorted(found + beams, key=lambda each: -each.score)[:width]


def assert_equal(found: list[Beam], wanted: list[Plain]) -> None:
    assert [beam.token_ids for beam in found] == [each.token_ids for each in wanted]
    assert [beam.finish_reason for beam in found] == [each.reason for each in wanted]
    np.testing.assert_allclose([beam.logprob for beam in found], [each.logprob for each in wanted], atol=1e-5)
    np.testing.assert_allclose([beam.score for beam in found], [each.score for each in wanted], atol=1e-5)


@pytest.fixture(scope="module")
def plain(tiny: LoadedModel) -> PlainSearch:
    return PlainSearch(tiny, random_prompt(tiny, 60, seed=41))


@pytest.mark.parametrize("token_budget", [3, 512])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5, -1])
@pytest.mark.parametrize(("width", "most"), [(1, 10), (2, 12), (4, 9), (10, 6), (3, 1), (4, 40)])
def test_beams_are_those_of_the_plain_search(
    plain: PlainSearch, width: int, most: int, penalty: float, token_budget: int
) -> None:
    engine = Engine(plain.engine.model, EngineConfig(token_budget=token_budget))
    found = search_beams(engine, plain.prompt, width=width, max_tokens=most, length_penalty=penalty)
    assert_equal(found, plain.search(width, most, penalty))
    assert all(beam.text == engine.model.tokenizer.decode(beam.token_ids) for beam in found)
    assert_idle(engine)
    assert not engine.cache.holds


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 3, -1])
def test_ends_of_text_leave_the_search(tmp_path: Path, seed: int, penalty: float) -> None:
    """The end is a token that comes early in some beam, so that others go on without it."""
    model = tiny_model(tmp_path, seed=5)
    prompt = random_prompt(model, 20, seed=seed)
    first = PlainSearch(model, prompt).search(4, 4, 1.0)
    eos = first[seed % 4].token_ids[seed % 3 + 1]
    model = tiny_model(tmp_path, seed=5, extra_metadata={"tokenizer.ggml.eos_token_id": eos})
    plain, engine = PlainSearch(model, prompt), Engine(model)
    assert eos in plain.ends
    for width in (1, 2, 4):
        found = search_beams(engine, prompt, width=width, max_tokens=12, length_penalty=penalty)
        assert_equal(found, plain.search(width, 12, penalty))
        for beam in found:
            assert (beam.token_ids[-1] in plain.ends) == (beam.finish_reason == "stop"), f"seed {seed}"
            written = beam.token_ids[:-1] if beam.finish_reason == "stop" else beam.token_ids
            assert beam.text == model.tokenizer.decode(written)
        assert_idle(engine)


def test_what_beams_have_in_common_is_computed_once(tiny: LoadedModel) -> None:
    prompt, engine, computed = random_prompt(tiny, 100, seed=42), Engine(tiny), 0

    def count(event: StepEvent) -> None:
        nonlocal computed
        if event.batch is not None:
            computed += len(event.batch.arrays.token_ids)

    engine.add_observer(count)
    search_beams(engine, prompt, width=4, max_tokens=10, length_penalty=1.0)
    assert computed == 100 + 4 * 9
    assert_idle(engine)


def test_one_beam_is_greedy(llm: LLM) -> None:
    (beam,) = llm.beam_search("Once upon a time", width=1, max_tokens=8)
    greedy = llm.generate("Once upon a time", SamplingParams(max_tokens=8))[0]
    assert beam.token_ids == greedy.token_ids
    assert beam.text == greedy.text


def test_the_end_of_the_context_ends_a_search(tiny: LoadedModel) -> None:
    engine = Engine(tiny)
    found = search_beams(engine, random_prompt(tiny, 508, seed=43), width=2, max_tokens=50, length_penalty=1.0)
    assert [len(beam.token_ids) for beam in found] == [4, 4]
    assert_idle(engine)


def test_too_little_room_for_all_beams_changes_nothing(tiny: LoadedModel) -> None:
    """Parked beams lose their blocks to each other, and are computed again."""
    prompt = random_prompt(tiny, 200, seed=44)
    wanted = search_beams(Engine(tiny), prompt, width=10, max_tokens=20, length_penalty=1.0)
    engine = Engine(tiny, EngineConfig(kv_memory=8 * Engine(tiny).kv_spec.block_bytes))
    assert search_beams(engine, prompt, width=10, max_tokens=20, length_penalty=1.0) == wanted
    assert_idle(engine)


def test_requests_beside_a_search_are_served(tiny: LoadedModel) -> None:
    engine = Engine(tiny)
    other = new_sequence(engine, random_prompt(tiny, 30, seed=45), SamplingParams(max_tokens=6, ignore_eos=True))
    engine.add(other)
    search_beams(engine, random_prompt(tiny, 20, seed=46), width=2, max_tokens=10, length_penalty=1.0)
    assert other.finish_reason == "length"
    assert_idle(engine)


@pytest.mark.parametrize("width", [0, 11, -1, 2.0, True, None, "4"])
def test_other_widths_are_refused(llm: LLM, width: int) -> None:
    with pytest.raises(InvalidInput, match="width is") as caught:
        llm.beam_search("a", width=width)
    assert "from 1 to 10" in caught.value.hint
    assert_idle(llm.engine)


@pytest.mark.parametrize("penalty", [math.nan, math.inf, 11, -10.5, None, "1", True])
def test_other_penalties_are_refused(llm: LLM, penalty: float) -> None:
    with pytest.raises(InvalidInput, match="length_penalty is"):
        llm.beam_search("a", length_penalty=penalty)


def test_what_the_engine_refuses_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidInput, match="max_tokens"):
        llm.beam_search("a", max_tokens=0)
    with pytest.raises(PromptTooLong):
        llm.beam_search([5] * 600)
    with pytest.raises(InvalidInput, match="empty"):
        llm.beam_search([])
    llm = LLM(llm.model.path, threads=1, kv_memory=8 * llm.engine.kv_spec.block_bytes)
    with pytest.raises(CacheTooSmall):
        llm.beam_search([5] * 200, max_tokens=100)
    assert_idle(llm.engine)


def test_an_exception_in_a_step_leaves_nothing_behind(tiny: LoadedModel) -> None:
    (engine, runner), prompt = watched_engine(tiny), random_prompt(tiny, 40, seed=47)
    runner.before = failing(ZeroDivisionError(), after=3)
    with pytest.raises(StepFailed, match="ZeroDivisionError"):
        search_beams(engine, prompt, width=3, max_tokens=10, length_penalty=1.0)
    assert_idle(engine)
    wanted = search_beams(Engine(tiny), prompt, width=3, max_tokens=10, length_penalty=1.0)
    assert search_beams(engine, prompt, width=3, max_tokens=10, length_penalty=1.0) == wanted
