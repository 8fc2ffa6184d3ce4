"""gpt-oss: blocks of MXFP4 as its checkpoints hold them, what kvik refuses of them, and a chat in its format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.numpy import load_file, save_file

from families.cases import CASES
from families.checkpoints import write_folder, write_weights
from families.goldens import golden_of
from families.published import PUBLISHED
from kvik import LLM, plan
from kvik.config import WeightFormat
from kvik.errors import ModelError
from kvik.models.checkpoint import read_checkpoint
from kvik.models.checkpoint_source import CheckpointSource
from kvik.models.hf_parts import hf_parts
from kvik.models.hf_spec import read_hf_spec
from kvik.models.loader import load_model
from kvik.models.mxfp4 import gguf_rows
from kvik.ops.native import NativeOps
from kvik.ops.reference import ReferenceOps, ReferenceWeight
from kvik.planner.sources import find_shape
from server_process import Server
from thought_templates import HARMONY
from tool_templates import make

E2M1 = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
NAME = "model.layers.1.mlp.experts."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return golden_of("gpt_oss-mxfp4").write_folder(tmp_path / "model")


def source_of(folder: Path, weights: WeightFormat | None = None) -> CheckpointSource:
    checkpoint = read_checkpoint(folder)
    spec = read_hf_spec(checkpoint.config, checkpoint.config_path)
    return CheckpointSource(checkpoint, spec, ReferenceOps(), weights=weights)


def values_of(blocks: np.ndarray[Any, Any], scales: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What stored blocks mean (OCP Microscaling Formats 1.0): of neighbours, the first in the low half of a byte."""
    pairs = np.stack([E2M1[blocks & 15], E2M1[blocks >> 4]], axis=-1).reshape(*blocks.shape[:-1], 32)
    values: np.ndarray[Any, Any] = np.ldexp(pairs, scales.astype(np.int32)[..., None] - 127)
    return values.reshape(*blocks.shape[:-2], -1)


def test_blocks_change_their_order_and_no_value() -> None:
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (9, 5, 16), dtype=np.uint8)
    scales = rng.integers(0, 253, (9, 5), dtype=np.uint8)
    scales[0, :3] = 0, 1, 252
    found = dequantize(gguf_rows(blocks, scales), GGMLQuantizationType.MXFP4)
    np.testing.assert_array_equal(found, values_of(blocks, scales))


@pytest.mark.parametrize("weights", [None, "q4"])
def test_rows_of_gates_and_ups_alternate(weights: WeightFormat | None, folder: Path) -> None:
    """Also where the other matrices are quantised as they are loaded."""
    source, stored = source_of(folder, weights), load_file(folder / "model.safetensors")
    both = values_of(stored[f"{NAME}gate_up_proj_blocks"], stored[f"{NAME}gate_up_proj_scales"])
    down = values_of(stored[f"{NAME}down_proj_blocks"], stored[f"{NAME}down_proj_scales"])
    wanted = {"ffn_gate_exps": both[:, 0::2], "ffn_up_exps": both[:, 1::2], "ffn_down_exps": down}
    for name, values in wanted.items():
        for expert in (0, 6):
            assert source.kinds()[f"blk.1.{name}.{expert}.weight"][0] == "MXFP4"
            weight = source.matrix(f"blk.1.{name}.{expert}.weight")
            assert isinstance(weight, ReferenceWeight)
            np.testing.assert_array_equal(weight.values, values[expert])
    bias = stored[f"{NAME}gate_up_proj_bias"]
    np.testing.assert_array_equal(source.vector("blk.1.ffn_up_exps.6.bias"), bias[6, 1::2])
    assert source.kinds()["blk.1.attn_q.weight"][0] == ("F32" if weights is None else "Q4_1")
    assert source.kinds()["blk.1.ffn_gate_inp.weight"][0] == "F32"


