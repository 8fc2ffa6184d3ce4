"""A checkpoint's tensors as the decoder gets them: the right rows in any pieces, quantised, in little memory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from checkpoints import FloatArray, as_bf16, random_tensor, tiny_checkpoint, tiny_config, write_checkpoint
from kvik import LLM
from kvik.config import WeightFormat
from kvik.errors import ModelError
from kvik.models import checkpoint_source
from kvik.models.checkpoint import read_checkpoint
from kvik.models.checkpoint_source import CheckpointSource
from kvik.models.hf_parts import hf_parts
from kvik.models.hf_spec import read_hf_spec
from kvik.models.quantize import Quantization
from kvik.models.weights import read_weights
from kvik.ops.native import NativeOps
from kvik.ops.reference import ReferenceOps, ReferenceWeight
from subprocesses import python

GPT2 = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 40, "vocab_size": 75}
NEOX = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 88, "vocab_size": 75}

EXPERTS = {
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "shared_intermediate_size": 64,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": tiny_config(tie_word_embeddings=False),
    "gpt2": {"model_type": "gpt2", **GPT2},  # transposed, fused
    "gpt_bigcode": {"model_type": "gpt_bigcode", **GPT2},  # one KV head
    "gpt_neox": {"model_type": "gpt_neox", **NEOX, "max_position_embeddings": 40},  # fused head by head
    "phi3": tiny_config(model_type="phi3"),  # fused, one behind the other
    "gemma": tiny_config(model_type="gemma", head_dim=16),  # norms less 1
    "opt": tiny_config(model_type="opt", ffn_dim=88, word_embed_proj_dim=64),  # positions from the second row on
    "qwen2_moe": tiny_config(model_type="qwen2_moe", **EXPERTS),  # a tensor for each expert
    "granitemoeshared": tiny_config(model_type="granitemoeshared", **EXPERTS),  # one for all of a layer, fused
}


def random_stored(config: Mapping[str, Any]) -> dict[str, FloatArray]:
    """What the family's files hold, at random."""
    rng = np.random.default_rng(7)
    parts = hf_parts(read_hf_spec(config, Path("config.json")), ())
    return {part.stored: random_tensor(rng, part.shape) for part in parts.values()}


def source_of(folder: Path, weights: WeightFormat | None = None) -> CheckpointSource:
    checkpoint = read_checkpoint(folder)
    spec = read_hf_spec(checkpoint.config, checkpoint.config_path)
    return CheckpointSource(checkpoint, spec, ReferenceOps(), weights=weights)


def matrix_values(source: CheckpointSource, name: str) -> FloatArray:
    weight = source.matrix(name)
    assert isinstance(weight, ReferenceWeight)
    return weight.values


def small_pieces(monkeypatch: pytest.MonkeyPatch, max_values: int) -> None:
    monkeypatch.setattr(checkpoint_source, "FEWEST_VALUES", 1)
    monkeypatch.setattr(checkpoint_source, "MAX_VALUES", max_values)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_tensor_is_what_its_part_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: str
) -> None:
    stored = random_stored(FAMILIES[family])
    source = source_of(write_checkpoint(tmp_path / "m", FAMILIES[family], stored, dtype=dtype, num_shards=2))
    for max_values in (1, 600, 1 << 20):
        small_pieces(monkeypatch, max_values)
        source = source_of(tmp_path / "m")
        for name, shape in source.spec.tensors().items():
            part = source.parts[name]
            values = stored[part.stored] if dtype == "F32" else as_bf16(stored[part.stored])
            values = values if part.item is None else values[part.item]
            values = values.T if part.transposed else values
            wanted = (values if part.rows is None else values[part.rows]) + np.float32(part.offset)
            given = matrix_values(source, name) if len(shape) == 2 else source.vector(name)
            assert given.shape == shape
            np.testing.assert_array_equal(given, wanted)


def test_families_here_cut_turn_and_shift() -> None:
    """What the test before is about."""
    kinds = set()
    for config in FAMILIES.values():
        for part in hf_parts(read_hf_spec(config, Path("config.json")), ()).values():
            kinds |= {type(part.rows), "turned" if part.transposed else "", "shifted" if part.offset else ""}
            kinds.add("" if part.item is None else "an item")
    assert {slice, np.ndarray, "turned", "shifted", "an item"} <= kinds


