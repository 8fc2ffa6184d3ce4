"""The small text files of a model's folder, which nobody vouches for: read with a limit, and as JSON objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvik.errors import ModelError

FETCH_AGAIN = "the file is damaged or badly converted; fetch or convert it again"


def folder_error(path: Path, what: str, hint: str = FETCH_AGAIN) -> ModelError:
    """The error for a file of a model's folder."""
    return ModelError(f"{path}: {what}", hint=hint)


def read_text(path: Path, max_bytes: int, hint: str = FETCH_AGAIN) -> str | None:
    """A file's text, or None where there is no such file. Raises `ModelError`."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise folder_error(path, f"cannot be read: {error.strerror}", "make the file readable") from error
    if len(data) > max_bytes:
        raise folder_error(path, f"more than {max_bytes:,} bytes", hint)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise folder_error(path, f"not UTF-8 at byte {error.start:,}", hint) from error


def parse_object(text: str, path: Path, hint: str = FETCH_AGAIN) -> dict[str, Any]:
    """The JSON object that `text`, from the file `path`, consists of. Raises `ModelError`."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise folder_error(path, f"not valid JSON: {' '.join(str(error).split()):.80}", hint) from error
    if not isinstance(values, dict):
        raise folder_error(path, f"holds {type(values).__name__}, not an object", hint)
    return values


def read_object(path: Path, max_bytes: int, hint: str = FETCH_AGAIN) -> dict[str, Any] | None:
    """The JSON object in a file, or None where there is no such file. Raises `ModelError`."""
    text = read_text(path, max_bytes, hint)
    return None if text is None else parse_object(text, path, hint)
