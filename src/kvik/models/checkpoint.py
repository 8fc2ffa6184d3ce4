"""A checkpoint as transformers writes it: a config and tensors, of which only names, shapes and places are read."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvik.errors import ModelError
from kvik.files.config_fields import read_json_object
from kvik.files.safetensors import StoredTensor, read_safetensors
from kvik.hub.folder import ADAPTER, CONFIG, INDEX, adapter_error, no_weights, path_inside, weight_files
from kvik.models.hf_families import FAMILIES
from kvik.models.hf_parts import hf_parts, is_unused
from kvik.models.mxfp4 import MXFP4_VALUES
from kvik.models.parts import Part, Parts
from kvik.models.spec import DecoderSpec

FLOATS = ("F32", "F16", "BF16")
"""Types of tensors that kvik runs."""

BYTES = ("U8",)
"""The type of blocks of MXFP4, and of their scales."""

_ORIGINAL = "take the original checkpoint, which kvik quantises as it loads (`--weights q4`), or a GGUF of the model"
_NOT_ONE = "weights and config.json do not belong together, or the checkpoint is not whole; download it again"


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A folder's config and tensors, checked for form."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @property
    def config_path(self) -> Path:
        """The file that the config is from."""
        return self.folder / CONFIG

    def type_of(self, part: Part) -> str:
        """The GGUF type of a part as it is stored."""
        return self.tensors[part.stored].dtype if part.scales is None else "MXFP4"


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read config.json and the headers of all files of weights. Raises `ModelError`."""
    config = read_model_config(folder)
    return Checkpoint(folder, config, read_tensors(folder))


def read_model_config(folder: Path) -> Mapping[str, Any]:
    """The folder's config.json, of a kind that kvik may run. Raises `ModelError`."""
    if (folder / ADAPTER).is_file():
        raise adapter_error(str(folder))
    if not (folder / CONFIG).is_file():
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
        if not any(name.endswith(".safetensors") for name in names):
            raise no_weights(str(folder), names)
        raise ModelError(f"{folder} has no {CONFIG}", hint=f"put the model's {CONFIG} beside its weights")
    path = path_inside(folder, CONFIG)
    config = read_json_object(path)
    check_config(config, path)
    return config


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Raise `ModelError` for weights that are quantised already, and for models that are code of their own."""
    model_type, inner = config.get("model_type"), config.get("text_config")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    for fields in (config, inner if isinstance(inner, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            # Which tensors hold blocks, their names tell: the list of modules that do not is of no use.
            if fields.get(key) and not (family and family.quantized_by and _method(fields[key]) == family.quantized_by):
                raise ModelError(f"{path}: the weights are quantised by {_method(fields[key])!r:.60}", hint=_ORIGINAL)
    if config.get("auto_map") and family is None:
        raise ModelError(
            f"{path}: model_type {model_type!r:.60} is code that comes with the model (auto_map), which kvik"
            " never runs",
            hint=f"kvik runs {', '.join(sorted(FAMILIES))}",
        )


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of all files of weights, exactly those that the index promises where there is one."""
    tensors: dict[str, StoredTensor] = {}
    for name, promised in weight_files(folder).items():
        path = path_inside(folder, name)
        if promised is not None and not path.is_file():
            raise ModelError(
                f"{path} is missing; {INDEX} has {len(promised):,} tensors in it, {min(promised)!r:.80} among them",
                hint="the checkpoint is not whole; download the file",
            )
        found = read_safetensors(path)
        for tensor in sorted((promised or found.keys()) ^ found.keys()):
            does = "lacks it" if tensor in found else "says that it is there"
            problem = "is in the file" if tensor in found else "is not in the file"
            raise ModelError(
                f"{path}: tensor {tensor!r:.80} {problem}, but {INDEX} {does}",
                hint="files and index are not of one checkpoint; download it again",
            )
        tensors |= found
    return tensors


def decoder_parts(checkpoint: Checkpoint, spec: DecoderSpec) -> Parts:
    """Where the decoder's tensors lie.

    Raises `ModelError` where one is missing, is of another shape or of a type that kvik does not run, or is left over:
    the decoder is not the one that the checkpoint was made for.
    """
    tensors = checkpoint.tensors
    parts, shapes = hf_parts(spec, tensors.keys()), spec.tensors()
    used = {stored for part in parts.values() for stored in (part.stored, part.scales) if stored is not None}
    extra = sorted(name for name in tensors if name not in used and not is_unused(spec, name))
    missing = min(used - tensors.keys(), default=None)
    if missing is not None:
        files = {tensor.file.path for tensor in tensors.values()}
        near = difflib.get_close_matches(missing, extra, 1)
        raise ModelError(
            f"{files.pop() if len(files) == 1 else checkpoint.folder}: tensor {missing!r:.120} is missing",
            hint=f"{f'there is {near[0]!r:.120}; ' if near else ''}{_NOT_ONE}",
        )
    if extra:
        others = f" (nor have {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise tensors[extra[0]].error(
            f"has no place in a {spec.architecture} decoder of {spec.num_layers:,} layers{others}",
            "the model has a part that kvik does not run, or its config.json is of another; take another model",
        )
    for name, part in parts.items():
        assert not (part.offset and len(shapes[name]) == 2)  # only norms are stored less something
        _check(tensors[part.stored], part.shape, FLOATS if part.scales is None else BYTES)
        if part.scales is not None:
            _check(tensors[part.scales], part.shape[:-1], BYTES)
            if shapes[name][1] % MXFP4_VALUES:
                raise tensors[part.stored].error(
                    f"has blocks of {MXFP4_VALUES} values, which rows of {shapes[name][1]:,} do not divide into",
                    _NOT_ONE,
                )
    return parts


def _check(tensor: StoredTensor, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if tensor.shape != shape:
        raise tensor.error(f"has the shape {tensor.shape}, config.json asks for {shape}", _NOT_ONE)
    if tensor.dtype not in dtypes:
        raise tensor.error(
            f"is of dtype {tensor.dtype}, which kvik does not run",
            f"take one in {', '.join(dtypes)}, or save it so: `model.to(torch.bfloat16).save_pretrained(NEW)`",
        )


def _method(quantization: Any) -> str:
    fields = quantization if isinstance(quantization, dict) else {}
    by_bits = "bitsandbytes" if fields.get("load_in_8bit") or fields.get("load_in_4bit") else "a method without a name"
    return str(fields.get("quant_method") or fields.get("quant_algo") or by_bits)
