"""What follows from a plan, in words, each with its figure."""

from __future__ import annotations

from collections.abc import Iterator

from kvik.cache.spec import BLOCK_SIZE
from kvik.planner.memory import kv_memory
from kvik.planner.plan import Plan
from kvik.planner.units import count, percent
from kvik.units import amount

QUOTED_TOKENS = 4000
"""What "4k" means where the figures of models with many heads are quoted."""

MQA_EXAMPLE_HEADS = 16
"""Heads of the model that MQA's usual figure comes from."""


def advice(plan: Plan) -> list[str]:
    """Sentences, the most important first."""
    parts = (_fitting, _own_choice, _kv_type, _heads, _prefix, _doubling, _crossing, _doubts)
    return [sentence for part in parts for sentence in part(plan)]


def _fitting(plan: Plan) -> Iterator[str]:
    fit = plan.fit
    if fit is None:
        if plan.kv.num_bytes:
            each = f"{amount(plan.kv.sequence_bytes)} at {plan.context:,} tokens"
            yield f"Users: each takes {each}; `--memory` or `--device` tells how many fit."
        return
    if fit.fits is None:
        yield (
            f"Whether it fits is not known, as the number of weights is not: without them {amount(fit.spare_bytes)} are"
            " left. A folder with its safetensors, or a GGUF file, tells it."
        )
        return
    if not fit.fits:
        missing = f"{amount(-fit.spare_bytes)} are missing"
        if fit.change is None:
            yield f"Nothing of this fits: {missing}, and no change that kvik knows makes up for it."
        else:
            loss = ", which costs some quality" if fit.change.costs_quality else ""
            yield f"The cheapest change that makes it fit: {fit.change.what} ({amount(fit.change.num_bytes)}){loss}."
        return
    share = plan.kv.num_bytes // plan.users
    yield (
        f"Users: {fit.most_users:,} at {plan.context:,} tokens each fit; another one takes {amount(share)},"
        f" and {amount(fit.spare_bytes)} are left."
    )
    if fit.largest_context is not None and fit.largest_context < plan.model.max_context:
        yield f"Context: {count(plan.users, 'user')} can have {fit.largest_context:,} tokens each."


def _own_choice(plan: Plan) -> Iterator[str]:
    if plan.auto_kv_bytes is not None:
        contexts = plan.auto_kv_bytes / kv_memory(plan.model, plan.kv.dtype, plan.context).num_bytes
        size = amount(plan.auto_kv_bytes)
        yield f"kvik's own choice of a cache here (`--kv-memory auto`): {size}, {contexts:.1f} contexts."


def _kv_type(plan: Plan) -> Iterator[str]:
    small = plan.kv_by_dtype.get("int8")
    if plan.kv.dtype == "int8":
        wide = plan.kv_by_dtype["f16"]
        yield (
            f"KV type: int8 saves {percent(1 - plan.kv.num_bytes / wide.num_bytes)} of f16's"
            f" {amount(wide.num_bytes)}, its scales counted."
        )
    elif small is not None and plan.kv.num_bytes:
        yield (
            f"KV type: int8 would take {amount(small.num_bytes)}, scales counted, in place of"
            f" {amount(plan.kv.num_bytes)}: {percent(1 - small.num_bytes / plan.kv.num_bytes)} less."
        )


