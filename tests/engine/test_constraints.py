"""Completions that follow a grammar: valid by it, the same bits in any company, and each failing alone."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections.abc import Sequence as SequenceOf
from typing import Any

import jsonschema
import pytest

from constraints import CannotGoOn, RandomConstraint
from kvik.config import EngineConfig, SamplingParams
from kvik.engine import runner
from kvik.engine.async_llm import AsyncLLM
from kvik.engine.engine import Engine
from kvik.engine.llm import LLM
from kvik.engine.output import Completion, TokenLogprobs
from kvik.engine.sampler import NumpySampler
from kvik.engine.sequence import Sequence
from kvik.engine.session import Session
from kvik.errors import InvalidGrammar, InvalidInput
from kvik.models.loader import LoadedModel
from kvik.text.constraint import Constraint
from kvik.text.grammar import Grammar
from kvik.text.grammar_compiler import GrammarCompiler
from models import assert_idle, random_prompt
from sequences import new_sequence

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,8}$"}, "maxItems": 3},
        "kind": {"enum": ["poet", "mathematician", None]},
    },
    "required": ["name", "age", "tags", "kind"],
    "additionalProperties": False,
}
SCHEMAS: list[Any] = [
    PERSON,
    {
        "type": "array",
        "items": {"$ref": "#/$defs/pair"},
        "minItems": 1,
        "maxItems": 3,
        "$defs": {
            "pair": {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "number", "maximum": 99}]}
            | {"minItems": 2, "items": False}
        },
    },
    {"anyOf": [{"type": "string", "format": "date"}, {"const": {"none": []}}]},
    {"type": "object"},
]
PROMPT = "Ada Lovelace as JSON: "
PARAMS = SamplingParams(max_tokens=60, logprobs=2)


@pytest.fixture(scope="module")
def compiler(trained: LoadedModel) -> GrammarCompiler:
    return GrammarCompiler(trained.tokenizer, trained.decoder.spec.vocab_size)


@pytest.fixture(scope="module")
def person(compiler: GrammarCompiler) -> Constraint:
    return compiler.compile(Grammar.json_schema(PERSON))


def write(
    model: LoadedModel, prompt: str, params: SamplingParams, constraint: Constraint | None, **options: Any
) -> Sequence:
    """One completion on an engine of its own."""
    engine = Engine(model, EngineConfig(**options))
    token_ids = model.tokenizer.encode(prompt)
    return run_all(engine, [new_sequence(engine, token_ids, params, constraint=constraint)])[0]


def run_all(engine: Engine, sequences: SequenceOf[Sequence]) -> list[Sequence]:
    for sequence in sequences:
        engine.add(sequence)
    branches = [branch for sequence in sequences for branch in sequence.all_branches()]
    while engine.step() is not None:
        engine.scheduler.check()
    assert_idle(engine)
    return branches


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_what_ends_is_valid(trained: LoadedModel, compiler: GrammarCompiler, schema: Any, temperature: float) -> None:
    constraint = compiler.compile(Grammar.json_schema(schema))
    engine = Engine(trained)
    prompt = trained.tokenizer.encode(PROMPT)
    params = SamplingParams(n=4 if temperature else 1, temperature=temperature, seed=7, max_tokens=120)
    branches = run_all(engine, [new_sequence(engine, prompt, params, constraint=constraint)])
    for branch in branches:
        assert branch.error is None, branch.error
        if branch.finish_reason == "stop":
            jsonschema.validate(json.loads(branch.text.text), schema)
        else:
            assert len(branch.completion_ids) == 120
    assert any(branch.finish_reason == "stop" for branch in branches) or schema == {"type": "object"}


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar.regex(r"[0-9]{3}-[a-z]{2,4}"), r"[0-9]{3}-[a-z]{2,4}"),
        (Grammar.choice(["red", "redder", "blue"]), "red|redder|blue"),
        (Grammar.lark('start: "<" NAME ">" | "[" start "]"\nNAME: /[a-z]{1,5}/'), r"\[*<[a-z]{1,5}>\]*"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_other_grammars(
    trained: LoadedModel, compiler: GrammarCompiler, grammar: Grammar, pattern: str, temperature: float
) -> None:
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=100)
    found = write(trained, "A text: ", params, compiler.compile(grammar))
    assert found.finish_reason == "stop"
    assert re.fullmatch(pattern, found.text.text)


Told = tuple[list[int], list[TokenLogprobs], str | None, str]


def told(sequence: Sequence) -> Told:
    assert sequence.error is None, sequence.error
    return sequence.completion_ids, sequence.logprobs, sequence.finish_reason, sequence.text.text


def requests_of(trained: LoadedModel, compiler: GrammarCompiler) -> list[tuple[str, SamplingParams, Constraint | None]]:
    """Constrained ones in several ways, and others between them."""
    grammars = [Grammar.json_schema(schema) for schema in SCHEMAS] + [Grammar.regex("(a|b| c){3,30}"), None]
    changes = [{}, {"temperature": 1.0, "top_p": 0.9}, {"speculate": "ngram"}, {"min_tokens": 30, "ignore_eos": True}]
    changes += [{"temperature": 0.7, "repetition_penalty": 1.2, "speculate": "ngram"}]
    return [
        (
            f"{index}. {PROMPT}" + "{'name': 'Ada', 'age': 36} " * (index % 3),
            dataclasses.replace(PARAMS, seed=index, **change),  # type: ignore[arg-type]
            None if grammar is None else compiler.compile(grammar),
        )
        for index, (grammar, change) in enumerate((grammar, change) for grammar in grammars for change in changes)
    ]


@pytest.fixture(scope="module")
def wanted(trained: LoadedModel, compiler: GrammarCompiler) -> list[Told]:
    """Each alone and without drafts."""
    return [
        told(write(trained, prompt, dataclasses.replace(params, speculate=None), constraint))
        for prompt, params, constraint in requests_of(trained, compiler)
    ]


@pytest.mark.parametrize("token_budget", [3, 64, 512])
def test_company_shows_in_no_bit(
    trained: LoadedModel, compiler: GrammarCompiler, wanted: list[Told], token_budget: int
) -> None:
    engine = Engine(trained, EngineConfig(token_budget=token_budget))
    for _ in range(1 if token_budget == 3 else 2):  # the second time their prompts are cached
        sequences = [
            new_sequence(engine, trained.tokenizer.encode(prompt), params, constraint=constraint)
            for prompt, params, constraint in requests_of(trained, compiler)
        ]
        assert [told(sequence) for sequence in run_all(engine, sequences)] == wanted
    if token_budget > 3:
        assert any(sequence.costs.num_cached_tokens for sequence in sequences)
        constrained = [sequence for sequence in sequences if sequence.request.constraint is not None]
        assert sum(sequence.costs.num_accepted_tokens for sequence in constrained) > 10


def test_preemption_shows_in_no_bit(trained: LoadedModel, compiler: GrammarCompiler, wanted: list[Told]) -> None:
    engine = Engine(trained, EngineConfig(kv_memory=8 * Engine(trained).kv_spec.block_bytes, token_budget=64))
    sequences = [
        new_sequence(engine, trained.tokenizer.encode(prompt), params, constraint=constraint)
        for prompt, params, constraint in requests_of(trained, compiler)
    ]
    assert [told(sequence) for sequence in run_all(engine, sequences)] == wanted
    assert engine.scheduler.num_preemptions > 0


def test_both_samplers_choose_the_same(
    trained: LoadedModel, compiler: GrammarCompiler, wanted: list[Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "make_sampler", lambda ops: NumpySampler())
    for (prompt, params, constraint), each in list(zip(requests_of(trained, compiler), wanted, strict=True))[::3]:
        assert told(write(trained, prompt, params, constraint)) == each


def test_logprobs_are_the_models_own(trained: LoadedModel, person: Constraint) -> None:
    """Unmasked: those that the same text has as a prompt."""
    found = write(trained, PROMPT, PARAMS, person)
    engine = Engine(trained)
    params = SamplingParams(max_tokens=1, echo=True, logprobs=2)
    (echoed,) = run_all(engine, [new_sequence(engine, found.token_ids, params)])
    assert found.logprobs == echoed.prompt_logprobs[-len(found.logprobs) :]
    assert any(each.token_id not in each.top for each in found.logprobs), "the grammar never went against the model"


def test_each_of_several_completions_follows_the_grammar_by_itself(trained: LoadedModel, person: Constraint) -> None:
    engine = Engine(trained)
    params = dataclasses.replace(PARAMS, n=4, temperature=1.5, seed=20)
    token_ids = trained.tokenizer.encode(PROMPT)
    branches = run_all(engine, [new_sequence(engine, token_ids, params, constraint=person)])
    assert len({branch.text.text for branch in branches}) == 4
    for index, branch in enumerate(branches):
        alone = dataclasses.replace(params, n=1, seed=20 + index)
        assert told(branch) == told(write(trained, PROMPT, alone, person))


# Ends.


def test_a_complete_text_ends_whatever_is_ignored(trained: LoadedModel, compiler: GrammarCompiler) -> None:
    constraint = compiler.compile(Grammar.choice(["yes", "no"]))
    for params in (
        SamplingParams(),
        SamplingParams(ignore_eos=True),
        SamplingParams(min_tokens=50, max_tokens=60),
        SamplingParams(min_tokens=50, max_tokens=60, ignore_eos=True),
    ):
        found = write(trained, "Is it so?", params, constraint)
        assert found.text.text in ("yes", "no")
        assert found.finish_reason == "stop"
    found = write(trained, "Is it so?", SamplingParams(max_tokens=len(found.completion_ids)), constraint)
    assert found.finish_reason == "stop", "the text is complete, though its last token is the last there may be"


@pytest.mark.parametrize("params", [SamplingParams(max_tokens=40, min_tokens=40), SamplingParams(max_tokens=40)])
def test_no_end_comes_before_min_tokens_or_where_ends_are_ignored(
    trained: LoadedModel, compiler: GrammarCompiler, params: SamplingParams
) -> None:
    """As long as the grammar has something else."""
    constraint = compiler.compile(Grammar.regex("[a-z ]*"))
    ends = trained.tokenizer.eos_token_ids
    bias = dict.fromkeys(ends, 100.0)
    params = dataclasses.replace(params, logit_bias=bias)
    if not params.min_tokens:
        assert write(trained, "Once", params, constraint).num_completion_tokens == 1
        params = dataclasses.replace(params, ignore_eos=True)
    found = write(trained, "Once", params, constraint)
    assert found.num_completion_tokens == 40
    assert not ends.intersection(found.completion_ids[:-1])


def test_every_end_of_the_model_may_be_chosen(trained: LoadedModel, compiler: GrammarCompiler) -> None:
    constraint = compiler.compile(Grammar.regex("[a-z]+"))
    for end in sorted(trained.tokenizer.eos_token_ids):
        found = write(trained, "Once", SamplingParams(logit_bias={end: 100.0}), constraint)
        assert found.completion_ids[-1] == end
        assert found.finish_reason == "stop"
        assert re.fullmatch("[a-z]+", found.text.text)


def test_a_stop_token_that_must_come_ends_the_text(trained: LoadedModel, compiler: GrammarCompiler) -> None:
    (token_id,) = trained.tokenizer.encode("x", add_special=False)
    params = SamplingParams(stop_token_ids=[token_id], min_tokens=5, max_tokens=10)
    found = write(trained, "Once", params, compiler.compile(Grammar.regex("x")))
    assert found.completion_ids == [token_id]
    assert found.finish_reason == "stop"


# What is refused, and what fails.


@pytest.mark.parametrize("constraint", [5, "(a|b)", Grammar.regex("a")])
def test_only_a_constraint_is_one(llm: LLM, constraint: Any) -> None:
    with pytest.raises(InvalidInput, match="constraint is"):
        llm.generate([1, 2], constraint=constraint)


def test_another_models_constraint_is_refused(llm: LLM, person: Constraint) -> None:
    with pytest.raises(InvalidInput, match="another model"):
        llm.generate([1, 2], constraint=person)


def test_the_engine_serves_on_after_a_refused_grammar(llm: LLM) -> None:
    with pytest.raises(InvalidGrammar):
        llm.compile_grammar(Grammar.regex("("))
    with pytest.raises(InvalidInput, match="give Grammar"):
        llm.compile_grammar("a+")  # type: ignore[arg-type]
    constraint = llm.compile_grammar(Grammar.regex("a{5}"))
    (completion,) = llm.generate([5, 6], SamplingParams(max_tokens=9), constraint=constraint)
    assert completion.text == "aaaaa"


def test_a_matcher_that_fails_ends_its_own_sequence_alone(tiny: LoadedModel) -> None:
    engine = Engine(tiny)
    params = SamplingParams(max_tokens=100, ignore_eos=True, n=2, temperature=1.0, seed=5)
    prompts = [random_prompt(tiny, 20 + seed, seed) for seed in range(6)]
    vocab_size = tiny.decoder.spec.vocab_size
    fails = [RandomConstraint(tiny.tokenizer, vocab_size, seed=seed, fails=True) for seed in range(3)]
    sequences = [
        new_sequence(engine, prompt, params, constraint=constraint)
        for prompt, constraint in zip(prompts, [*fails, None, None, None], strict=True)
    ]
    branches = run_all(engine, sequences)
    assert sum(isinstance(branch.error, CannotGoOn) for branch in branches) > 1
    for branch in branches[6:]:
        assert branch.num_completion_tokens == 100
        assert branch.error is None
    assert engine.death is None


# The other routes.


def test_every_route_takes_a_constraint(default_model_path: Any) -> None:
    llm = LLM(str(default_model_path), context=300, threads=2)
    constraint = llm.compile_grammar(Grammar.choice(["yes", "no"]))
    messages = [{"role": "user", "content": "Is water wet?"}]
    found: list[Completion | None] = [llm.chat(messages, constraint=constraint)]
    found += [list(llm.stream("Is water wet?", constraint=constraint))[-1].completion]
    found += [list(llm.stream_chat(messages, constraint=constraint))[-1].completion]
    with Session(llm, constraint=constraint) as session:
        for _ in range(2):
            session.append("user", "Is water wet?")
            list(session.stream())
            found.append(session.completion)

    async def ask() -> list[Completion]:
        async with AsyncLLM(llm) as engine:
            constraint = engine.llm.compile_grammar(Grammar.choice(["yes", "no"]))
            answers = await asyncio.gather(*(engine.generate("Is water wet?", constraint=constraint) for _ in range(3)))
            return [completion for answer in answers for completion in answer]

    found += asyncio.run(ask())
    assert len(found) == 8
    for completion in found:
        assert completion is not None
        assert completion.text in ("yes", "no")
