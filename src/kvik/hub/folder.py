"""Which files of a folder are a checkpoint: names only, nothing of the tensors.

A checkpoint is what transformers' `save_pretrained` leaves: config.json; model.safetensors, or several such files and
an index that says which tensor lies in which; tokenizer.json.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from kvik.errors import ModelError
from kvik.files.config_fields import read_json_object

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"

SMALL_FILES = (CONFIG, "generation_config.json", "tokenizer*", "chat_template*", "special_tokens_map.json")
"""Patterns of what belongs to a model besides its weights."""

MAX_INDEX_BYTES = 1 << 25
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
OTHER_WEIGHTS = (*PICKLES, "*.h5", "*.msgpack", "*.npz", "*.onnx", "*.gguf")

_SHARDS = "model-*-of-*.safetensors"
_DOWNLOAD = "the checkpoint is not whole; download it again"


def is_inside(relative: str) -> bool:
    """Whether a relative name stays below the folder it is for, and can be shown."""
    return relative.isprintable() and "\\" not in relative and not {"..", ".", ""} & set(relative.split("/"))


def is_path(name: str) -> bool:
    """Whether a model's name can only be a path, by how it begins."""
    return name in (".", "..") or name.startswith(("./", "../", "/", "~"))


def is_model_folder(folder: Path) -> bool:
    """Whether it looks like a checkpoint, be it one that kvik refuses."""
    names = ("config.json", ADAPTER, "*.safetensors", INDEX, *PICKLES)
    return any(next(folder.glob(name), None) is not None for name in names)


def model_bytes(path: Path) -> int:
    """Bytes of a model's file, or of a folder's tensors."""
    return sum(one.stat().st_size for one in path.glob("*.safetensors")) if path.is_dir() else path.stat().st_size


def is_whole(folder: Path) -> bool:
    """Whether all files are there that a checkpoint must have."""
    try:
        files = weight_files(folder)
    except ModelError:
        return False
    return all((folder / name).is_file() for name in (CONFIG, TOKENIZER, *files))


def small_files(names: Iterable[str]) -> list[str]:
    """Those among the names that belong to a model besides its weights."""
    return [name for name in names if "/" not in name and any(fnmatchcase(name, pattern) for pattern in SMALL_FILES)]


def weight_files(folder: Path) -> Mapping[str, Collection[str] | None]:
    """The files that hold the weights, and the tensors that the index promises of each (None: there is no index).

    Raises `ModelError` for a folder that has no safetensors, or an index that is not to be trusted.
    """
    strays = {path.name for path in (*folder.glob(_SHARDS), *folder.glob(WHOLE))}
    if not (folder / INDEX).is_file():
        if WHOLE not in strays:
            raise no_weights(str(folder), sorted(path.name for path in folder.iterdir() if path.is_file()))
        files: dict[str, Collection[str] | None] = {WHOLE: None}
    else:
        files = {**read_index(folder / INDEX)}
    for name in sorted(strays - files.keys()):
        index = f"{INDEX} does not name" if (folder / INDEX).is_file() else f"is not part of {WHOLE}"
        raise ModelError(
            f"{folder / name}: a file of weights that {index}",
            hint="remove what does not belong to this model, or download the checkpoint again",
        )
    return files


def read_index(path: Path) -> dict[str, set[str]]:
    """From each file that the index names to its tensors. Raises `ModelError`."""
    weight_map = read_json_object(path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(
            f"{path}: weight_map is {reprlib.repr(weight_map)}; it must say where each tensor lies", hint=_DOWNLOAD
        )
    files: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not is_inside(name) or not name.endswith(".safetensors"):
            raise ModelError(
                f"{path}: tensor {tensor!r:.80} is listed in {reprlib.repr(name)},"
                " which is not a .safetensors file in this folder",
                hint="the index is damaged or hostile; download the checkpoint from its publisher",
            )
        files.setdefault(name, set()).add(tensor)
    return files


def path_inside(folder: Path, name: str) -> Path:
    """The file's path. Raises `ModelError` where a link leads out of the folder.

    The Hugging Face cache links from a revision's folder to its blobs, which is fine.
    """
    home = folder.resolve()
    places = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    target = (folder / name).resolve()
    if not any(target.is_relative_to(place) for place in places):
        raise ModelError(
            f"{folder / name} is a link to {target}, which is outside of the model's folder",
            hint="put the file itself there; a link to the whole folder is fine",
        )
    return folder / name


def adapter_error(where: str) -> ModelError:
    """What to say of a folder or repository with an adapter."""
    return ModelError(
        f"{where} is an adapter ({ADAPTER}), or a model beside one",
        hint="merge it into its model first: in peft, `model.merge_and_unload().save_pretrained(NEW)`",
    )


def no_weights(where: str, names: Collection[str]) -> ModelError:
    """What to say of a folder or repository that has no safetensors where they should be."""
    safe = [name for name in names if name.endswith(".safetensors")]
    if safe:
        hint = f"if {safe[0]} is all of it, call it {WHOLE}" if len(safe) == 1 else _DOWNLOAD
        return ModelError(f"{where} has {_listed(safe)}, but neither {WHOLE} nor {INDEX}", hint=hint)
    others = [name for name in names if any(fnmatchcase(name, pattern) for pattern in OTHER_WEIGHTS)]
    pickled = [name for name in others if any(fnmatchcase(name, pattern) for pattern in PICKLES)]
    if pickled:
        models = [name for name in pickled if "model" in name] or pickled
        return ModelError(
            f"{where} has its weights in {_listed(models)}, pickled: reading that runs what the file says,"
            " so kvik does not",
            hint="save it as safetensors: in transformers, `AutoModelForCausalLM.from_pretrained(OLD)"
            ".save_pretrained(NEW, safe_serialization=True)`, and the tokenizer likewise",
        )
    if others:
        hint = "kvik reads safetensors, or one .gguf file by its name"
        return ModelError(f"{where} has {_listed(others)}, but no {WHOLE}", hint=hint)
    hint = "kvik reads safetensors and GGUF; give a folder or repository that has them"
    return ModelError(f"{where} has no {WHOLE}", hint=hint)


def _listed(names: Collection[str]) -> str:
    some = sorted(names)[:3]
    return ", ".join(some) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
