"""Completions that another engine has begun: they end as if one engine had written them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvik import LLM, SamplingParams
from kvik.engine.output import Completion
from kvik.engine.stream import collect, run_all
from kvik.errors import InvalidInput
from kvik.text.grammar import Grammar
from models import assert_idle, tiny_model

PROMPT = list(range(3, 60))


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path: Path = tiny_model(tmp_path_factory.mktemp("tiny"), seed=5, context_length=512).path
    return LLM(path, kv_memory="4MiB", threads=1)


def written_from(
    llm: LLM, params: SamplingParams, cut: int, **options: Any
) -> tuple[list[Completion], list[Completion]]:
    """What is written at once, and what is where another engine knows the first `cut` tokens of each completion."""
    engine = llm.engine
    whole = collect(engine, run_all(engine, [engine.new_sequence(engine.new_request(PROMPT, params, **options))]))
    engine.clear_cache()
    request = engine.new_request(PROMPT, params, **options)
    sequences = engine.resumed_sequences(request, [each.token_ids[: cut + at] for at, each in enumerate(whole)])
    found = collect(engine, run_all(engine, sequences))
    assert_idle(engine)
    return whole, found


@pytest.mark.parametrize("cut", [0, 1, 40, 90, 120])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=120, ignore_eos=True),
        SamplingParams(max_tokens=120, ignore_eos=True, temperature=1.0, seed=9, n=3, frequency_penalty=0.5),
        SamplingParams(max_tokens=120, ignore_eos=True, echo=True, speculate="ngram"),
    ],
    ids=["greedy", "drawn", "echo"],
)
def test_a_resumed_completion_is_the_same(llm: LLM, params: SamplingParams, cut: int) -> None:
    whole, found = written_from(llm, params, cut)
    assert [(each.text, each.token_ids, each.finish_reason) for each in found] == [
        (each.text, each.token_ids, each.finish_reason) for each in whole
    ]
    assert all(each.stats.num_cached_tokens < len(PROMPT) for each in found)


def test_a_grammar_goes_on(llm: LLM) -> None:
    constraint = llm.compile_grammar(Grammar.regex("[ab]{40}"))
    whole, found = written_from(llm, SamplingParams(max_tokens=60, temperature=1.0, seed=2), 11, constraint=constraint)
    assert found[0].text == whole[0].text


def test_what_cannot_be_resumed_is_refused(llm: LLM) -> None:
    engine = llm.engine
    params = SamplingParams(max_tokens=2, n=2, ignore_eos=True)
    request = engine.new_request(PROMPT, params)
    for written, said in (([[1]], "2 are asked for"), ([[1], [10**6]], "vocabulary"), ([[], [1, 2, 3]], "has ended")):
        with pytest.raises(InvalidInput, match=said):
            engine.resumed_sequences(request, written)
    with pytest.raises(InvalidInput, match="logprobs"):
        engine.resumed_sequences(engine.new_request(PROMPT, SamplingParams(max_tokens=4, logprobs=1)), [[1]])
