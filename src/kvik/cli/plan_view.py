"""`kvik plan` in a terminal: tables of at most 80 columns and sentences."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Literal

from kvik.cli.terminal import columns, rate
from kvik.planner.advice import advice
from kvik.planner.catalogue import device_entries, device_of, model_entries, shape_of
from kvik.planner.plan import Plan
from kvik.planner.shape import ModelShape
from kvik.planner.speed import PhaseSpeed, Roofline
from kvik.planner.units import count, duration, params, percent
from kvik.units import amount

WIDTH = 80


def plan_lines(plan: Plan) -> list[str]:
    """One model."""
    sections = (
        *(_title(plan), _memory(plan), _kv(plan), _weights(plan), _what_ifs(plan), _speeds(plan)),
        *(_replicas(plan), _advice(plan)),
    )
    lines: list[str] = []
    for section in sections:
        found = list(section)
        if found:
            lines += [*([""] if lines else []), *found]
    return lines


def comparison_lines(plans: Sequence[Plan]) -> list[str]:
    """Several models side by side."""
    first = plans[0]
    users = [f"{first.users:,} users"] if first.users > 1 else []
    rows = [["model", "heads", "kind", "layers", "B/token", "one user", *users]]
    for plan in plans:
        model, all_users = plan.model, [amount(plan.kv.num_bytes)] if users else []
        heads = f"{model.num_heads}/{model.num_kv_heads}"
        row = [_marked(model), heads, model.attention, f"{model.num_layers}", f"{plan.kv.token_bytes:,}"]
        rows.append([*row, amount(plan.kv.sequence_bytes), *all_users])
    lines = [
        f"{first.kv.dtype} keys and values at {first.context:,} tokens; heads: queries/KV",
        *columns(rows),
    ]
    lines += ["", *_needs_comparison(plans)]
    if any(plan.model.uncertain for plan in plans):
        lines += ["", "? some of its figures are uncertain: `kvik plan MODEL` tells which"]
    return lines


def listing_lines(what: Literal["models", "devices"]) -> list[str]:
    """The catalogue."""
    if what == "models":
        rows = [("model", "kind", "layers", "B/token", "context", "parameters")]
        for entry in model_entries().values():
            shape = shape_of(entry)
            rows.append(
                (
                    _marked(shape),
                    shape.attention,
                    f"{shape.num_layers}",
                    f"{shape.token_bytes('f16'):,}",
                    f"{shape.max_context:,}",
                    params(shape.num_params),
                )
            )
    else:
        rows = [("device", "memory", "GB/s", "TFLOP/s", "", "")]
        for entry in device_entries().values():
            device = device_of(entry)
            memory = "-" if device.memory_bytes is None else amount(device.memory_bytes)
            read = "-" if device.bytes_per_s is None else f"{device.bytes_per_s / 1e9:,.0f}"
            compute = "-" if device.operations_per_s is None else f"{device.operations_per_s / 1e12:,.0f}"
            rows.append((f"{device.name}{' ?' if device.uncertain else ''}", memory, read, compute, "", ""))
    last = "; B/token in f16" if what == "models" else ""
    return [*columns(rows), "", f"? some of its figures are uncertain{last}"]


def _title(plan: Plan) -> Iterator[str]:
    model = plan.model
    kinds = ", ".join(f"{group.num_layers} {group.name}" for group in model.groups)
    heads = f"{model.num_heads} heads, {model.num_kv_heads} KV heads of {model.head_dim} ({model.attention})"
    if model.attention == "MLA":
        key = next(group.key for group in model.groups if group.kind == "latent")
        latent = f"{key.num_items - key.num_rotary} + {key.num_rotary}"
        heads = f"{model.num_heads} heads, a latent of {latent} (MLA)"
    yield from textwrap.wrap(f"{model.name}: {model.num_layers} layers ({kinds}), {heads}", WIDTH)
    weights = f"{params(model.num_params)} parameters"
    if model.is_mixture:
        weights += f", {params(model.num_active_params)} active"
        if model.num_experts:
            weights += f" ({model.num_chosen_experts} of {model.num_experts} experts)"
    yield from textwrap.wrap(f"{weights}, context {model.max_context:,}; from {_origin(model)}", WIDTH)
    if model.uncertain:
        what = "all figures" if "all" in model.uncertain else ", ".join(model.uncertain)
        yield from textwrap.wrap(f"uncertain: {what}", WIDTH)
    if model.note:
        yield from textwrap.wrap(f"note: {model.note}", WIDTH)


def _origin(model: ModelShape) -> str:
    return f"the catalogue ({model.source})" if model.origin == "catalogue" else model.source


def _memory(plan: Plan) -> Iterator[str]:
    kv = f"{count(plan.users, 'user')} with {plan.context:,} tokens, {plan.kv.dtype}"
    if plan.prefix:
        kv += f", {plan.prefix:,} shared"
    rows = [
        ("weights", amount(plan.weights.held_bytes) if plan.weights else "unknown", _weights_note(plan)),
        ("keys and values", amount(plan.kv.num_bytes), kv),
        ("a step's results", amount(plan.activation_bytes), "about"),
        *([("tables", amount(plan.table_bytes), "rotary positions, vocabulary; about")] if plan.table_bytes else []),
        ("all", amount(plan.needed_bytes) if plan.weights else "-", _fit_note(plan)),
    ]
    lines = columns([(name, size) for name, size, _ in rows])
    width = max(map(len, lines))
    for line, (_, _, remark) in zip(lines, rows, strict=True):
        yield from textwrap.wrap(f"{line:<{width}}  {remark}".rstrip(), WIDTH, subsequent_indent=" " * (width + 2))


def _weights_note(plan: Plan) -> str:
    if plan.weights is None:
        return ""
    return f"{plan.weights.format}, as the file's tensors" if plan.model.tensors else plan.weights.format


def _fit_note(plan: Plan) -> str:
    fit = plan.fit
    if fit is None:
        return ""
    where = f"{fit.where} ({amount(fit.memory_bytes)})"
    if plan.device and plan.device.uncertain:
        where += " ?"
    if fit.fits is None:
        return f"not known whether it fits into {where}: the weights are not"
    if fit.fits:
        return f"fits into {where}, {amount(fit.spare_bytes)} left"
    return f"does not fit into {where}: {amount(-fit.spare_bytes)} too much"


def _kv(plan: Plan) -> Iterator[str]:
    head = ["keys and values", "B/token", "one user"]
    rows = [[*head, f"{plan.users:,} users"] if plan.users > 1 else head]
    for dtype, kv in plan.kv_by_dtype.items():
        row = [dtype + (" *" if dtype == plan.kv.dtype else ""), f"{kv.token_bytes:,}", amount(kv.sequence_bytes)]
        rows.append([*row, amount(kv.num_bytes)] if plan.users > 1 else row)
    yield from columns(rows)
    if len(plan.kv.layers) > 1 or plan.kv.layers[0].kind != "full":
        yield ""
        rows = [["by layers, " + plan.kv.dtype, "layers", "B/token", "tokens kept", "all"]]
        rows += [
            [
                layer.name,
                f"{layer.num_layers}",
                f"{layer.token_bytes:,}",
                f"{layer.sequence_tokens:,}",
                amount(layer.num_bytes),
            ]
            for layer in plan.kv.layers
        ]
        yield from columns(rows)


def _weights(plan: Plan) -> Iterator[str]:
    if not plan.weights_by_format:
        return
    rows = [["weights", "in kvik", "file"]]
    chosen = plan.weights.format if plan.weights and not plan.model.tensors else ""
    for name, one in plan.weights_by_format.items():
        rows.append([name + (" *" if name == chosen else ""), amount(one.held_bytes), amount(one.file_bytes)])
    yield from columns(rows)


def _what_ifs(plan: Plan) -> Iterator[str]:
    rows = [["were it", "KV heads", "B/token", count(plan.users, "user"), "of MHA"]]
    for row in plan.what_ifs:
        heads = "latent" if row.attention == "MLA" else f"{row.num_kv_heads}"
        name = row.attention + (" *" if row.as_it_is else "")
        rows.append([name, heads, f"{row.token_bytes:,}", amount(row.num_bytes), percent(row.of_mha)])
    yield from columns(rows)
    yield "* as it is"


def _speeds(plan: Plan) -> Iterator[str]:
    roofline = plan.roofline
    if roofline is None or plan.speeds is None:
        return
    rows = [[f"speed, {count(plan.users, 'user')}", "time", "tok/s", "reads", "GFLOP", "binds"]]
    for phase in plan.speeds:
        what = "a decode step" if phase.phase == "decode" else f"prefill of {phase.num_tokens:,}"
        rows.append(
            [
                what,
                duration(phase.seconds),
                rate(phase.tokens_per_s or 0),
                amount(phase.read_bytes),
                f"{phase.operations / 1e9:,.1f}",
                phase.binds or "-",
            ]
        )
    yield from columns(rows)
    yield from textwrap.wrap(_roofline_line(plan, roofline), WIDTH)
    if plan.device and plan.device.uncertain:
        doubts = ", ".join(plan.device.uncertain)
        yield f"? uncertain: {'all its figures' if doubts == 'all' else doubts}"


def _replicas(plan: Plan) -> Iterator[str]:
    """One process beside as many as are asked for, on one machine and on several."""
    replicas = plan.replicas
    if replicas is None:
        return

    def speed(tokens_per_s: float | None) -> list[str]:
        return [rate(tokens_per_s) if tokens_per_s else "-"] if plan.speeds is not None else []

    number, users = replicas.num_replicas, f"{replicas.users_each:,}"
    header = ["replicas", "users each", "each", "all", *(["decode tok/s"] if plan.speeds is not None else [])]
    one = None if plan.speeds is None else plan.speeds[0].tokens_per_s
    needed, each, whole = amount(plan.needed_bytes), amount(replicas.each_bytes), amount(replicas.num_bytes)
    yield from columns(
        [
            header,
            ["one process", f"{plan.users:,}", needed, needed, *speed(one)],
            [f"{number} on one machine", users, each, whole, *speed(replicas.same_machine_tokens_per_s)],
            [f"{number}, a machine each", users, each, whole, *speed(replicas.own_machines_tokens_per_s)],
        ]
    )
    more = replicas.num_bytes - plan.needed_bytes
    text = f"Replicas share no memory: they take {amount(more)} more than one process"
    if replicas.prefix_copies_bytes > 0:
        text += f", {amount(replicas.prefix_copies_bytes)} of it for keys and values"
    if plan.fit is not None and (most := plan.fit.memory_bytes) < replicas.num_bytes:
        text += f"; on one machine that is {amount(replicas.num_bytes - most)} too much for {plan.fit.where}"
    yield from textwrap.wrap(f"{text}.", WIDTH)


def _roofline_line(plan: Plan, roofline: Roofline) -> str:
    doubt = " ?" if plan.device and plan.device.uncertain else ""
    limits = [
        f"{roofline.bytes_per_s / 1e9:,.0f} GB/s" if roofline.bytes_per_s else "bandwidth unknown",
        f"{roofline.operations_per_s / 1e12:,.3g} TFLOP/s" if roofline.operations_per_s else "arithmetic unknown",
    ]
    how = "measured here" if roofline.is_measured else "assumed"
    return (
        f"{roofline.name}{doubt}: {', '.join(limits)}; of these {percent(roofline.read_efficiency)} in decode and"
        f" {percent(roofline.compute_efficiency)} in prefill ({how})"
    )


def _needs_comparison(plans: Sequence[Plan]) -> Iterator[str]:
    """What each needs in all, whether it fits, and how fast it would be."""
    has_fit, has_speed = (any(getattr(plan, name) is not None for plan in plans) for name in ("fit", "roofline"))
    head = ["model", "weights", "all"]
    rows = [[*head, *(["fits"] if has_fit else []), *(["decode", "binds", "prefill", "binds"] if has_speed else [])]]
    for plan in plans:
        row = [_marked(plan.model), amount(plan.weights.held_bytes) if plan.weights else "unknown"]
        row.append(amount(plan.needed_bytes) if plan.weights else "-")
        if has_fit:
            row.append({True: "yes", False: "no", None: "?"}[plan.fit.fits if plan.fit else None])
        if has_speed and plan.speeds is not None:
            decode, prefill = plan.speeds
            row += [
                f"{rate(decode.tokens_per_s or 0)} tok/s",
                _binds(decode),
                duration(prefill.seconds),
                _binds(prefill),
            ]
        elif has_speed:
            row += ["-"] * 4
        rows.append(row)
    yield from columns(rows)
    fit, roofline = plans[0].fit, plans[0].roofline
    if fit is not None:
        yield f"fits: into {fit.where} ({amount(fit.memory_bytes)})"
    if roofline is not None:
        yield from textwrap.wrap(_roofline_line(plans[0], roofline), WIDTH)


def _binds(phase: PhaseSpeed) -> str:
    return phase.binds or "-"


def _advice(plan: Plan) -> Iterator[str]:
    for sentence in advice(plan):
        yield from textwrap.wrap(f"- {sentence}", WIDTH, subsequent_indent="  ")


def _marked(shape: ModelShape) -> str:
    return f"{shape.name} ?" if shape.uncertain else shape.name
