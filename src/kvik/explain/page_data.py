"""What a page knows: a traced run as plain numbers and text, tensors as base64."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kvik import __version__
from kvik.cache.spec import KVCacheSpec
from kvik.explain.prefixes import FollowUp
from kvik.explain.run import TracedLane, TracedRun, kept_kv
from kvik.explain.tracer import Candidate, TracedStep
from kvik.machine import processor_name
from kvik.text.tokenizer import Tokenizer

HIDDEN_COLUMNS = 48
"""Dimensions of the hidden states that are drawn."""


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Medians of the time to a first token after a prompt of random tokens, and of a later token's."""

    length: int
    first_s: float
    later_s: float


def page_data(
    run: TracedRun, model_name: str, follow_ups: Sequence[FollowUp], first_tokens: Sequence[FirstToken]
) -> dict[str, Any]:
    """All that is drawn. Seconds `_s`, bytes `_bytes`; nothing in it is typed by hand."""
    tokenizer = run.llm.model.tokenizer
    return {
        "version": __version__,
        "model": _model(run, model_name),
        "machine": {"processor": processor_name(), "threads": getattr(run.llm.model.decoder.ops, "num_threads", 1)},
        "num_prompt_tokens": len(run.prompt_ids),
        "finish_reason": run.with_cache.lane.sequence.finish_reason,
        "tokens": [_token(tokenizer, token_id) for token_id in run.token_ids],
        "hidden": _array(run.with_cache.tracer.hidden[0][:, :HIDDEN_COLUMNS]),
        "predictions": [_candidate(tokenizer, candidate) for candidate in run.predictions],
        "steps": _steps(run),
        "same": _same(run),
        "layers": [_layer(run, index) for index in range(len(run.selection.layers))],
        "first_tokens": [
            {"length": each.length, "first_s": each.first_s, "later_s": each.later_s} for each in first_tokens
        ],
        "memory": _memory(run),
        "follow_ups": [_follow_up(run, each) for each in follow_ups],
    }


def _model(run: TracedRun, name: str) -> dict[str, Any]:
    spec, config = run.llm.model.decoder.spec, run.llm.config
    return {
        "name": name,
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "num_heads": spec.num_heads,
        "num_kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "context": run.llm.model.context,
        "kv_dtype": config.kv_dtype,
        "activations": config.activations,
        "weight_bytes": run.llm.model.decoder.weights.num_bytes,
        "attention": attention_name(spec.num_heads, spec.num_kv_heads),
    }


def _token(tokenizer: Tokenizer, token_id: int) -> dict[str, Any]:
    return {"id": token_id, "text": tokenizer.token_text(token_id)}


def _candidate(tokenizer: Tokenizer, candidate: Candidate) -> dict[str, Any]:
    return _token(tokenizer, candidate.token_id) | {"probability": candidate.probability, "logit": candidate.logit}


def _steps(run: TracedRun) -> list[dict[str, Any]]:
    tokenizer = run.llm.model.tokenizer
    chosen = run.with_cache.lane.sequence.completion_ids
    lanes = {"with_cache": _lane_steps(run.with_cache), "without": _lane_steps(run.without)}
    return [
        {
            "candidates": [_candidate(tokenizer, one) for one in step.candidates],
            "chosen": _token(tokenizer, chosen[index]),
            **{name: steps[index] for name, steps in lanes.items()},
        }
        for index, step in enumerate(run.with_cache.tracer.steps[: run.num_steps])
    ]


def _lane_steps(traced: TracedLane) -> list[dict[str, Any]]:
    return [step_figures(traced, index) for index in range(len(traced.costs))]


def step_figures(traced: TracedLane, index: int) -> dict[str, Any]:
    """What one step of a lane took."""
    step: TracedStep = traced.tracer.steps[index]
    cost = traced.costs[index]
    assert cost.work.num_tokens == step.num_tokens
    spec = traced.lane.engine.kv_spec
    return {
        "first_position": step.first_position,
        "num_tokens": step.num_tokens,
        "num_repeated_tokens": cost.repeated.num_tokens,
        "num_kv_vectors": 2 * step.num_tokens * sum(group.num_layers * group.num_kv_heads for group in spec.groups),
        "multiply_adds": cost.work.multiply_adds,
        "weight_bytes": cost.work.weight_bytes,
        "kv_bytes": cost.work.kv_bytes,
        "kv_written_bytes": step.num_tokens * spec.written_bytes,
        "seconds": cost.seconds,
    }


def _same(run: TracedRun) -> dict[str, Any]:
    """What was compared, and how much of it was the same to the last bit."""
    again = run.without.tracer
    return {
        "is_same": run.is_same,
        "num_tokens": run.verdict.num_compared,
        "num_logits": run.verdict.num_compared * run.llm.model.decoder.spec.vocab_size,
        "num_kv_rows": run.num_kv_rows,
        "num_same_kv_rows": run.num_same_kv_rows,
        "num_repeated_kv_rows": again.keys.num_repeated + again.values.num_repeated,
        "num_same_repeated_kv_rows": again.keys.num_same + again.values.num_same,
        "num_repeated_hidden_rows": again.hidden.num_repeated,
        "num_same_repeated_hidden_rows": again.hidden.num_same,
        "attention_difference": run.attention_difference,
    }


