"""Whether a folder is a checkpoint that kvik reads, and what to do where it is another kind."""

from __future__ import annotations

from pathlib import Path

from kvik.errors import ModelError, ModelNotFound
from kvik.models.config_fields import ConfigFields, read_json_object

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SAFE = (
    "save it as safetensors where you trust it:"
    " AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other, safe_serialization=True)"
)


def is_checkpoint(path: Path) -> bool:
    """Whether a path looks like a checkpoint folder."""
    return path.is_dir() and (path / "config.json").exists()


def model_bytes(path: Path) -> int:
    """Bytes of a model's file, or of a folder's tensors."""
    return sum(one.stat().st_size for one in path.glob("*.safetensors")) if path.is_dir() else path.stat().st_size


def check_folder(folder: Path) -> None:
    """Raise `ModelError` or `ModelNotFound` for a folder that holds no checkpoint that kvik reads."""
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise ModelError(
            f"{folder} holds an adapter, not a model", hint="merge it into its model first: peft's merge_and_unload()"
        )
    if not (folder / "config.json").exists():
        raise ModelNotFound(
            f"{folder} has no config.json", hint="name a checkpoint folder as transformers saves it, or a .gguf file"
        )
    config = ConfigFields(read_json_object(folder / "config.json"), folder / "config.json")
    quantized = config.object("quantization_config")
    if quantized is not None:
        method = quantized.text("quant_method", "unnamed")
        raise config.error(
            f"the weights are quantised by {method!r:.40}, which kvik does not read",
            "take the unquantised checkpoint, with `--weights q8` or q4 if it is too large, or a GGUF of the model",
        )
    from kvik.models.hf_spec import FAMILIES

    model_type = config.text("model_type", "")
    if "auto_map" in config.fields and model_type not in FAMILIES and config.find("text_config") is None:
        raise config.error(
            f"model_type {model_type!r:.60} needs code from the model's folder, which kvik never runs",
            f"kvik runs {', '.join(sorted(FAMILIES))}",
        )
    has_tensors = (folder / "model.safetensors").exists() or (folder / "model.safetensors.index.json").exists()
    if has_tensors:
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(f"{folder} has pickled weights ({pickles[0]}), which can run code when read", hint=_SAFE)
    raise ModelNotFound(
        f"{folder} has neither model.safetensors nor its index", hint="download the checkpoint again, all of its files"
    )
