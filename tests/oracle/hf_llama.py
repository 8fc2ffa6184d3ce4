"""The reference: transformers' LlamaForCausalLM in float32, its weights dequantised from a GGUF file.

Two roads lead to it. transformers' own GGUF loader owes nothing to kvik, but leaves out rope scaling; `build` writes
the conversion out. The tests prove on the default model that both give the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM, GgufConfig, LlamaConfig, LlamaForCausalLM

FloatArray = npt.NDArray[np.float32]

# On a machine whose processors have other work too, two threads wait for each other longer than they save.
torch.set_num_threads(1)

PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE_LAYERS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def load(path: Path) -> Any:
    """The model as transformers itself reads the file."""
    return AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    ).eval()


def build(path: Path, *, rope_scaling: Mapping[str, Any] | None = None) -> Any:
    """The model by our own reading of the file; `rope_scaling` is transformers' way to say what a `rope_freqs` does."""
    reader = GGUFReader(path)

    def field(key: str, default: Any = None) -> Any:
        found = reader.get_field(f"llama.{key}")
        return default if found is None else found.contents()

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    hidden_size, num_heads = field("embedding_length"), field("attention.head_count")
    config = LlamaConfig(
        vocab_size=len(tensors["token_embd.weight"].data),
        hidden_size=hidden_size,
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=num_heads,
        num_key_value_heads=field("attention.head_count_kv"),
        head_dim=field("attention.key_length", hidden_size // num_heads),
        max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")} | dict(rope_scaling or {}),
        tie_word_embeddings="output.weight" not in tensors,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).to(torch.float32).eval()
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for name, tensor in tensors.items():
        if name == "rope_freqs.weight":
            continue
        values = dequantize(tensor.data, tensor.tensor_type)
        part = name.split(".")[-2]
        if part in heads:
            values = halves_from_pairs(values, heads[part])
        weights[_name(name)] = torch.from_numpy(np.array(values, np.float32))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    return model


def halves_from_pairs(rows: FloatArray, num_heads: int) -> FloatArray:
    """Undo the reordering of a GGUF's q and k rows.

    transformers turns dimensions (i, i + head_dim / 2) of a head together, a `llama` GGUF (2i, 2i + 1): the converter
    moved row i of half h to 2i + h.
    """
    pairs = rows.reshape(num_heads, -1, 2, rows.shape[1])  # (head, i, half, columns)
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _name(name: str) -> str:
    if name in OUTSIDE_LAYERS:
        return OUTSIDE_LAYERS[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{PARTS[part]}.{kind}"


def logits(model: Any, token_ids: Sequence[int]) -> FloatArray:
    """Logits after each token, (T, vocab_size), in one pass."""
    with torch.inference_mode():
        rows: FloatArray = model(torch.tensor([list(token_ids)])).logits[0].numpy()
    return rows


def hidden_states(model: Any, token_ids: Sequence[int]) -> FloatArray:
    """What the head sees of each token, behind the last norm: (T, hidden_size), in one pass."""
    seen: list[torch.Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        logits(model, token_ids)
    finally:
        handle.remove()
    rows: FloatArray = seen[0][0].numpy()
    return rows


@dataclass(frozen=True, slots=True)
class Continuation:
    """A greedy continuation."""

    token_ids: list[int]
    logits: FloatArray  # (tokens, vocab_size): what each token was chosen from

    @property
    def gaps(self) -> FloatArray:
        """By how much each chosen token's logit exceeds the next best."""
        best = np.partition(self.logits, -2, axis=1)[:, -2:]
        gaps: FloatArray = best[:, 1] - best[:, 0]
        return gaps


def continue_greedily(model: Any, token_ids: Sequence[int], num_tokens: int) -> Continuation:
    """The most likely token, `num_tokens` times, over transformers' own cache; end-of-text tokens do not stop it."""
    chosen: list[int] = []
    rows = []
    inputs, cache = list(token_ids), None
    with torch.inference_mode():
        for _ in range(num_tokens):
            output = model(torch.tensor([inputs]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            rows.append(output.logits[0, -1].numpy())
            chosen.append(int(rows[-1].argmax()))
            inputs = chosen[-1:]
    return Continuation(chosen, np.stack(rows))