def _layer(run: TracedRun, index: int) -> dict[str, Any]:
    """Queries, and keys and values as the cache keeps them, of the heads that are drawn."""
    decoder, tracer, selection = run.llm.model.decoder, run.with_cache.tracer, run.selection
    layer = selection.layers[index]
    rule = decoder.rule(decoder.spec.layers[layer], decoder.weights.layers[layer])
    heads, kv_heads = selection.query_heads(decoder.spec), list(selection.kv_heads)
    kv, num_tokens = kept_kv(run.llm, tracer, layer), tracer.keys.num_rows
    keys, values = (kept.reshape(-1, *kept.shape[2:])[:num_tokens, kv_heads] for kept in (kv.keys, kv.values))
    return {
        "layer": layer,
        "heads": heads,
        "kv_heads": kv_heads,
        "scale": rule.scale_for(decoder.spec.head_dim),
        "window": rule.window,
        "soft_cap": rule.soft_cap,
        "sinks": None if rule.sinks is None else rule.sinks[heads].tolist(),
        "queries": _array(tracer.queries[index][:, heads]),
        "keys": _array(keys),
        "values": _array(values),
    }


def _memory(run: TracedRun) -> dict[str, Any]:
    decoder, spec = run.llm.model.decoder, run.with_cache.lane.engine.kv_spec
    context = run.llm.model.context
    contexts = [num_tokens for num_tokens in (len(run.token_ids), 2048) if num_tokens < context]
    return {
        "block_size": spec.block_size,
        "token_bytes": spec.token_bytes,
        "vector_bytes": [one.num_bytes for one in (spec.groups[0].key, spec.groups[0].value) if one is not None],
        "slots": [slot for step in run.with_cache.tracer.steps for slot in step.slots],
        "held_bytes": [spec.held_bytes(num_tokens) for num_tokens in range(len(run.token_ids))],
        "windows": [
            {
                "window": spec.groups[group].window,
                "num_layers": spec.groups[group].num_layers,
                "first_blocks": [spec.first_block(group, num_tokens) for num_tokens in range(len(run.token_ids))],
            }
            for group in spec.sliding_groups
        ],
        "contexts": contexts,
        "variants": [
            {
                "attention": attention_name(decoder.spec.num_heads, count),
                "num_kv_heads": count,
                "token_bytes": variant.token_bytes,
                "context_bytes": [_most_held_bytes(variant, num_tokens) for num_tokens in contexts],
                "whole_context_bytes": _most_held_bytes(variant, context),
                "is_own": count == decoder.spec.num_kv_heads,
            }
            for count, variant in kv_variants(spec, decoder.spec.num_heads)
        ],
    }


def _most_held_bytes(spec: KVCacheSpec, num_tokens: int) -> int:
    """Of a text that grows so far: where a window slides, most is held just before a block is given back."""
    return max(spec.held_bytes(count) for count in range(max(0, num_tokens - spec.block_size), num_tokens + 1))


def kv_variants(spec: KVCacheSpec, num_heads: int) -> list[tuple[int, KVCacheSpec]]:
    """The same cache with as many KV heads as query heads (MHA), with groups (GQA), and with one (MQA).

    A model that has no groups is shown with some: about a quarter of its heads.
    """
    counts = {num_heads, spec.groups[0].num_kv_heads, 1}
    between = [count for count in range(2, num_heads) if num_heads % count == 0]
    if not counts & set(between) and between:
        counts.add(min(between, key=lambda count: (abs(count - num_heads / 4), count)))

    def variant(count: int) -> KVCacheSpec:
        return replace(spec, groups=tuple(replace(group, num_kv_heads=count) for group in spec.groups))

    return [(count, variant(count)) for count in sorted(counts, reverse=True)]


def attention_name(num_heads: int, num_kv_heads: int) -> str:
    """MHA, GQA or MQA: how many query heads share a KV head."""
    return "MHA" if num_kv_heads == num_heads else "MQA" if num_kv_heads == 1 else "GQA"


def _follow_up(run: TracedRun, found: FollowUp) -> dict[str, Any]:
    tokenizer = run.llm.model.tokenizer
    known = run.token_ids[found.num_common_tokens : found.num_common_tokens + 1]
    return {
        "title": found.title,
        "tokens": [_token(tokenizer, token_id) for token_id in found.token_ids],
        "num_common_tokens": found.num_common_tokens,
        "num_shared_tokens": found.num_shared_tokens,
        "num_copied_tokens": found.num_copied_tokens,
        "shared_blocks": found.shared_blocks,
        "copied_block": found.copied_block,
        "num_computed_tokens": found.num_computed_tokens,
        "stop": str(found.stop),
        "known_next": _token(tokenizer, known[0]) if known else None,
        "cold_s": found.cold_s,
        "warm_s": found.warm_s,
        "is_same": found.is_same,
    }


def _array(x: npt.NDArray[Any]) -> dict[str, Any]:
    """Little-endian, row by row."""
    data = np.ascontiguousarray(x, x.dtype.newbyteorder("<"))
    return {"shape": list(x.shape), "dtype": x.dtype.name, "data": base64.b64encode(data.tobytes()).decode("ascii")}
