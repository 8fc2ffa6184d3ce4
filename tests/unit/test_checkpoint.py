"""Checkpoint folders: what loads, and what is wrong with those that do not, in a line that names tensor and file."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import (
    tiny_checkpoint,
    tiny_config,
    tiny_tensors,
    write_checkpoint,
    write_index,
    write_safetensors,
)
from kvik import LLM, SamplingParams
from kvik.engine.engine import Engine
from kvik.errors import InvalidInput, KvikError, ModelError, NotEnoughMemory
from kvik.hub.folder import is_whole
from kvik.hub.progress import bytes_progress
from kvik.models import loader
from kvik.models.loader import LoadedModel, load_model
from kvik.ops.native import NativeOps
from models import FloatArray, run

SHARDS = [f"model-0000{index}-of-00003.safetensors" for index in (1, 2, 3)]
PROMPT = list(range(5, 40))

Change = Callable[[Path], object]


def load(folder: Path, **options: Any) -> LoadedModel:
    return load_model(folder, NativeOps("int16", threads=1), **options)


def logits_of(model: LoadedModel) -> FloatArray:
    return run(Engine(model), PROMPT).logits


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("whole") / "m", dtype="F32")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of a whole checkpoint, to be spoilt."""
    return Path(shutil.copytree(whole, tmp_path / "m"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same in three files."""
    return tiny_checkpoint(tmp_path / "s", dtype="F32", num_shards=3)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, changes: Mapping[str, Any], dtype: str = "F32") -> None:
    """Tensors by name; None leaves one out."""
    tensors: dict[str, Any] = {**tiny_tensors(tiny_config()), **changes}
    write_safetensors(
        folder / "model.safetensors", {name: values for name, values in tensors.items() if values is not None}, dtype
    )


def move_out(path: Path, name: str) -> None:
    """Leave only a link to the file."""
    target = path.rename(path.parent.parent / name)
    path.symlink_to(target)


def test_one_file_and_several_are_the_same_model(whole: Path, sharded: Path) -> None:
    one, several = load(whole), load(sharded)
    np.testing.assert_array_equal(logits_of(one), logits_of(several))
    assert (one.path, one.context, one.chat_template, one.quantization) == (whole, 512, None, None)
    assert is_whole(whole)
    assert is_whole(sharded)


def test_a_folder_writes(whole: Path) -> None:
    llm = LLM(whole, context=64, threads=1)
    assert llm.model.path == whole
    assert llm.generate("abc", SamplingParams(max_tokens=4, ignore_eos=True))[0].stats.num_completion_tokens == 4
    with pytest.raises(InvalidInput, match="weights is 'q8', the model was loaded with None"):
        llm.new_engine(weights="q8")


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_weights_are_kept_in_the_type_that_they_are_stored_in(tmp_path: Path, dtype: str) -> None:
    model = load(tiny_checkpoint(tmp_path / "m", dtype=dtype))
    query = model.decoder.weights.layers[0].qkv.query.matrix
    assert query.num_bytes == 2 * query.rows * query.columns


def test_what_can_be_computed_may_lie_there_too(folder: Path, whole: Path) -> None:
    embedding = tiny_tensors(tiny_config())["model.embed_tokens.weight"]
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    change_tensors(folder, {"lm_head.weight": embedding, **buffers})
    np.testing.assert_array_equal(logits_of(load(folder)), logits_of(load(whole)))


def test_a_head_of_its_own(tmp_path: Path) -> None:
    model = load(tiny_checkpoint(tmp_path / "m", tie_word_embeddings=False))
    assert model.decoder.weights.lm_head.matrix is not model.decoder.weights.embedding


def test_a_gguf_file_keeps_its_types(default_model_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"weights is 'q4'.*SmolLM2.*is a GGUF file") as caught:
        load_model(default_model_path, NativeOps(threads=1), weights="q4")
    assert "checkpoint" in caught.value.hint


# What is wrong, and a pattern of what is said.
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
Q_NAME = r"m/model\.safetensors: tensor 'model\.layers\.1\.self_attn\.q_proj\.weight'"
NAN, INF = (np.where(np.eye(64) > 0, value, 0.5).astype(np.float32) for value in (np.nan, -np.inf))

BAD: dict[str, tuple[Change, str]] = {
    "tensor missing": (lambda m: change_tensors(m, {Q_PROJ: None}), f"{Q_NAME} is missing"),
    "norm missing": (lambda m: change_tensors(m, {"model.norm.weight": None}), r"'model\.norm\.weight' is missing"),
    "shape": (
        lambda m: change_tensors(m, {Q_PROJ: np.ones((64, 32))}),
        rf"{Q_NAME} has the shape \(64, 32\).*\(64, 64\)",
    ),
    "turned": (
        lambda m: change_tensors(m, {"model.layers.0.mlp.up_proj.weight": np.ones((64, 96))}),
        r"up_proj\.weight' has the shape \(64, 96\), config\.json asks for \(96, 64\)",
    ),
    "a vector for a matrix": (lambda m: change_tensors(m, {Q_PROJ: np.ones(64 * 64)}), rf"{Q_NAME} has the shape"),
    "float64": (lambda m: change_tensors(m, {}, "F64"), r"is of dtype F64, which kvik does not run"),
    "integers": (lambda m: change_tensors(m, {}, "I8"), r"is of dtype I8"),
    "fp8": (lambda m: change_tensors(m, {}, "F8_E4M3"), r"is of dtype F8_E4M3"),
    "NaN": (lambda m: change_tensors(m, {Q_PROJ: NAN}), f"{Q_NAME} holds NaN"),
    "infinity": (lambda m: change_tensors(m, {Q_PROJ: INF}), f"{Q_NAME} holds infinity"),
    "NaN in float16": (lambda m: change_tensors(m, {Q_PROJ: NAN}, "F16"), f"{Q_NAME} holds NaN"),
    "NaN in bfloat16": (lambda m: change_tensors(m, {Q_PROJ: NAN}, "BF16"), f"{Q_NAME} holds NaN"),
    "NaN in a norm": (
        lambda m: change_tensors(m, {"model.norm.weight": np.full(64, np.nan)}),
        r"tensor 'model\.norm\.weight' holds NaN",
    ),
    "a tensor more": (
        lambda m: change_tensors(m, {"model.layers.0.self_attn.q_norm.weight": np.ones(16), "z": np.ones(1)}),
        r"q_norm\.weight' has no place in a llama decoder of 2 layers \(nor have 1 more\)",
    ),
    "a layer more": (
        lambda m: change_tensors(m, {"model.layers.2.input_layernorm.weight": np.ones(64)}),
        r"'model\.layers\.2\.input_layernorm\.weight' has no place",
    ),
    "tied head differs": (
        lambda m: change_tensors(m, {"lm_head.weight": np.ones((264, 64))}),
        r"tensor 'lm_head\.weight' differs from 'model\.embed_tokens\.weight'",
    ),
    "tied head of another shape": (
        lambda m: change_tensors(m, {"lm_head.weight": np.ones((265, 64))}),
        r"tensor 'lm_head\.weight' differs",
    ),
    "head absent": (lambda m: change_config(m, tie_word_embeddings=False), r"tensor 'lm_head\.weight' is missing"),
    "truncated": (lambda m: os.truncate(m / "model.safetensors", 200_000), r"m/model\.safetensors: truncated: tensor"),
    "0 heads": (lambda m: change_config(m, num_attention_heads=0), r"config\.json: num_attention_heads is 0"),
    "10^9 layers": (lambda m: change_config(m, num_hidden_layers=10**9), r"config\.json: num_hidden_layers is 10"),
    "config of a number": (lambda m: (m / "config.json").write_text("7"), r"config\.json: holds int, not an object"),
    "config no JSON": (lambda m: (m / "config.json").write_text("{"), r"config\.json: not valid JSON"),
    "no config": (lambda m: (m / "config.json").unlink(), r"m has no config\.json"),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), r"m: there is no tokenizer\.json"),
    "small vocabulary": (
        lambda m: change_config(m, vocab_size=100),
        "has token 258, the embedding 100 rows",
    ),
    "adapter": (lambda m: (m / "adapter_config.json").write_text("{}"), r"m is an adapter \(adapter_config\.json\)"),
    "gptq": (lambda m: change_config(m, quantization_config={"quant_method": "gptq"}), r"quantised by 'gptq'"),
    "awq": (lambda m: change_config(m, quantization_config={"quant_method": "awq", "bits": 4}), "quantised by 'awq'"),
    "fp8 config": (lambda m: change_config(m, quantization_config={"quant_method": "fp8"}), "quantised by 'fp8'"),
    "compressed tensors": (
        lambda m: change_config(m, compression_config={"quant_method": "compressed-tensors"}),
        "quantised by 'compressed-tensors'",
    ),
    "bitsandbytes": (lambda m: change_config(m, quantization_config={"load_in_4bit": True}), "by 'bitsandbytes'"),
    "quantised, nobody says how": (lambda m: change_config(m, quantization_config=[1]), "by 'a method without a name'"),
    "quantised inside": (
        lambda m: change_config(m, text_config={"quantization_config": {"quant_method": "awq"}}),
        "quantised by 'awq'",
    ),
    "remote code": (
        lambda m: change_config(m, model_type="evil", auto_map={"AutoModel": "evil.Evil"}),
        r"model_type 'evil' is code that comes with the model \(auto_map\), which kvik never runs",
    ),
    "unknown type": (lambda m: change_config(m, model_type="mamba"), "'mamba'"),
    "a link that leaves": (
        lambda m: move_out(m / "model.safetensors", "x.safetensors"),
        r"m/model\.safetensors is a link to .*/x\.safetensors, which is outside",
    ),
    "a shard without an index": (
        lambda m: shutil.copy(m / "model.safetensors", m / SHARDS[0]),
        rf"{SHARDS[0]}: a file of weights that is not part of model\.safetensors",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_checkpoints_are_refused(folder: Path, kind: str) -> None:
    change, pattern = BAD[kind]
    change(folder)
    assert_refused(folder, pattern)


def assert_refused(folder: Path, pattern: str) -> None:
    with pytest.raises(ModelError, match=pattern) as caught:
        load(folder)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 500
    assert caught.value.hint


def moved(folder: Path, **weight_map: str) -> None:
    """Another index."""
    path = folder / "model.safetensors.index.json"
    write_index(folder, json.loads(path.read_text())["weight_map"] | weight_map)


NORM = "model.norm.weight"  # which lies in one of them

BAD_SHARDS: dict[str, tuple[Change, str]] = {
    "parent": (lambda s: moved(s, a="../a.safetensors"), r"index\.json: tensor 'a' is listed in '\.\./a\.safe"),
    "absolute": (lambda s: moved(s, a="/etc/a.safetensors"), "tensor 'a' is listed in '/etc/a.safe"),
    "backslash": (lambda s: moved(s, a="..\\a.safetensors"), "tensor 'a' is listed in"),
    "pickle": (lambda s: moved(s, a="a.bin"), "tensor 'a' is listed in 'a.bin', which is not a .safetensors"),
    "null byte": (lambda s: moved(s, a="a\0.safetensors"), "tensor 'a' is listed in"),
    "no name": (lambda s: write_index(s, {"a": 7}), "tensor 'a' is listed in 7"),
    "no map": (lambda s: write_index(s, []), r"index\.json: weight_map is \[\]"),
    "empty map": (lambda s: write_index(s, {}), r"weight_map is \{\}"),
    "index no JSON": (lambda s: (s / "model.safetensors.index.json").write_text("["), r"index\.json: not valid JSON"),
    "shard missing": (
        lambda s: (s / SHARDS[1]).unlink(),
        rf"s/{SHARDS[1]} is missing; .* has \d+ tensors in it, 'model",
    ),
    "shard not in the index": (
        lambda s: shutil.copy(s / SHARDS[1], s / "model-00004-of-00004.safetensors"),
        r"s/model-00004-of-00004\.safetensors: a file of weights that .*index\.json does not name",
    ),
    "one file too": (
        lambda s: shutil.copy(s / SHARDS[1], s / "model.safetensors"),
        r"s/model\.safetensors: a file of weights that .*index\.json does not name",
    ),
    "tensor not in its shard": (
        lambda s: moved(s, a=SHARDS[0]),
        rf"s/{SHARDS[0]}: tensor 'a' is not in the file, but .* says that it is there",
    ),
    "tensor not in the index": (
        lambda s: write_index(s, {name: file for name, file in index_of(s).items() if name != NORM}),
        rf"s/{SHARDS[1]}: tensor '{NORM}' is in the file, but .* lacks it",
    ),
    "tensor in another shard": (
        lambda s: moved(s, **{NORM: SHARDS[2]}),
        rf"tensor '{NORM}' is (not )?in the file",
    ),
    "truncated shard": (lambda s: os.truncate(s / SHARDS[2], 20_000), rf"s/{SHARDS[2]}: truncated"),
    "link that leaves": (
        lambda s: move_out(s / SHARDS[2], SHARDS[2]),
        rf"s/{SHARDS[2]} is a link to .*, which is outside",
    ),
}


def index_of(folder: Path) -> dict[str, str]:
    weight_map: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return weight_map


@pytest.mark.parametrize("kind", BAD_SHARDS)
def test_bad_shards_are_refused(sharded: Path, kind: str) -> None:
    change, pattern = BAD_SHARDS[kind]
    change(sharded)
    assert_refused(sharded, pattern)


@pytest.mark.parametrize(
    ("names", "pattern", "hint"),
    [
        (["pytorch_model.bin"], r"weights in pytorch_model\.bin, pickled", "safe_serialization=True"),
        (
            ["a.pt", "pytorch_model-1.bin", "pytorch_model-2.bin"],
            r"pytorch_model-1\.bin, pytorch_model-2\.bin, pickled",
            "save",
        ),
        (["ckpt.pt"], r"weights in ckpt\.pt, pickled", "save_pretrained"),
        (["last.ckpt"], r"last\.ckpt, pickled", "save_pretrained"),
        (["tf_model.h5"], r"has tf_model\.h5, but no model\.safetensors", "safetensors"),
        (["x.safetensors"], r"has x\.safetensors, but neither", r"call it model\.safetensors"),
        (["x.safetensors", "y.safetensors"], r"has x\.safetensors, y\.safetensors, but neither", "download"),
        ([], r"has no model\.safetensors", "safetensors"),
    ],
)
def test_other_weights_are_refused(folder: Path, names: list[str], pattern: str, hint: str) -> None:
    (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).write_bytes(b"\x80\x02cos\nsystem\n")
    assert not is_whole(folder)
    with pytest.raises(ModelError, match=pattern) as caught:
        load(folder)
    assert hint.replace("\\", "") in caught.value.hint


def test_links_of_the_hugging_face_cache_are_followed(whole: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    shutil.copytree(whole, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert load(snapshot).path == snapshot
    link = tmp_path / "link"
    link.symlink_to(whole)
    assert load(link).path == link


def test_a_model_larger_than_the_memory_is_refused_before_it_is_read(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "available_memory_bytes", lambda: 100_000)
    with pytest.raises(NotEnoughMemory, match="the weights take") as caught:
        load(whole)
    assert "--weights" in caught.value.hint


def test_a_known_type_with_remote_code_runs_without_it(folder: Path, whole: Path) -> None:
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    (folder / "modeling_evil.py").write_text("raise SystemExit('code of a model was run')")
    np.testing.assert_array_equal(logits_of(load(folder)), logits_of(load(whole)))


def test_a_context_beyond_the_models_own_is_refused(whole: Path) -> None:
    assert load(whole, context=100).context == 100
    with pytest.raises(KvikError, match="context is 513, m was made for 512 tokens"):
        load(whole, context=513)


def test_progress_counts_the_bytes_to_the_last(whole: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    load(whole, progress=lambda *report: seen.append(report))
    assert {what for what, _, _ in seen} == {"m: loading"}
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1] == seen[-1][2] == sum(values.nbytes for values in tiny_tensors(tiny_config()).values())


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def test_a_bar_is_drawn_only_for_what_takes_long(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wait_s, is_drawn in ((1000.0, False), (0.0, True)):
        screen = Screen()
        monkeypatch.setattr("sys.stderr", screen)
        with bytes_progress(wait_s=wait_s) as report:
            load(whole, progress=report)
        assert ("m: loading" in screen.getvalue()) == is_drawn
        assert bool(screen.getvalue()) == is_drawn


# nanoGPT and minGPT


def nano_config(**changes: Any) -> dict[str, Any]:
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 128, "vocab_size": 264}
    return {"model_type": "nanogpt", **sizes, "bias": True, **changes}


def nano_tensors(*, bias: bool = True) -> dict[str, FloatArray]:
    """A state dict of nanoGPT: plain Linear layers, (rows, columns)."""
    rng = np.random.default_rng(9)
    tensors = {"wte.weight": rng.normal(0, 0.3, (264, 64)), "wpe.weight": rng.normal(0, 0.3, (128, 64))}
    for index in range(2):
        for name, rows, columns in (
            ("attn.c_attn", 192, 64),
            ("attn.c_proj", 64, 64),
            ("mlp.c_fc", 256, 64),
            ("mlp.c_proj", 64, 256),
        ):
            tensors[f"h.{index}.{name}.weight"] = rng.normal(0, columns**-0.5, (rows, columns))
            tensors[f"h.{index}.{name}.bias"] = rng.normal(0, 0.2, rows)
        for name in ("ln_1", "ln_2"):
            tensors[f"h.{index}.{name}.weight"] = rng.normal(1, 0.1, 64)
            tensors[f"h.{index}.{name}.bias"] = rng.normal(0, 0.2, 64)
    tensors |= {"ln_f.weight": rng.normal(1, 0.1, 64), "ln_f.bias": rng.normal(0, 0.2, 64)}
    return {
        f"transformer.{name}": values.astype(np.float32)
        for name, values in tensors.items()
        if bias or not name.endswith(".bias")
    }


def gpt2_tensors(tensors: dict[str, FloatArray]) -> dict[str, FloatArray]:
    """The same as transformers' GPT-2 has them, whose Conv1D layers are (columns, rows)."""
    turned = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
    return {
        name: np.ascontiguousarray(values.T) if name.endswith(turned) else values for name, values in tensors.items()
    }


def test_nanogpt_is_gpt2(tmp_path: Path) -> None:
    tensors = nano_tensors()
    nano = load(write_checkpoint(tmp_path / "nano", nano_config(), tensors))
    config = nano_config(model_type="gpt2", n_positions=128, activation_function="gelu")
    gpt2 = load(write_checkpoint(tmp_path / "gpt2", config, gpt2_tensors(tensors)))
    np.testing.assert_array_equal(logits_of(nano), logits_of(gpt2))
    assert nano.context == 128
    assert nano.decoder.spec.tied_head


def test_nanogpt_as_it_is_saved(tmp_path: Path) -> None:
    """Of a compiled model, with the head that is tied and the mask that older versions keep."""
    tensors = nano_tensors()
    plain = load(write_checkpoint(tmp_path / "plain", nano_config(), tensors))
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    masks = {f"transformer.h.{index}.attn.bias": np.tri(128, dtype=np.float32)[None, None] for index in range(2)}
    compiled = {f"_orig_mod.{name}": values for name, values in (tensors | masks).items()}
    other = load(write_checkpoint(tmp_path / "compiled", nano_config(), compiled))
    np.testing.assert_array_equal(logits_of(plain), logits_of(other))


def test_nanogpt_without_biases(tmp_path: Path) -> None:
    spec = load(write_checkpoint(tmp_path / "m", nano_config(bias=False), nano_tensors(bias=False))).decoder.spec
    assert [spec.qkv_bias, spec.output_bias, spec.mlp_bias, spec.norm_bias] == [False] * 4
    folder = write_checkpoint(tmp_path / "n", nano_config(bias=False), nano_tensors())
    assert_refused(folder, r"bias' has no place in a nanogpt decoder")


def test_mingpt_has_a_head_of_its_own_and_another_gelu(tmp_path: Path) -> None:
    config = nano_config(tie_word_embeddings=False, activation_function="gelu_new")
    tensors = nano_tensors()
    tensors["lm_head.weight"] = np.random.default_rng(1).normal(0, 0.1, (264, 64)).astype(np.float32)
    spec = load(write_checkpoint(tmp_path / "m", config, tensors)).decoder.spec
    assert (spec.tied_head, spec.activation) == (False, "gelu_tanh")


def test_the_documented_tokenizer_of_single_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    characters = "\n !$&',-.3:;?" + string.ascii_letters
    stoi = {character: index for index, character in enumerate(sorted(characters))}
    text = (Path(__file__).parents[2] / "docs" / "model-files.md").read_text()
    code = re.search(r"```python\n(from tokenizers.*?)```", text, re.DOTALL)
    assert code is not None
    config = nano_config(vocab_size=len(stoi))
    tensors = nano_tensors()
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][: len(stoi)]
    folder = write_checkpoint(tmp_path / "folder", config, tensors)
    (folder / "tokenizer_config.json").unlink()
    monkeypatch.chdir(tmp_path)
    exec(code[1], {"stoi": stoi})
    tokenizer = load(folder).tokenizer
    verse = "To be, or not to be:\nthat is  the question?"
    assert tokenizer.encode(verse) == [stoi[character] for character in verse]
    assert tokenizer.decode(tokenizer.encode(verse)) == verse
