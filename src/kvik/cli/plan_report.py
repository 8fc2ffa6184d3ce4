"""What `kvik plan --json` prints: names that stay (docs/reference/plan-json.md), bytes as whole numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from kvik.planner.advice import advice
from kvik.planner.catalogue import device_entries, device_of, model_entries, shape_of
from kvik.planner.memory import KVMemory
from kvik.planner.plan import Plan
from kvik.planner.shape import ModelShape
from kvik.planner.speed import PhaseSpeed

HEAD = {"kind": "kvik plan", "version": 1}


def plan_report(plan: Plan) -> dict[str, Any]:
    """One model."""
    return {
        **HEAD,
        "model": model_report(plan.model),
        "load": {
            "context": plan.context,
            "users": plan.users,
            "prefix_tokens": plan.prefix,
            "kv_dtype": plan.kv.dtype,
            "weights": plan.weights and plan.weights.format,
        },
        "memory": {
            "weights_bytes": plan.weights and plan.weights.held_bytes,
            "kv_bytes": plan.kv.num_bytes,
            "kv_unshared_bytes": plan.unshared_kv_bytes,
            "kv_auto_bytes": plan.auto_kv_bytes,
            "activations_bytes": plan.activation_bytes,
            "tables_bytes": plan.table_bytes,
            "total_bytes": plan.needed_bytes,
        },
        "kv": {dtype: _kv_report(kv) for dtype, kv in plan.kv_by_dtype.items()},
        "weights": {
            name: {"held_bytes": one.held_bytes, "file_bytes": one.file_bytes, "step_bytes": one.step_bytes}
            for name, one in plan.weights_by_format.items()
        },
        "what_if": [
            {
                "attention": row.attention,
                "num_kv_heads": row.num_kv_heads,
                "kv_token_bytes": row.token_bytes,
                "kv_bytes": row.num_bytes,
                "of_mha": row.of_mha,
                "as_it_is": row.as_it_is,
            }
            for row in plan.what_ifs
        ],
        "fit": _fit_report(plan),
        "device": plan.device and asdict(plan.device),
        "speed": _speed_report(plan),
        "replicas": plan.replicas and asdict(plan.replicas),
        "advice": advice(plan),
    }


def comparison_report(plans: Sequence[Plan]) -> dict[str, Any]:
    """Several, in the order asked for."""
    return {**HEAD, "models": [plan_report(plan) for plan in plans]}


def listing(what: Literal["models", "devices"]) -> dict[str, Any]:
    """The whole catalogue."""
    if what == "models":
        return {**HEAD, "models": [model_report(shape_of(entry)) for entry in model_entries().values()]}
    return {**HEAD, "devices": [asdict(device_of(entry)) for entry in device_entries().values()]}


def model_report(shape: ModelShape) -> dict[str, Any]:
    """A model's figures, where they come from, and which are in doubt."""
    return {
        "name": shape.name,
        "origin": shape.origin,
        "source": shape.source,
        "attention": shape.attention,
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "layers": [
            {
                "kind": group.kind,
                "num_layers": group.num_layers,
                "num_kv_heads": 0 if group.kind == "latent" else group.num_kv_heads,
                "head_dim": 0 if group.kind == "latent" else group.key.num_items,
                "window": group.window,
                "latent_dims": [group.key.num_items - group.key.num_rotary, group.key.num_rotary]
                if group.kind == "latent"
                else None,
                "index_dims": group.index and group.index.num_items,
            }
            for group in shape.groups
        ],
        "max_context": shape.max_context,
        "vocab_size": shape.vocab_size,
        "num_params": shape.num_params,
        "is_mixture": shape.is_mixture,
        "num_active_params": shape.num_active_params if shape.is_mixture else shape.num_params,
        "num_experts": shape.num_experts,
        "num_chosen_experts": shape.num_chosen_experts,
        "uncertain": list(shape.uncertain),
        "note": shape.note,
    }


def _kv_report(kv: KVMemory) -> dict[str, Any]:
    return {
        "token_bytes": kv.token_bytes,
        "token_bytes_at_context": kv.token_bytes_at_context,
        "sequence_bytes": kv.sequence_bytes,
        "total_bytes": kv.num_bytes,
        "layers": [
            {
                "kind": layer.kind,
                "num_layers": layer.num_layers,
                "window": layer.window,
                "token_bytes": layer.token_bytes,
                "sequence_tokens": layer.sequence_tokens,
                "num_blocks": layer.num_blocks,
                "total_bytes": layer.num_bytes,
            }
            for layer in kv.layers
        ],
    }


def _fit_report(plan: Plan) -> dict[str, Any] | None:
    fit = plan.fit
    if fit is None:
        return None
    change = fit.change
    return {
        "where": fit.where,
        "memory_bytes": fit.memory_bytes,
        "needed_bytes": fit.needed_bytes,
        "spare_bytes": fit.spare_bytes,
        "fits": fit.fits,
        "largest_context": fit.largest_context,
        "most_users": fit.most_users,
        "change": change
        and {"what": change.what, "needed_bytes": change.num_bytes, "costs_quality": change.costs_quality},
    }


def _speed_report(plan: Plan) -> dict[str, Any] | None:
    if plan.roofline is None or plan.speeds is None:
        return None
    decode, prefill = plan.speeds
    return asdict(plan.roofline) | {"decode": _phase_report(decode), "prefill": _phase_report(prefill)}


def _phase_report(phase: PhaseSpeed) -> dict[str, Any]:
    return {
        "num_tokens": phase.num_tokens,
        "read_bytes": phase.read_bytes,
        "operations": phase.operations,
        "read_s": phase.read_s,
        "compute_s": phase.compute_s,
        "seconds": phase.seconds,
        "tokens_per_s": phase.tokens_per_s,
        "binds": phase.binds,
    }
