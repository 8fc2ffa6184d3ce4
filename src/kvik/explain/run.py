"""The run that a page is about: one prompt answered without the cache and with it, both watched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvik.config import SamplingParams
from kvik.engine.lanes import RaceLane, TokenCost, Verdict, compare, make_lanes, run_race
from kvik.engine.llm import LLM
from kvik.errors import InvalidInput
from kvik.explain.limits import MOST_TOKENS
from kvik.explain.selection import Selection
from kvik.explain.tracer import Candidate, Tracer, as_kept, candidates, same_rows

WideArray = npt.NDArray[np.float64]


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
    attention_difference: float  # between the engine's attention and the formula in float64, over all that is drawn

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


def most_tokens(llm: LLM) -> int:
    """Of prompt and answer: what a page draws, or what the context holds."""
    return min(MOST_TOKENS, llm.model.context)


def check_tokens(llm: LLM, num_prompt_tokens: int, max_tokens: int) -> None:
    """Raise `InvalidInput` for more than `most_tokens`."""
    most = most_tokens(llm)
    if num_prompt_tokens + max_tokens <= most:
        return
    left = most - num_prompt_tokens
    bound = f"the page draws {most:,}" if most == MOST_TOKENS else f"the context holds {most:,}"
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


def attention(
    q: WideArray, k: WideArray, v: WideArray, scale: float, window: int | None = None, soft_cap: float | None = None
) -> WideArray:
    """softmax(q k^T * scale) v of one head, each row over itself and those before it (or its window): (T, head_dim)."""
    scores = q @ k.T * scale
    if soft_cap is not None:
        scores = soft_cap * np.tanh(scores / soft_cap)
    positions = np.arange(len(q))
    back = positions[:, None] - positions
    scores[(back < 0) | (back >= (window or len(q)))] = -np.inf
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    output: WideArray = (weights / weights.sum(axis=1, keepdims=True)) @ v
    return output


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
    decoder, dtype = llm.model.decoder, llm.config.kv_dtype
    group = decoder.spec.num_heads // decoder.spec.num_kv_heads
    largest = 0.0
    for index, layer in enumerate(selection.layers):
        rule = decoder.rule(decoder.spec.layers[layer])
        scale = rule.scale_for(decoder.spec.head_dim)
        kept = [as_kept(rows[layer], dtype).astype(np.float64) for rows in (tracer.keys, tracer.values)]
        queries, attended = tracer.queries[index].astype(np.float64), tracer.attended[index]
        for head in (kv_head * group + each for kv_head in selection.kv_heads for each in range(group)):
            k, v = (rows[:, head // group] for rows in kept)
            wanted = attention(queries[:, head], k, v, scale, rule.window, rule.soft_cap)
            largest = max(largest, float(np.abs(wanted - attended[:, head]).max()))
    return largest