def test_progress_ends_at_all_bytes(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_model(folder, NativeOps(threads=1), progress=lambda what, done, total: seen.append((done, total)))
    assert seen[-1][0] <= seen[-1][1]
    assert seen[-1][0] > 0.9 * seen[-1][1]


Change = Callable[[dict[str, np.ndarray[Any, Any]], dict[str, Any]], None]


def scaled(value: int) -> Change:
    def change(tensors: dict[str, np.ndarray[Any, Any]], config: dict[str, Any]) -> None:
        tensors[f"{NAME}down_proj_scales"][2, 3, 1] = value

    return change


def resize(tensors: dict[str, np.ndarray[Any, Any]], config: dict[str, Any], width: int) -> None:
    """Experts of another width, whose blocks are rounded up."""
    config["intermediate_size"] = width
    for name, values in tensors.items():
        if "gate_up_proj" in name:
            tensors[name] = np.ascontiguousarray(values[:, : 2 * width])


REFUSED: dict[str, tuple[Change, str]] = {
    "a scale that is no number": (
        scaled(255),
        "down_proj_scales.* has the scale 255, with which values are not finite",
    ),
    "a scale too large": (scaled(253), "has the scale 253"),
    "scales missing": (
        lambda tensors, config: tensors.__delitem__(f"{NAME}down_proj_scales"),
        f"tensor '{NAME}down_proj_scales' is missing",
    ),
    "scales of another shape": (
        lambda tensors, config: tensors.update({f"{NAME}down_proj_scales": np.zeros((7, 160, 4), np.uint8)}),
        r"has the shape \(7, 160, 4\), config.json asks for \(7, 160, 3\)",
    ),
    "blocks of floats": (
        lambda tensors, config: tensors.update(
            {f"{NAME}down_proj_blocks": tensors[f"{NAME}down_proj_blocks"].astype(np.float32)}
        ),
        "is of dtype F32, which kvik does not run",
    ),
    "half a block": (
        lambda tensors, config: resize(tensors, config, 80),
        "has blocks of 32 values, which rows of 80 do not divide into",
    ),
    "another method": (
        lambda tensors, config: config.update(quantization_config={"quant_method": "fp8"}),
        "the weights are quantised by 'fp8'",
    ),
    "another family": (
        lambda tensors, config: config.update(model_type="llama"),
        "the weights are quantised by 'mxfp4'",
    ),
    "another slope": (
        lambda tensors, config: config.update(swiglu_alpha=1.5),
        "swiglu_alpha is 1.5, where kvik runs 1.702",
    ),
    "another bound": (lambda tensors, config: config.update(swiglu_limit=10), "swiglu_limit is 10, where kvik runs 7"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_wrong_is_said(kind: str, folder: Path) -> None:
    change, pattern = REFUSED[kind]
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=pattern):
        load_model(folder, NativeOps(threads=1))


def test_blocks_in_another_family_have_no_place(tmp_path: Path) -> None:
    """Names of tensors, which a stranger chooses, make no blocks of what is none."""
    folder = golden_of("llama").write_folder(tmp_path)
    shapes = dict(golden_of("llama").shapes) | {"model.layers.0.mlp.up_proj.weight_blocks": (190, 5, 16)}
    write_weights(folder, shapes)
    with pytest.raises(ModelError, match="has no place in a llama decoder"):
        load_model(folder, NativeOps(threads=1))


def test_a_plan_of_the_published_model(tmp_path: Path) -> None:
    """Half of the layers keep 128 tokens: 49,152 bytes for each token inside, 24,576 beyond."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["openai/gpt-oss-20b"][0]))
    short, long = (plan(str(tmp_path / "config.json"), context=context, kv="f16").kv for context in (128, 1 << 17))
    assert short.token_bytes == 49_152
    windows = sum(layers.num_bytes for layers in long.layers if layers.window)
    full = next(layers for layers in long.layers if not layers.window)
    assert full.num_bytes == (1 << 17) * 24_576
    assert windows < 2000 * 24_576  # the tokens of a step beside those of the window
    shape = find_shape(str(tmp_path / "config.json"))
    assert shape.num_params == 20_907_786_240  # of matrices; 20.9 billion with biases, norms and sinks
    assert shape.num_active_params == 3_607_142_400 + shape.num_table_params  # 3.6 billion, as its makers count


def test_a_chat_in_channels(tmp_path: Path) -> None:
    """A random model writes an answer of the format when it must: thoughts, then JSON in the last channel."""
    _, tokenizer = make(tmp_path / "tokenizer", HARMONY)
    config = CASES["gpt_oss"] | {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 2048}
    parts = hf_parts(read_hf_spec(config, tmp_path), ()).values()
    folder = write_folder(tmp_path / "model", config, {part.stored: part.shape for part in parts})
    for path in (tmp_path / "tokenizer").iterdir():
        path.rename(folder / path.name)
    (folder / "chat_template.jinja").write_text(HARMONY.source)
    schema = {
        "type": "object",
        "properties": {"cold": {"type": "boolean"}},
        "required": ["cold"],
        "additionalProperties": False,
    }
    body = {
        "messages": [{"role": "user", "content": "Is it cold?"}],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "weather", "schema": schema, "strict": True},
        },
        "max_tokens": 900,
        "temperature": 1.0,
        "seed": 4,
    }
    with Server({"oss": LLM(folder, kv_memory="16MiB", threads=2)}) as server:
        (choice,) = server.client.ok("/v1/chat/completions", body)["choices"]
        server.assert_idle()
    assert choice["finish_reason"] == "stop"
    assert json.loads(choice["message"]["content"]).keys() == {"cold"}
