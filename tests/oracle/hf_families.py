"""Small checkpoints that transformers itself saved, and what it makes of them in float32."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

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


def save_checkpoint(folder: Path, config: Mapping[str, Any]) -> SavedModel:
    """The model of a config.json: saved by transformers, given weights that follow from their names, loaded again."""
    written, saved = folder / "written", folder / "saved"
    written.mkdir(parents=True)
    (written / "config.json").write_text(json.dumps(config))
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(written)).save_pretrained(saved)
    with safe_open(saved / "model.safetensors", "np") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    saved_config = json.loads((saved / "config.json").read_text())
    write_folder(saved, saved_config, shapes)
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32, attn_implementation="eager").eval()
    return SavedModel(saved, saved_config, shapes, model)


def random_ids(num_tokens: int, seed: int = 1) -> list[int]:
    """Token ids that every case's vocabulary has and that mean nothing special."""
    return [int(token_id) for token_id in np.random.default_rng(seed).integers(3, 255, num_tokens)]
