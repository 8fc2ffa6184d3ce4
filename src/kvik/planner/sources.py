"""From what a caller calls a model to its shape; no weights are read and, but for an unknown Hub id, no network used.

smollm2, llama-3-8b            the model's GGUF header where it is on this machine, else the catalogue
./model.gguf, ./folder         a file's header; a folder's config.json, and the headers of its weights
org/name, org/name:file.gguf   a Hub id's config.json, or the headers of what is cached of it
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from kvik.errors import DownloadError, ModelNotFound
from kvik.hub.folder import is_path
from kvik.planner.catalogue import find_model, near_models
from kvik.planner.shape import ModelShape


def find_shape(name: str) -> ModelShape:
    """The shape of the model of that name. Raises `ModelError`."""
    path = Path(name)
    try:
        path = path.expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError, RuntimeError):  # no path at all: too long, a null byte, an unknown ~user
        is_file = is_folder = False
    looks_like_path = is_path(name) or name.endswith((".gguf", ".json"))
    if is_file and (looks_like_path or "/" in name):
        return _read_file(path, name)
    if is_folder and (looks_like_path or "/" in name):
        return _read_folder(path, name)
    if (shape := _pulled(name) or find_model(name)) is not None:
        return shape
    if looks_like_path and ":" not in name:
        raise ModelNotFound(f"{name:.200} does not exist", hint="give a .gguf file or a folder that has a config.json")
    if "/" in name:
        return _from_hub(name)
    close = near_models(name)
    suggestion = f"did you mean {' or '.join(close)}? " if close else ""
    raise ModelNotFound(
        f"no model is called {name if name.isprintable() and name else repr(name):.80}",
        hint=f"{suggestion}`kvik plan --list models` shows all; a .gguf path, a folder or a Hub id will do too",
    )


def _pulled(name: str) -> ModelShape | None:
    """One of kvik's own models, where it is on this machine."""
    from kvik.hub.store import REGISTRY, find

    if name not in REGISTRY:
        return None
    try:
        path = find(name)
    except ModelNotFound:
        return None
    return _read_file(path, name)


def _read_file(path: Path, name: str) -> ModelShape:
    if path.suffix == ".json":
        from kvik.planner.config_json import read_config

        return read_config(path, name)
    from kvik.planner.gguf_header import read_header

    return read_header(path, name)


def _read_folder(folder: Path, name: str) -> ModelShape:
    config = folder / "config.json"
    if config.is_file():
        from kvik.planner.checkpoint_header import read_folder

        return read_folder(folder, name)
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return _read_file(files[0], name)
    found = f"{len(files)} .gguf files" if files else "no config.json and no .gguf file"
    raise ModelNotFound(f"{folder} has {found}", hint="name one file, or a folder that has a config.json")


def _from_hub(name: str) -> ModelShape:
    from kvik.hub.hugging_face import CHECKPOINT, HubName, config_file
    from kvik.hub.store import find, identify

    source = identify(name)
    assert isinstance(source, HubName)
    if source.file not in (None, CHECKPOINT):
        return _read_file(find(name), name)
    with suppress(ModelNotFound):  # not on this machine: its config is small
        return _read_folder(find(str(replace(source, file=CHECKPOINT))), name)
    try:
        return _read_file(config_file(source), name)
    except DownloadError as error:
        close = near_models(name)
        known = f", or use what the catalogue knows: `kvik plan {close[0]}`" if close else ""
        raise DownloadError(error.message, hint=f"{error.hint}{known}") from error
