"""The fields of a config.json, which nobody vouches for: each is taken by name and checked before it is used."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvik.errors import ModelError
from kvik.files.small_files import read_object

MAX_CONFIG_BYTES = 1 << 20
MAX_WIDTH = 1 << 24  # of any width or count: far above every published model
MAX_CONTEXT = 1 << 31

_HINT = "it must be the config.json of a decoder, as transformers writes it"
OTHER_NAMES = {
    "num_hidden_layers": ("n_layer", "num_layers", "n_layers"),
    "hidden_size": ("n_embd", "d_model", "n_embed"),
    "num_attention_heads": ("n_head", "n_heads"),
    "max_position_embeddings": ("n_positions", "n_ctx", "max_seq_len", "seq_length", "block_size"),
    "intermediate_size": ("ffn_hidden_size", "n_inner", "ffn_dim"),
}


def read_json_object(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The object that a JSON file holds, which must be there. Raises `ModelError`."""
    found = read_object(path, max_bytes, _HINT)
    if found is None:
        raise ModelError(f"{path} is not a file", hint="check its name")
    return found


class ConfigFields:
    """The fields of one object of a file; a field that is null counts as absent."""

    def __init__(self, fields: Mapping[str, Any], path: Path) -> None:
        self.fields = fields
        self.path = path

    def find(self, key: str) -> Any:
        """The value under this name or one that other families use; `None`: there is none."""
        return next(
            (self.fields[one] for one in (key, *OTHER_NAMES.get(key, ())) if self.fields.get(one) is not None), None
        )

    def count(self, key: str, default: int | None = None, *, maximum: int = MAX_WIDTH) -> int:
        """A count from 1 to `maximum`."""
        found = self.find(key)
        if found is None:
            if default is None:
                raise self.error(f"has no {key}")
            return default
        if type(found) is not int or not 1 <= found <= maximum:
            raise self.error(f"{key} is {_shown(found)}; it must be a whole number from 1 to {maximum:,}")
        return found

    def optional(self, key: str) -> int | None:
        """A count that may be missing, null or 0."""
        found = self.find(key)
        return None if found in (None, 0) and found is not False else self.count(key, maximum=MAX_CONTEXT)

    def number(self, key: str, default: float | None = None, *, above: float = 0.0, maximum: float = 1e12) -> float:
        """A number above `above`, up to `maximum`."""
        found = self.find(key)
        if found is None:
            if default is None:
                raise self.error(f"has no {key}")
            return default
        # NaN fails both comparisons.
        if type(found) not in (int, float) or not above < found <= maximum:
            raise self.error(f"{key} is {_shown(found)}; it must be a number above {above:g}, up to {maximum:g}")
        return float(found)

    def optional_number(self, key: str, **bounds: float) -> float | None:
        """A number that may be missing."""
        return None if self.find(key) is None else self.number(key, **bounds)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        found = self.find(key)
        if found is not None and type(found) is not bool:
            raise self.error(f"{key} is {_shown(found)}; it must be true or false")
        return default if found is None else bool(found)

    def text(self, key: str, default: str | None = None) -> str:
        """A name."""
        found = self.find(key)
        if found is None and default is not None:
            return default
        if not isinstance(found, str):
            raise self.error(f"{key} is {_shown(found)}; it must be a name")
        return found

    def list(self, key: str, length: int, kinds: tuple[type, ...]) -> list[Any] | None:
        """A list of so many items of these kinds, which may be missing."""
        found = self.find(key)
        if found is None:
            return None
        if not isinstance(found, list) or len(found) != length or any(type(item) not in kinds for item in found):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise self.error(f"{key} is {reprlib.repr(found)}; it must be a list of {length:,} {names} values")
        if any(isinstance(item, float) and not math.isfinite(item) for item in found):
            raise self.error(f"{key} has items that are not finite numbers")
        return found

    def object(self, key: str) -> ConfigFields | None:
        """An object of its own, which may be missing."""
        found = self.find(key)
        if found is not None and not isinstance(found, dict):
            raise self.error(f"{key} is {_shown(found)}; it must be an object")
        return None if found is None else ConfigFields(found, self.path)

    def error(self, what: str, hint: str = _HINT) -> ModelError:
        """What to raise."""
        return ModelError(f"{self.path}: {what}", hint=hint)


def _shown(value: Any) -> str:
    """The value in one short line; Python refuses to write out integers of thousands of digits."""
    if type(value) is int and value.bit_length() > 64:
        return f"a number of {value.bit_length():,} bits"
    return reprlib.repr(value)
