"""The plan of a model: what it needs, what fits, how fast it can be, and what follows from that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvik.config import MAX_SIZE_BYTES, TOKEN_BUDGET, kv_dtype_name, parse_bytes, parse_kv_dtype, plain_int
from kvik.errors import InvalidInput, NotEnoughMemory
from kvik.machine import available_memory_bytes
from kvik.planner.catalogue import Device, find_device
from kvik.planner.fit import MAX_USERS, Fit, Load, fit
from kvik.planner.memory import (
    MAX_RUNNING,
    KVMemory,
    WeightMemory,
    activation_bytes,
    kv_memory,
    table_bytes,
    weight_memory,
)
from kvik.planner.replicas import MAX_REPLICAS, ReplicaPlan, plan_replicas
from kvik.planner.shape import ModelShape
from kvik.planner.sources import find_shape
from kvik.planner.speed import COMPUTE_EFFICIENCY, READ_EFFICIENCY, PhaseSpeed, Roofline, speeds
from kvik.planner.weights import FORMATS, SHOWN, WeightFormat, find_format
from kvik.planner.what_if import WhatIf, what_ifs

HERE = "here"
"""The name of this machine as a device."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What serving a model takes. Bytes are whole numbers, those of keys and values as the engine allocates them."""

    model: ModelShape
    context: int
    users: int
    prefix: int  # tokens that all users' sequences begin with
    kv: KVMemory  # in the chosen type
    kv_by_dtype: dict[str, KVMemory]  # in every type that the model's heads allow
    weights: WeightMemory | None  # None: not known how many
    weights_by_format: dict[str, WeightMemory]
    activation_bytes: int  # about
    table_bytes: int  # of rotary positions and the vocabulary, about; 0 for a model that kvik does not run
    what_ifs: tuple[WhatIf, ...]
    fit: Fit | None  # None: no memory was named
    device: Device | None
    roofline: Roofline | None
    speeds: tuple[PhaseSpeed, PhaseSpeed] | None  # decode, prefill
    auto_kv_bytes: int | None  # of the cache that the engine would make on this machine, where it would run the model
    unshared_kv_bytes: int  # of keys and values, were the prefix not shared
    replicas: ReplicaPlan | None  # where there are to be several processes

    @property
    def needed_bytes(self) -> int:
        """Weights (where known), keys and values, a step's intermediate results and tables."""
        weights = self.weights.held_bytes if self.weights else 0
        return weights + self.kv.num_bytes + self.activation_bytes + self.table_bytes


def plan(
    model: str = "smollm2",
    *,
    context: int | None = None,
    users: int = 1,
    kv: str = "f16",
    weights: str | None = None,
    memory: int | str | None = None,
    device: str | None = None,
    prefix: int = 0,
    replicas: int = 1,
) -> Plan:
    """What a model needs and what fits, before any of it is loaded.

    Users are divided among `replicas`, each a process of its own.

    `model` is a name of the catalogue, a .gguf path, a folder or file with a config.json, or a Hub id. `context` None
    means the model's own, `weights` None those of the file, or bf16. `device` is a name of the catalogue, or "here":
    this machine, whose speed is measured then. `memory` goes before the device's own. Raises `ModelError`,
    `InvalidInput`.
    """
    shape = find_shape(model)
    return plan_shape(
        shape,
        context=context,
        users=users,
        kv=kv,
        weights=weights,
        memory=memory,
        device=device,
        prefix=prefix,
        replicas=replicas,
    )


