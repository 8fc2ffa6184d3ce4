"""The run that a page is about: one prompt answered without the cache and with it, both watched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from kvik.cache import KVCacheSpec
from kvik.config import SamplingParams
from kvik.engine.llm import LLM
from kvik.errors import InvalidInput
from kvik.explain.limits import MAX_PAGE_TOKENS
from kvik.explain.selection import Selection
from kvik.explain.tracer import Candidate, Tracer, candidates, same_rows
from kvik.measure.lanes import RaceLane, TokenCost, Verdict, compare, make_lanes, run_race
from kvik.ops.base import Batch
from kvik.ops.reference import ReferenceKV, ReferenceOps


@dataclass(frozen=True, slots=True)
class TracedLane:
    """A lane, and what was seen of its steps: one step for each token that it wrote."""

    lane: RaceLane
    tracer: Tracer

    @property
    def costs(self) -> list[TokenCost]:
        """One for each step."""
        assert len(self.lane.costs) == len(self.tracer.steps)
        return self.lane.costs


@dataclass(frozen=True, slots=True)
class TracedRun:
    """Both lanes, and how their results compare."""

    llm: LLM
    prompt_ids: list[int]
    without: TracedLane
    with_cache: TracedLane
    selection: Selection
    verdict: Verdict  # of tokens and logits
    num_kv_rows: int  # keys and values of a token in a layer
    num_same_kv_rows: int  # of those, the same in both lanes to the last bit
    predictions: list[Candidate]  # the likeliest token after each row of hidden states
    attention_difference: float  # between the engine's attention and the reference in float64, over all that is drawn

    @property
    def token_ids(self) -> list[int]:
        """Prompt and answer."""
        return self.with_cache.lane.sequence.token_ids[: len(self.prompt_ids) + self.num_steps]

    @property
    def num_steps(self) -> int:
        """That both lanes made: the same number, unless something is wrong."""
        return min(len(traced.costs) for traced in (self.without, self.with_cache))

    @property
    def is_same(self) -> bool:
        """Whether the cache changed no bit of anything that was compared."""
        rows = (self.without.tracer.keys, self.without.tracer.values, self.without.tracer.hidden)
        again = all(each.num_same == each.num_repeated for each in rows)
        kept = self.num_same_kv_rows == self.num_kv_rows
        lengths = {len(traced.costs) for traced in (self.without, self.with_cache)}
        return len(lengths) == 1 and self.verdict.is_same and kept and again


def max_page_tokens(llm: LLM) -> int:
    """Of prompt and answer: what a page draws, or what the context holds."""
    return min(MAX_PAGE_TOKENS, llm.model.context)


def check_tokens(llm: LLM, num_prompt_tokens: int, max_tokens: int) -> None:
    """Raise `InvalidInput` for more than `max_page_tokens`."""
    maximum = max_page_tokens(llm)
    if num_prompt_tokens + max_tokens <= maximum:
        return
    left = maximum - num_prompt_tokens
    bound = f"the page draws {maximum:,}" if maximum == MAX_PAGE_TOKENS else f"the context holds {maximum:,}"
    raise InvalidInput(
        f"a prompt of {num_prompt_tokens:,} tokens and {max_tokens:,} to write are"
        f" {num_prompt_tokens + max_tokens:,}, {bound}",
        hint=f"set --max-tokens to {left:,} or less" if left > 0 else "shorten the prompt",
    )


def trace_run(
    llm: LLM,
    prompt_ids: list[int],
    params: SamplingParams,
    selection: Selection,
    advance: Callable[[int], None] = lambda count: None,
) -> TracedRun:
    """Answer the prompt in both lanes to the end, watching each step; `advance` is told of each."""
    lanes = make_lanes(llm, prompt_ids, params)
    traced = []
    for lane in lanes:
        tracer = Tracer(lane.engine, selection.layers)
        lane.clock = tracer.clock
        traced.append(TracedLane(lane, tracer))
    run_race(lanes, lambda: advance(1))
    for lane in lanes:
        if lane.sequence.error is not None:
            raise lane.sequence.error
    without, with_cache = traced
    num_rows, num_same = _compare_kept(without.tracer, with_cache.tracer, llm.model.decoder.spec.num_layers)
    return TracedRun(
        llm=llm,
        prompt_ids=prompt_ids,
        without=without,
        with_cache=with_cache,
        selection=selection,
        verdict=compare(*lanes),
        num_kv_rows=num_rows,
        num_same_kv_rows=num_same,
        predictions=_predictions(llm, with_cache.tracer),
        attention_difference=_attention_difference(llm, with_cache.tracer, selection),
    )


def kept_kv(llm: LLM, tracer: Tracer, layer: int) -> ReferenceKV:
    """A layer's keys and values as the cache keeps them, token after token: written by the reference of the ops.

    Each (num_blocks, block_size, num_kv_heads, head_dim); behind the last token zeros. Those of k4 and v4 are what the
    codes stand for, before they are transformed back.
    """
    of_model = llm.model.decoder.spec.kv_spec(llm.config.kv_dtype)
    group = of_model.groups[of_model.layer_groups[layer]]
    kept = (replace(group, kind="full", layers=(0,), window=None),)
    kv_spec = KVCacheSpec((*kept, *(one.as_written for one in kept if one.is_coded)))
    num_tokens = tracer.keys.num_rows
    (kv,) = ReferenceOps().allocate_kv(kv_spec, kv_spec.num_blocks_for(num_tokens))
    slots = np.arange(num_tokens, dtype=np.int32)
    recent = None if kv.recent is None else slots
    ReferenceOps().write_kv(kv, tracer.keys[layer], tracer.values[layer], slots, recent)
    return kv


def _compare_kept(first: Tracer, second: Tracer, num_layers: int) -> tuple[int, int]:
    """Keys and values of both lanes: how many rows, and how many of them agree in every bit."""
    num_rows = num_same = 0
    for rows in ((first.keys, second.keys), (first.values, second.values)):
        for layer in range(num_layers):
            one, other = (each[layer] for each in rows)
            num_rows += max(len(one), len(other))
            num_same += same_rows(one[: len(other)], other[: len(one)])
    return num_rows, num_same


def _predictions(llm: LLM, tracer: Tracer) -> list[Candidate]:
    decoder = llm.model.decoder
    logits = decoder.ops.to_numpy(decoder.logits(tracer.hidden[0], decoder.ops))
    return [candidates(row, 1)[0] for row in logits]


def _attention_difference(llm: LLM, tracer: Tracer, selection: Selection) -> float:
    """The largest, over all dimensions of all query heads that are drawn."""
    decoder = llm.model.decoder
    heads = selection.query_heads(decoder.spec)
    largest = 0.0
    for index, layer in enumerate(selection.layers):
        queries, kv = tracer.queries[index], kept_kv(llm, tracer, layer)
        batch = _one_sequence(len(queries), len(kv.keys))
        rule = decoder.rule(decoder.spec.layers[layer], decoder.weights.layers[layer])
        wanted = ReferenceOps().attend(queries, kv, batch, rule)
        largest = max(largest, float(np.abs(wanted - tracer.attended[index])[:, heads].max()))
    return largest


def _one_sequence(num_tokens: int, num_blocks: int) -> Batch:
    """All tokens of a sequence that has the first blocks, in order."""
    positions = np.arange(num_tokens, dtype=np.int32)
    zeros, tables = np.zeros_like(positions), np.arange(num_blocks, dtype=np.int32)[None]
    return Batch.in_blocks(
        zeros, positions, sequence_index=zeros, block_tables=tables, logit_rows=positions[:0], num_groups=2
    )