def test_every_second_column_of_a_turned_item_is_a_row(tmp_path: Path) -> None:
    """As where gates and ups take turns."""
    config = FAMILIES["granitemoeshared"]
    stored = random_stored(config)
    source, name = source_of(write_checkpoint(tmp_path / "m", config, stored)), "blk.1.ffn_up_exps.3.weight"
    part = source.parts[name]
    source.parts = {**source.parts, name: replace(part, rows=slice(1, None, 2), transposed=True)}
    source.shapes[name] = (part.shape[2] // 2, part.shape[1])
    np.testing.assert_array_equal(matrix_values(source, name), stored[part.stored][3].T[1::2])


def test_routers_stay(tmp_path: Path) -> None:
    config = FAMILIES["qwen2_moe"]
    stored = random_stored(config)
    source = source_of(write_checkpoint(tmp_path / "m", config, stored), "q4")
    kinds = {name: kind for name, (kind, _, _) in source.kinds().items()}
    assert {kinds[f"blk.0.{name}.weight"] for name in ("ffn_gate_inp", "ffn_gate_inp_shexp")} == {"F32"}
    assert {kinds[f"blk.0.{name}.weight"] for name in ("ffn_up_exps.3", "ffn_down_shexp")} == {"Q4_1"}
    read_weights(source.spec, source)
    assert source.quantization is not None
    assert source.quantization.kept == ()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_the_native_backend_packs_pieces_as_wholes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    folder = write_checkpoint(tmp_path / "m", FAMILIES[family], random_stored(FAMILIES[family]))
    embedded = []
    for max_values in (1, 700, 1 << 20):
        small_pieces(monkeypatch, max_values)
        source, ops = source_of(folder), NativeOps(threads=1)
        source.ops = ops
        rows = np.arange(source.shapes["blk.1.attn_q.weight"][0], dtype=np.int32)
        embedded.append(ops.embed(source.matrix("blk.1.attn_q.weight"), rows))
    np.testing.assert_array_equal(embedded[0], matrix_values(source_of(folder), "blk.1.attn_q.weight"))
    np.testing.assert_array_equal(embedded[0], embedded[1])
    np.testing.assert_array_equal(embedded[0], embedded[2])


def relative(changed: FloatArray, values: FloatArray) -> float:
    return math.sqrt(
        float(np.square(changed - values, dtype=np.float64).sum() / np.square(values, dtype=np.float64).sum())
    )


@pytest.mark.parametrize(
    ("weights", "kind", "table_kind", "error"), [("q8", "Q8_0", "Q8_0", 0.006), ("q4", "Q4_1", "Q8_0", 0.08)]
)
def test_matrices_are_quantised_as_the_library_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: WeightFormat, kind: str, table_kind: str, error: float
) -> None:
    config = FAMILIES["llama"]
    stored = random_stored(config)
    folder = write_checkpoint(tmp_path / "m", config, stored)
    small_pieces(monkeypatch, 700)
    source = source_of(folder, weights)
    read_weights(source.spec, source)
    changes: dict[str, tuple[FloatArray, FloatArray]] = {}
    for name, shape in source.spec.tensors().items():
        if len(shape) == 1:
            continue
        values = stored[source.parts[name].stored]
        its = GGMLQuantizationType[table_kind if name in ("token_embd.weight", "output.weight") else kind]
        wanted = dequantize(quantize(values, its), its)
        np.testing.assert_array_equal(matrix_values(source_of(folder, weights), name), wanted)
        changes[source.parts[name].stored] = (wanted, values)
    report = source.quantization
    assert report is not None
    changed, all_values = (np.concatenate([pair[index].ravel() for pair in changes.values()]) for index in (0, 1))
    assert report.error == pytest.approx(relative(changed, all_values))
    errors = {name: relative(*pair) for name, pair in changes.items()}
    assert report.worst_tensor == max(errors, key=lambda name: errors[name])
    assert report.worst_error == pytest.approx(errors[report.worst_tensor])
    assert report.worst_error == pytest.approx(error, rel=0.15)
    assert (report.num_tensors, report.kept) == (len(changes), ())


def test_the_four_bits_are_those_with_less_error() -> None:
    rng = np.random.default_rng(0)
    for values in (rng.normal(0, 1, (64, 256)), rng.standard_t(4, (64, 256)), rng.laplace(0, 1, (64, 256))):
        plain = values.astype(np.float32)
        errors = {
            kind: relative(dequantize(quantize(plain, kind), kind), plain)
            for kind in (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1)
        }
        assert min(errors, key=lambda kind: errors[kind]) == GGMLQuantizationType.Q4_1


def test_what_cannot_be_quantised_stays_and_is_said(tmp_path: Path) -> None:
    config = tiny_config(intermediate_size=90)
    source = source_of(write_checkpoint(tmp_path / "m", config, random_stored(config)), "q4")
    read_weights(source.spec, source)
    report = source.quantization
    assert report is not None
    kept = tuple(f"model.layers.{index}.mlp.down_proj.weight" for index in range(2))
    assert report.kept == kept
    assert str(report).endswith(f"; not quantised, as their columns do not divide by 32: {', '.join(kept)}")


def test_a_table_of_positions_stays(tmp_path: Path) -> None:
    config = FAMILIES["gpt2"]
    stored = random_stored(config)
    source = source_of(write_checkpoint(tmp_path / "m", config, stored), "q8")
    np.testing.assert_array_equal(matrix_values(source, "position_embd.weight"), stored["transformer.wpe.weight"])
    assert source.quantization is not None
    assert source.quantization.kept == ()


