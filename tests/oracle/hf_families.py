"""Small checkpoints that transformers itself saved, and what it makes of them in float32."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from families.checkpoints import write_folder
from oracle.hf_llama import FloatArray, logits


@dataclass(frozen=True, slots=True)
class SavedModel:
    """A checkpoint folder and transformers' model of it."""

    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    model: Any

    def logits(self, token_ids: list[int]) -> FloatArray:
        """Logits after each token, (T, vocab_size), in one pass."""
        return logits(self.model, token_ids)

    def exact_logits(self, token_ids: list[int]) -> FloatArray:
        """The same in float64 throughout: norms, angles and softmax too, which transformers has in float32 always."""
        model = copy.deepcopy(self.model).double()
        to, softmax = torch.Tensor.to, torch.nn.functional.softmax

        def to_float64(tensor: Any, *arguments: Any, **options: Any) -> Any:
            wanted = [torch.float64 if each is torch.float32 else each for each in arguments]
            return to(tensor, *wanted, **{k: torch.float64 if v is torch.float32 else v for k, v in options.items()})

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "to", to_float64)
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            patch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))
            return logits(model, token_ids)

    def chosen_experts(self, token_ids: list[int]) -> list[tuple[list[list[int]], list[float]]]:
        """Of each sparse layer, the experts of each token, and how near one came to take another one's place.

        That is the difference of router logits between the last that is chosen and the first that is not.
        """
        found: list[tuple[list[list[int]], list[float]]] = []

        def keep(module: Any, arguments: Any, result: tuple[Any, Any, Any]) -> None:
            router_logits, _, chosen = result
            if type(module).__name__ == "Gemma4TextRouter":  # which gives their softmax
                router_logits = router_logits.log()
            number, ordered = chosen.shape[-1], router_logits.sort(dim=-1, descending=True).values
            has_others = ordered.shape[1] > number
            gaps = ordered[:, number - 1] - ordered[:, number] if has_others else ordered[:, 0] * 0 + float("inf")
            found.append((chosen.sort(dim=-1).values.tolist(), gaps.tolist()))

        routers = [module for name, module in self.model.named_modules() if type(module).__name__.endswith("Router")]
        hooks = [router.register_forward_hook(keep) for router in routers]
        self.logits(token_ids)
        for hook in hooks:
            hook.remove()
        return found


def save_checkpoint(folder: Path, config: Mapping[str, Any]) -> SavedModel:
    """The model of a config.json: saved by transformers, given weights that follow from their names, loaded again."""
    written, saved = folder / "written", folder / "saved"
    written.mkdir(parents=True)
    (written / "config.json").write_text(json.dumps(config))
    read = AutoConfig.from_pretrained(written)
    is_text = type(read) in AutoModelForCausalLM._model_mapping.keys()  # noqa: SIM118 (it has no iterator)
    auto: Any = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
    auto.from_config(read).save_pretrained(saved)
    with safe_open(saved / "model.safetensors", "np") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    saved_config = json.loads((saved / "config.json").read_text())
    if "quantization_config" in config:  # of which a model made from a config alone knows nothing
        saved_config["quantization_config"] = config["quantization_config"]
        shapes = dict(in_blocks(shapes))
    write_folder(saved, saved_config, shapes)
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = auto.from_pretrained(saved, dtype=torch.float32, **plain).eval()
    return SavedModel(saved, saved_config, shapes, model)


def in_blocks(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensors of a checkpoint of gpt-oss as they are in MXFP4: those of experts are two, without being transposed."""
    for name, shape in shapes.items():
        if name.endswith((".gate_up_proj", ".down_proj")):
            num_experts, columns, rows = shape
            yield f"{name}_blocks", (num_experts, rows, columns // 32, 16)
            yield f"{name}_scales", (num_experts, rows, columns // 32)
        else:
            yield name, shape


def random_ids(num_tokens: int, seed: int = 1) -> list[int]:
    """Token ids that every case's vocabulary has and that mean nothing special."""
    return [int(token_id) for token_id in np.random.default_rng(seed).integers(3, 255, num_tokens)]