def _heads(plan: Plan) -> Iterator[str]:
    model, dtype = plan.model, plan.kv.dtype
    mha = model.with_kv_heads(model.num_heads)
    mha_bytes, token_bytes = mha.token_bytes(dtype), model.token_bytes(dtype)
    if model.often_quoted_as_mha:
        quoted = mha.token_bytes("f16")
        real = kv_memory(model, "f16", 4096)
        yield (
            f"The often-quoted {quoted / 2**20:.1f} MB per token ({quoted * QUOTED_TOKENS / 1e9:.1f} GB at 4k) is the"
            f" {model.num_heads}-head figure; its {model.num_kv_heads} KV heads make it"
            f" {model.token_bytes('f16') / 1e6:.2f} MB ({real.sequence_bytes / 1e9:.2f} GB), in f16."
        )
    elif token_bytes < mha_bytes:
        yield (
            f"Heads: {model.attention} keeps {percent(token_bytes / mha_bytes)} of what {model.num_heads} KV heads"
            f" (MHA) would, {amount(mha_bytes)} a token."
        )
    if model.num_kv_heads > 1 and model.attention != "MLA":
        usual = percent(1 - 1 / MQA_EXAMPLE_HEADS)
        example = f"; its usual {usual} is 1 - 1/{MQA_EXAMPLE_HEADS}, of a model with {MQA_EXAMPLE_HEADS} heads"
        yield (
            f"MQA would save 1 - 1/{model.num_heads} of MHA's cache here, {percent(1 - 1 / model.num_heads)}"
            + ("." if model.num_heads == MQA_EXAMPLE_HEADS else f"{example}.")
        )


def _prefix(plan: Plan) -> Iterator[str]:
    if not plan.kv.num_bytes:
        return
    if plan.prefix:
        saved = plan.unshared_kv_bytes - plan.kv.num_bytes
        if plan.users > 1 and not saved:
            yield f"Prefix: {plan.prefix:,} shared tokens save no memory here: no whole block is common."
            return
        blocks = plan.prefix // BLOCK_SIZE
        computed = (plan.users - 1) * blocks * BLOCK_SIZE
        yield (
            f"Prefix: {plan.prefix:,} shared tokens are {count(blocks, 'whole block')}, kept once: {amount(saved)}"
            f" less, and {computed:,} prompt tokens not computed."
            + ("" if plan.users > 1 else " It pays from the second request on.")
        )
        return
    block_bytes = BLOCK_SIZE * plan.kv.token_bytes
    yield (
        f"Prefix: sharing pays from {BLOCK_SIZE} equal first tokens on; each user after the first then saves"
        f" {amount(block_bytes)} for every {BLOCK_SIZE} of them, and their computing."
    )


def _doubling(plan: Plan) -> Iterator[str]:
    model, doubled = plan.model, 2 * plan.context
    if doubled > model.max_context:
        yield f"Twice the context is beyond the model's {model.max_context:,} tokens."
        return
    after = kv_memory(model, plan.kv.dtype, doubled, users=plan.users, prefix=plan.prefix)
    grown = [
        (new.num_bytes - old.num_bytes, f"{new.num_layers} {new.name} layers")
        for old, new in zip(plan.kv.layers, after.layers, strict=True)
    ]
    takes = [f"{amount(num_bytes)} in {layers}" for num_bytes, layers in grown if num_bytes]
    nothing = [layers for num_bytes, layers in grown if not num_bytes]
    more = f"takes another {' and '.join(takes)}" if takes else "takes no more memory"
    rest = f"; {' and '.join(nothing)} need nothing for it" if takes and nothing else ""
    yield f"Doubling the context to {doubled:,} {more}{rest}."


def _crossing(plan: Plan) -> Iterator[str]:
    if plan.weights is None or not plan.kv.token_bytes_at_context:
        return
    if plan.kv.num_bytes > plan.weights.held_bytes:
        yield f"Keys and values outweigh the weights {plan.kv.num_bytes / plan.weights.held_bytes:.1f} to 1."
    elif all(layer.window is None for layer in plan.kv.layers):
        tokens = -(-plan.weights.held_bytes // plan.kv.token_bytes)
        yield f"Keys and values outweigh the weights from {tokens:,} tokens in all on."


def _doubts(plan: Plan) -> Iterator[str]:
    if plan.model.is_mixture and plan.model.num_active_params is None:
        yield "A mixture of experts whose active parameters the facts do not tell: its speed is not estimated."
    if plan.weights is None:
        yield "The number of weights is not known here: they are not counted."
