"""Facts about models and devices: data/models.json and data/devices.json, each entry with its source and its doubts."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from kvik.cache import GroupSpec
from kvik.errors import InvalidInput
from kvik.planner.near import near, plain
from kvik.planner.shape import ModelShape, group_without_kv, kv_group, latent_group

_ENDINGS = ("instruct", "chat", "hf", "base", "it")  # of names that are the same shape


@dataclass(frozen=True, slots=True)
class Device:
    """What a device holds and does at best; `None` where the figure is not known."""

    name: str
    kind: str
    memory_bytes: int | None
    bytes_per_s: float | None
    operations_per_s: float | None  # dense, 16-bit floats; a multiply-add is two
    source: str
    uncertain: tuple[str, ...] = ()
    note: str = ""


@functools.cache
def model_entries() -> dict[str, Mapping[str, Any]]:
    """Every entry of the catalogue of models by its name, in the data's own words."""
    return {entry["name"]: entry for entry in _read("models.json")}


@functools.cache
def device_entries() -> dict[str, Mapping[str, Any]]:
    """Every entry of the catalogue of devices by its name, in the data's own words."""
    return {entry["name"]: entry for entry in _read("devices.json")}


def find_model(name: str) -> ModelShape | None:
    """The catalogue's model of that name or alias, whatever its case and separators; `None` where there is none."""
    keys = _keys(model_entries().values())
    wanted = plain(name)
    for ending in ("", *_ENDINGS):
        if wanted.endswith(ending) and (found := keys.get(wanted.removesuffix(ending))):
            return shape_of(model_entries()[found])
    return None


def near_models(name: str) -> list[str]:
    """Names of the catalogue's models that are like this one."""
    return near(name.rpartition("/")[2], _keys(model_entries().values()))


def find_device(name: str) -> Device:
    """The device of that name or alias, or the only one whose name has it as a part. Raises `InvalidInput`."""
    entries, wanted = device_entries(), plain(name)
    found = _keys(entries.values()).get(wanted)
    if found is None:
        parts = [one for one in entries if wanted and wanted in plain(one)]
        if len(parts) != 1:
            close = parts or near(name, _keys(entries.values()))
            what = "stands for several devices" if parts else "is no device of the catalogue"
            hint = f"take one of: {', '.join(close)}" if close else "`kvik plan --list devices` shows all"
            raise InvalidInput(f"{_shown(name)} {what}", hint=hint)
        found = parts[0]
    return device_of(entries[found])


def device_of(entry: Mapping[str, Any]) -> Device:
    """An entry as the planner uses it."""

    def scaled(key: str, factor: float) -> float | None:
        return None if entry[key] is None else entry[key] * factor

    memory = scaled("memory_gb", 1e9)
    return Device(
        name=entry["name"],
        kind=entry["kind"],
        memory_bytes=None if memory is None else int(memory),
        bytes_per_s=scaled("bandwidth_gbs", 1e9),
        operations_per_s=scaled("fp16_dense_tflops", 1e12),
        source=entry["source"],
        uncertain=tuple(entry["uncertain"]),
        note=entry.get("note", ""),
    )


def shape_of(entry: Mapping[str, Any]) -> ModelShape:
    """An entry as the planner uses it."""
    return ModelShape(
        name=entry["name"],
        origin="catalogue",
        source=entry["source"],
        num_layers=entry["layers"],
        hidden_size=entry["hidden"],
        num_heads=entry["heads"],
        num_kv_heads=entry["kv_heads"],
        head_dim=entry["head_dim"],
        groups=tuple(_groups(entry)),
        max_context=entry["max_context"],
        vocab_size=entry["vocab"],
        num_params=round(entry["params_b"] * 1e9),
        is_mixture="active_params_b" in entry,
        num_active_params=round(entry["active_params_b"] * 1e9) if entry.get("active_params_b") else None,
        uncertain=tuple(entry["uncertain"]),
        note=entry.get("note", ""),
        often_quoted_as_mha=entry.get("often_quoted_as_mha", False),
    )


def _groups(entry: Mapping[str, Any]) -> Iterable[GroupSpec]:
    """Of the layers only their number is known, not which of them are of a kind."""
    kv_heads, head_dim = entry["kv_heads"], entry["head_dim"]
    full, windowed, without = entry["full_layers"], entry["windowed_layers"], entry["layers_without_kv"]
    if full and "kv_lora_rank" in entry:
        yield latent_group(full, entry["kv_lora_rank"], entry["qk_rope_head_dim"])
    elif full:
        yield kv_group(0, full, entry.get("global_kv_heads", kv_heads), entry.get("global_head_dim", head_dim))
    if windowed:
        group = kv_group(full, windowed, kv_heads, head_dim, entry.get("chunk", entry.get("sliding_window")))
        yield replace(group, kind="chunk") if "chunk" in entry else group
    if without:
        yield group_without_kv(full + windowed, without)


def _keys(entries: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Every way to write a name or an alias, and the name."""
    return {plain(one): entry["name"] for entry in entries for one in (entry["name"], *entry["aliases"])}


def _shown(name: str) -> str:
    short = name if len(name) <= 80 else f"{name[:80]}…"
    return short if short.isprintable() and short.strip() else repr(short)


def _read(name: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(files("kvik.planner").joinpath("data", name).read_text("utf-8"))
    return entries
