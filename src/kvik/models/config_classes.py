"""What a config.json leaves to its class: names, defaults and the text part, by model_type (config_classes.json).

Source: the configuration classes of transformers 5.23, read by tests/families/make_config_classes.py.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from kvik.files.config_fields import OTHER_NAMES, ConfigFields

_NOT_THEIRS = ("block_size",)  # other senses of a generic name, in classes that are known


@functools.cache
def _table() -> Mapping[str, Any]:
    table: Mapping[str, Any] = json.loads(files("kvik.models").joinpath("config_classes.json").read_text("utf-8"))
    return table


def is_known(model_type: str) -> bool:
    """Whether transformers has a class of that name for causal language models."""
    return model_type in _table()["classes"]


def has_field(model_type: str, name: str) -> bool:
    """Whether the class has a field of that name, among those that decide memory."""
    return name in _table()["classes"].get(model_type, {}).get("defaults", {})


def is_encoder_decoder(model_type: str) -> bool:
    """Whether its decoder attends to an encoder too."""
    return bool(_table()["classes"].get(model_type, {}).get("encoder_decoder", False))


def text_part(config: Mapping[str, Any], path: Path) -> ConfigFields:
    """The fields of the part that reads and writes text, as the file has them."""
    fields = ConfigFields(config, path)
    inner = fields.object("text_config")
    if inner is None:
        return fields
    outer = fields.text("model_type", "")
    wrapped = _table()["wrappers"].get(outer, outer)
    return ConfigFields({**config, "model_type": wrapped, **inner.fields}, path)


def with_defaults(fields: ConfigFields) -> ConfigFields:
    """The same fields under their first names, and the class's defaults for what the file does not say.

    What it says to be null stays null, as it does in transformers.
    """
    model_type = fields.text("model_type", "")
    entry = _table()["classes"].get(model_type)
    own = dict(fields.fields)
    for stored, name in (entry or {}).get("names", {}).items():
        if stored in own:
            own.setdefault(name, own[stored])
    for name, others in OTHER_NAMES.items():
        for other in others:
            if name not in own and own.get(other) is not None and (entry is None or other not in _NOT_THEIRS):
                own[name] = own[other]
    return ConfigFields({**(entry or {}).get("defaults", {}), **own}, fields.path)