def test_the_report_in_a_line() -> None:
    assert str(Quantization("q4", 0.0712, "a.weight", 0.1234, 9, ())) == (
        "weights as q4: relative error 7.12%, worst 12.3% (a.weight)"
    )
    many = Quantization("q8", 0.005, "a", 0.005, 1, ("b", "c", "d", "e"))
    assert str(many) == (
        "weights as q8: relative error 0.50%; not quantised, as their columns do not divide by 32: b, c and 2 more"
    )


def test_weights_that_half_precision_cannot_scale_are_refused(tmp_path: Path) -> None:
    stored = random_stored(FAMILIES["llama"])
    name = "model.layers.0.mlp.up_proj.weight"
    stored[name] = stored[name] * np.float32(1e30)
    folder = write_checkpoint(tmp_path / "m", FAMILIES["llama"], stored)
    with pytest.raises(ModelError, match=rf"tensor '{name}' has values too large for q8") as caught:
        source_of(folder, "q8").matrix("blk.0.ffn_up.weight")
    assert "without" in caught.value.hint


def test_zeros_and_tiny_weights_are_quantised(tmp_path: Path) -> None:
    stored = random_stored(FAMILIES["llama"])
    stored["model.layers.0.mlp.up_proj.weight"][:] = 0
    stored["model.layers.1.mlp.up_proj.weight"][:] = 1e-40
    folder = write_checkpoint(tmp_path / "m", FAMILIES["llama"], stored)
    for weights in ("q8", "q4"):
        source = source_of(folder, weights)
        for index in range(2):
            assert np.abs(matrix_values(source, f"blk.{index}.ffn_up.weight")).max() < 1e-7


def test_quantised_models_write(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    logits: dict[str | None, npt.NDArray[np.float32]] = {}
    for weights in (None, "q8", "q4"):
        llm = LLM(folder, weights=weights, context=64, threads=1, activations="int16")
        logits[weights] = np.asarray([one.logprob for one in _logprobs(llm)])
        assert (llm.model.quantization is None) == (weights is None)
    distances = {weights: float(np.abs(logits[weights] - logits[None]).max()) for weights in ("q8", "q4")}
    assert 0 < distances["q8"] < distances["q4"] < 1


def _logprobs(llm: LLM) -> list[Any]:
    from kvik import SamplingParams

    params = SamplingParams(max_tokens=1, echo=True, logprobs=0, ignore_eos=True)
    (completion,) = llm.generate([list(range(5, 40))], params)
    return [one for one in completion.prompt_logprobs or [] if one is not None]


# In a process of its own, of which the kernel knows the most memory that it ever had.
MEMORY = """
import json, sys
from pathlib import Path
import numpy as np
from kvik.models.checkpoint import read_checkpoint
from kvik.models.checkpoint_source import CheckpointSource
from kvik.models.hf_spec import read_hf_spec
from kvik.models.weights import read_weights
from kvik.ops.native import NativeOps
import gguf.quants  # what quantising imports is no part of the model

def status(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))

folder, weights = Path(sys.argv[1]), sys.argv[2] or None
ops = NativeOps(threads=1)
checkpoint = read_checkpoint(folder)
spec = read_hf_spec(checkpoint.config, checkpoint.config_path)
source = CheckpointSource(checkpoint, spec, ops, weights=weights)
before = status("VmRSS")
assert status("VmHWM") - before < 2 << 20
loaded = read_weights(spec, source)
print(json.dumps({"peak": status("VmHWM") - before, "left": status("VmRSS") - before, "size": source.num_bytes}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of it in the tables, whose rows are many; a head of its own, that is read last."""
    config = tiny_config(
        vocab_size=32_000, hidden_size=512, intermediate_size=2048, num_hidden_layers=10, tie_word_embeddings=False
    )
    rng = np.random.default_rng(0)

    def values(shape: tuple[int, ...]) -> FloatArray:
        sample = rng.normal(0, 0.02, 1 << 20).astype(np.float32)
        return np.resize(sample, shape)

    parts = hf_parts(read_hf_spec(config, Path("config.json")), ())
    tensors = {part.stored: values(part.shape) for part in parts.values()}
    return write_checkpoint(tmp_path_factory.mktemp("large") / "m", config, tensors, dtype="BF16", num_shards=2)


@pytest.mark.parametrize("weights", ["", "q4"])
def test_loading_takes_little_more_memory_than_the_model(large: Path, weights: str) -> None:
    done = python("-c", MEMORY, str(large), weights)
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout)
    assert sizes["size"] > (140e6 if not weights else 40e6)
    assert 0.98 * sizes["size"] < sizes["peak"] < 1.1 * sizes["size"], sizes