def plan_shape(
    shape: ModelShape,
    *,
    context: int | None = None,
    users: int = 1,
    kv: str = "f16",
    weights: str | None = None,
    memory: int | str | None = None,
    device: str | None = None,
    prefix: int = 0,
    replicas: int = 1,
) -> Plan:
    """The same of a shape that is known."""
    context = _check_int(
        "context",
        shape.max_context if context is None else context,
        1,
        shape.max_context,
        of=f"{shape.name} was made for {shape.max_context:,} tokens",
    )
    users = _check_int("users", users, 1, MAX_USERS)
    prefix = _check_int(
        "prefix", prefix, 0, context - 1, of=f"a sequence has {context:,} tokens, one of its own at least"
    )
    replicas = _check_int(
        "replicas", replicas, 1, min(users, MAX_REPLICAS), of=f"{users:,} users are divided among them"
    )
    kv = kv_dtype_name(*parse_kv_dtype(kv, "kv"))
    try:
        shape.kv_spec(kv)
    except InvalidInput as error:
        raise InvalidInput(
            f"{shape.name} cannot have {kv} keys and values: {error}",
            hint=f"give one of {', '.join(shape.kv_dtypes)}",
        ) from None
    form = _format(shape, weights)
    load = Load(shape, context, users, prefix, kv, form)
    found = None if device is None or device == HERE else find_device(device)
    fitting = _fit(load, memory, device, found)
    roofline = _roofline(load, device, found, fitting)
    shown = {name: weight_memory(shape, FORMATS[name]) for name in SHOWN}
    return Plan(
        model=shape,
        context=context,
        users=users,
        prefix=prefix,
        kv=kv_memory(shape, kv, context, users=users, prefix=prefix),
        kv_by_dtype={
            dtype: kv_memory(shape, dtype, context, users=users, prefix=prefix)
            for dtype in dict.fromkeys((*shape.kv_dtypes, kv))
        },
        weights=weight_memory(shape, form),
        weights_by_format={name: one for name, one in shown.items() if one is not None},
        activation_bytes=activation_bytes(shape, context, users),
        table_bytes=table_bytes(shape, context),
        what_ifs=what_ifs(shape, kv, context, users, prefix),
        fit=fitting,
        device=found,
        roofline=roofline,
        speeds=None if roofline is None else speeds(load, roofline),
        auto_kv_bytes=_auto_kv_bytes(shape, kv, context) if device == HERE and shape.runs else None,
        unshared_kv_bytes=kv_memory(shape, kv, context, users=users).num_bytes,
        replicas=plan_replicas(load, replicas, roofline) if replicas > 1 else None,
    )


def _format(shape: ModelShape, weights: str | None) -> WeightFormat | None:
    """The format asked for; by default a file's own (None), else bf16."""
    if weights is not None:
        return find_format(weights)
    return None if shape.tensors is not None else FORMATS["bf16"]


def _fit(load: Load, memory: int | str | None, device: str | None, found: Device | None) -> Fit | None:
    if memory is not None:
        num_bytes = parse_bytes("memory", memory)
        return fit(load, "the memory given", num_bytes)
    if device == HERE:
        return fit(load, "this machine, available now", available_memory_bytes())
    if found is None or found.memory_bytes is None:
        return None
    return fit(load, found.name, found.memory_bytes)


def _roofline(load: Load, device: str | None, found: Device | None, fitting: Fit | None) -> Roofline | None:
    if device == HERE:
        if weight_memory(load.shape, load.weights) is None or (fitting is not None and not fitting.fits):
            return None  # nothing to measure with
        from kvik.planner.here import roofline_here

        return roofline_here(load)
    if found is None:
        return None
    return Roofline(
        name=found.name,
        bytes_per_s=found.bytes_per_s,
        operations_per_s=found.operations_per_s,
        attention_operations_per_s=found.operations_per_s,
        read_efficiency=READ_EFFICIENCY,
        compute_efficiency=COMPUTE_EFFICIENCY,
        is_measured=False,
    )


def _auto_kv_bytes(shape: ModelShape, dtype: str, context: int) -> int | None:
    """What the engine would take for keys and values; `None` where it would refuse."""
    from kvik.cache.sizing import choose_pool_size

    spec = shape.kv_spec(dtype)
    try:
        size = choose_pool_size(spec, context, "auto", token_budget=TOKEN_BUDGET, max_running=MAX_RUNNING)
        return spec.pool_bytes(size)
    except NotEnoughMemory:
        return None


def _check_int(name: str, value: Any, minimum: int, maximum: int, *, of: str = "") -> int:
    """The value as a plain int. Raises `InvalidInput`."""
    number = plain_int(value)
    if number is None or not minimum <= number <= maximum:
        shown = f"{number:,}" if number is not None and abs(number) <= MAX_SIZE_BYTES else f"{value!r:.40}"
        reason = f"; {of}" if of and number is not None and number > maximum else ""
        raise InvalidInput(f"{name} is {shown}{reason}", hint=f"give a whole number from {minimum:,} to {maximum:,}")
    return number
