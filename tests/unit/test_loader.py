"""From a GGUF file to a decoder: what is accepted has its effect, what is not is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType

from gguf_files import WEIGHT_TYPES, random_blocks, tiny_llama, write_gguf
from kvik.engine.engine import Engine
from kvik.errors import ModelError
from kvik.files.gguf import read_gguf
from kvik.files.texts import Texts
from kvik.models.gguf_source import PLAIN_TYPES, QUANTIZED_TYPES
from kvik.models.gguf_spec import read_spec
from kvik.models.loader import LoadedModel, load_model
from kvik.models.numerics import weight_files
from kvik.models.spec import RopeSpec
from kvik.ops.native import NativeOps
from kvik.planner.sources import find_shape
from kvik.text.chat_prompt import encode_chat
from models import FloatArray, Tensor, altered, random_prompt, run

F32 = GGMLQuantizationType.F32
RNG = np.random.default_rng(40)
HIDDEN, INTERMEDIATE, VOCAB = 64, 96, 320


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 query heads, 2 KV heads, head_dim 16, 2 layers."""
    return tiny_llama(tmp_path_factory.mktemp("loader") / "tiny.gguf")


def load(path: Path, **options: Any) -> LoadedModel:
    return load_model(path, NativeOps("int16", threads=1), **options)


def plain(*shape: int) -> Tensor:
    return RNG.normal(0, 0.1, shape).astype(np.float32), F32


def raw(kind: GGMLQuantizationType, rows: int, row_bytes: int) -> Tensor:
    return np.zeros((rows, row_bytes), np.uint8), kind


def logits_of(model: LoadedModel) -> FloatArray:
    return run(Engine(model), random_prompt(model, 20, seed=3)).logits


LLAMA = "llama."
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
NORMS = ("attn_norm", "ffn_norm")

BAD_METADATA: list[tuple[dict[str, Any], str]] = [
    ({"general.architecture": "opt"}, "'opt'"),
    ({"general.architecture": "deepseek2"}, "'deepseek2'"),
    ({"general.architecture": "x" * 10_000}, "architecture 'xxx"),
    ({"general.architecture": 7}, "general.architecture"),
    ({f"{LLAMA}block_count": 0}, "llama.block_count"),
    ({f"{LLAMA}block_count": 10**9}, "llama.block_count"),
    ({f"{LLAMA}block_count": 3}, "blk.2.attn_norm.weight"),
    ({f"{LLAMA}block_count": 1}, "blk.1."),
    ({f"{LLAMA}block_count": -1}, "llama.block_count"),
    ({f"{LLAMA}block_count": 2.0}, "llama.block_count"),
    ({f"{LLAMA}block_count": "2"}, "llama.block_count"),
    ({f"{LLAMA}embedding_length": 0}, "llama.embedding_length"),
    ({f"{LLAMA}embedding_length": 2**40}, "llama.embedding_length"),
    ({f"{LLAMA}embedding_length": 128}, "token_embd.weight"),
    ({f"{LLAMA}feed_forward_length": 0}, "llama.feed_forward_length"),
    ({f"{LLAMA}feed_forward_length": 97}, "ffn_gate.weight"),
    ({f"{LLAMA}attention.head_count": 0}, "llama.attention.head_count"),
    ({f"{LLAMA}attention.head_count": 65}, "llama.attention.head_count"),
    ({f"{LLAMA}attention.head_count": [4, 2]}, "llama.attention.head_count"),
    ({f"{LLAMA}attention.head_count_kv": 0}, "llama.attention.head_count_kv"),
    ({f"{LLAMA}attention.head_count_kv": 5}, "4 query heads do not divide among 5 KV heads"),
    ({f"{LLAMA}attention.head_count_kv": 3}, "4 query heads do not divide among 3 KV heads"),
    ({f"{LLAMA}attention.head_count_kv": 1}, "attn_k.weight"),
    ({f"{LLAMA}attention.key_length": 12, f"{LLAMA}rope.dimension_count": 12}, "head_dim 12"),
    ({f"{LLAMA}attention.key_length": 0}, "llama.attention.key_length"),
    ({f"{LLAMA}attention.key_length": 2048}, "llama.attention.key_length"),
    ({f"{LLAMA}attention.value_length": 8}, "keys have 16 dimensions, values 8"),
    ({f"{LLAMA}attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon"),
    ({f"{LLAMA}attention.layer_norm_rms_epsilon": -1.0}, "layer_norm_rms_epsilon"),
    ({f"{LLAMA}context_length": 0}, "llama.context_length"),
    ({f"{LLAMA}context_length": 2**62}, "llama.context_length"),
    ({f"{LLAMA}rope.dimension_count": 18}, "llama.rope.dimension_count"),
    ({f"{LLAMA}rope.dimension_count": 7}, "7 dimensions of a head of 16"),
    ({f"{LLAMA}rope.freq_base": float("inf")}, "llama.rope.freq_base"),
    ({f"{LLAMA}rope.freq_base": 0.0}, "llama.rope.freq_base"),
    ({f"{LLAMA}rope.freq_base": 1.0}, "llama.rope.freq_base"),
    ({f"{LLAMA}rope.scaling.type": "dynamic"}, "'dynamic'"),
    ({f"{LLAMA}rope.scaling.type": "yarn", f"{LLAMA}rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor"),
    ({f"{LLAMA}rope.scaling.type": "yarn", f"{LLAMA}rope.scaling.yarn_beta_fast": 0.0}, "yarn_beta_fast"),
    ({f"{LLAMA}rope.scaling.type": "yarn", f"{LLAMA}rope.scaling.original_context_length": 0}, "original_context"),
    ({f"{LLAMA}rope.scaling.attn_factor": 0.0}, "llama.rope.scaling.attn_factor"),
    ({f"{LLAMA}rope.scaling.type": "linear", f"{LLAMA}rope.scaling.factor": 0.0}, "llama.rope.scaling.factor"),
    ({f"{LLAMA}rope.scaling.type": "linear", f"{LLAMA}rope.scaling.factor": float("nan")}, "rope.scaling.factor"),
    ({f"{LLAMA}expert_count": 8}, "8 experts, and no layer with a tensor 'ffn_gate_inp.weight'"),
    ({f"{LLAMA}attention.sliding_window": -1}, "llama.attention.sliding_window"),
    ({f"{LLAMA}attention.sliding_window": 128.0}, "llama.attention.sliding_window"),
    ({f"{LLAMA}attention.sliding_window": 128, f"{LLAMA}attention.sliding_window_pattern": [True]}, "of 2 items"),
    ({f"{LLAMA}attention.sliding_window": 128, f"{LLAMA}attention.sliding_window_pattern": [1, 0]}, "list of bool"),
    ({f"{LLAMA}attention.sliding_window": 128, f"{LLAMA}attention.sliding_window_pattern": -1}, "window_pattern"),
    ({f"{LLAMA}attention.max_alibi_bias": 8.0}, "ALiBi"),
    ({f"{LLAMA}attention.clamp_kqv": 8.0}, "clamped"),
    ({f"{LLAMA}attention.causal": False}, "later tokens"),
    ({f"{LLAMA}logit_scale": 2.0}, "llama.logit_scale"),
    ({f"{LLAMA}attn_logit_softcapping": 50.0}, "llama.attn_logit_softcapping"),
]
BAD_TENSORS: list[tuple[dict[str, Tensor], str]] = [
    ({"blk.0.attn_q.weight": plain(HIDDEN, HIDDEN + 32)}, "blk.0.attn_q.weight"),
    ({"blk.1.attn_k.weight": plain(HIDDEN, HIDDEN)}, "blk.1.attn_k.weight"),
    ({"blk.1.ffn_down.weight": plain(INTERMEDIATE, HIDDEN)}, "blk.1.ffn_down.weight"),
    ({"blk.0.attn_q.weight": plain(1, HIDDEN, HIDDEN)}, "blk.0.attn_q.weight"),
    ({"blk.0.attn_norm.weight": plain(HIDDEN + 1)}, "blk.0.attn_norm.weight"),
    ({"blk.0.attn_norm.weight": plain(1, HIDDEN)}, "blk.0.attn_norm.weight"),
    ({"output_norm.weight": raw(GGMLQuantizationType.Q8_0, 1, HIDDEN // 32 * 34)}, "output_norm.weight"),
    ({"output.weight": plain(VOCAB - 1, HIDDEN)}, "output.weight"),
    ({"token_embd.weight": plain(VOCAB * HIDDEN)}, "20,480 rows"),
    ({"token_embd.weight": plain(VOCAB + 1, HIDDEN)}, "320 tokens, the embedding 321 rows"),
    ({"blk.0.attn_q.weight": raw(GGMLQuantizationType.Q8_1, HIDDEN, HIDDEN // 32 * 40)}, "Q8_1"),
    ({"blk.0.attn_q.weight": raw(GGMLQuantizationType.I32, HIDDEN, HIDDEN * 4)}, "I32"),
    ({"blk.0.attn_norm.weight": (np.zeros(HIDDEN * 2, np.uint8), GGMLQuantizationType.I16)}, "I16"),
    ({"blk.0.attn_q.bias": plain(HIDDEN)}, "'blk.0.attn_k.bias' is missing"),
    ({"blk.1.attn_q.bias": plain(HIDDEN)}, "blk.1.attn_q.bias"),
    ({"blk.2.attn_q.weight": plain(HIDDEN, HIDDEN)}, "blk.2.attn_q.weight"),
    ({"blk.0.attn_q_norm.weight": plain(16)}, "blk.0.attn_q_norm.weight"),
    ({"blk.-1.attn_q.weight": plain(HIDDEN, HIDDEN)}, "blk.-1.attn_q.weight"),
    ({"blk.\u0661.attn_q.weight": plain(HIDDEN, HIDDEN)}, "has no place"),  # one, but in Arabic digits
    ({"blk.00.attn_q.weight": plain(HIDDEN, HIDDEN)}, "blk.00.attn_q.weight"),
    ({"extra": plain(4)}, "'extra'"),
    ({"rope_freqs.weight": plain(7)}, "rope_freqs.weight"),
    ({"rope_factors_long.weight": (np.ones(8, np.float32), F32)}, "do not belong together"),
    ({"rope_freqs.weight": (np.zeros(8, np.float32), F32)}, "rope_freqs.weight"),
    ({"rope_freqs.weight": (np.full(8, np.inf, np.float32), F32)}, "rope_freqs.weight"),
    ({"rope_freqs.weight": (np.full(8, -1.0, np.float32), F32)}, "rope_freqs.weight"),
]


def assert_refused(path: Path, pattern: str) -> None:
    with pytest.raises(ModelError, match=pattern) as caught:
        load(path)
    assert path.name in caught.value.message
    assert caught.value.hint
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(("metadata", "pattern"), BAD_METADATA, ids=str)
def test_metadata_that_kvik_does_not_run(
    tiny_path: Path, tmp_path: Path, metadata: dict[str, Any], pattern: str
) -> None:
    assert_refused(altered(tiny_path, tmp_path / "bad.gguf", metadata=metadata), pattern)


@pytest.mark.parametrize(("tensors", "pattern"), BAD_TENSORS, ids=lambda value: value if type(value) is str else "")
def test_tensors_that_kvik_does_not_run(
    tiny_path: Path, tmp_path: Path, tensors: dict[str, Tensor], pattern: str
) -> None:
    assert_refused(altered(tiny_path, tmp_path / "bad.gguf", tensors=tensors), pattern)


@pytest.mark.parametrize(
    "name",
    ["token_embd.weight", "output_norm.weight", *(f"blk.1.{part}.weight" for part in (*MATRICES, *NORMS))],
)
def test_a_missing_tensor_is_named(tiny_path: Path, tmp_path: Path, name: str) -> None:
    assert_refused(altered(tiny_path, tmp_path / "bad.gguf", without=[name]), f"'{name}' is missing")


@pytest.mark.parametrize(
    "key",
    [
        "general.architecture",
        f"{LLAMA}block_count",
        f"{LLAMA}embedding_length",
        f"{LLAMA}feed_forward_length",
        f"{LLAMA}context_length",
        f"{LLAMA}attention.head_count",
        f"{LLAMA}attention.layer_norm_rms_epsilon",
        "tokenizer.ggml.tokens",
    ],
)
def test_a_missing_key_is_named(tiny_path: Path, tmp_path: Path, key: str) -> None:
    assert_refused(altered(tiny_path, tmp_path / "bad.gguf", without=[key]), key)


def test_the_spec_is_the_file_s(tmp_path: Path) -> None:
    path = tiny_llama(
        tmp_path / "tiny.gguf",
        num_layers=3,
        num_heads=8,
        num_kv_heads=4,
        head_dim=40,
        hidden_size=96,
        intermediate_size=128,
        context_length=77,
        rope_freq_base=5000.0,
        rms_norm_eps=1e-6,
        tied=False,
    )
    spec = read_spec(read_gguf(path))
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (3, 8, 4, 40)
    assert (spec.hidden_size, spec.intermediate_size, spec.vocab_size) == (96, 128, 320)
    assert (spec.context_length, spec.tied_head) == (77, False)
    assert spec.norm_eps == pytest.approx(1e-6)
    assert spec.ropes == (RopeSpec(theta=5000, num_dims=40, adjacent_pairs=True),)
    assert spec.kv_spec("f16").token_bytes == 2 * 3 * 4 * 40 * 2


def table_of(model: LoadedModel) -> npt.NDArray[np.float32]:
    """Cosines and sines of the model's only rotary embedding."""
    (rope,) = model.decoder.spec.ropes
    return rope.table(model.decoder.num_positions).cos_sin


def test_defaults_of_keys_that_may_be_absent(tiny_path: Path, tmp_path: Path) -> None:
    keys = ["attention.head_count_kv", "rope.freq_base", "rope.dimension_count", "vocab_size"]
    file = read_gguf(altered(tiny_path, tmp_path / "few.gguf", without=[LLAMA + key for key in keys]))
    spec = read_spec(file)
    assert (spec.num_kv_heads, spec.head_dim, spec.ropes[0].theta, spec.ropes[0].num_dims) == (4, 16, 10_000, 16)


def test_the_context_is_the_model_s_unless_given(tiny_path: Path) -> None:
    assert load(tiny_path).context == 512
    model = load(tiny_path, context=48)
    assert model.context == 48
    assert len(table_of(model)) == 48


def test_types_are_those_of_the_packed_weights() -> None:
    assert {*PLAIN_TYPES, *QUANTIZED_TYPES} == {kind.name for kind in WEIGHT_TYPES}


@pytest.mark.parametrize("kind", WEIGHT_TYPES, ids=lambda kind: kind.name)
def test_every_type_loads_and_runs(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    path = tiny_llama(tmp_path / "tiny.gguf", head_dim=64, num_heads=4, intermediate_size=256, weight_type=kind)
    logits = logits_of(load(path))
    assert np.isfinite(logits).all()
    assert 0.5 < logits.std() < 8


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_norms_may_be_half_precision(tiny_path: Path, tmp_path: Path, kind: str) -> None:
    values = random_blocks(GGMLQuantizationType[kind], 1, HIDDEN, RNG)[0]
    path = altered(
        tiny_path, tmp_path / "half.gguf", tensors={"output_norm.weight": (values, GGMLQuantizationType[kind])}
    )
    assert load(path).decoder.weights.norm.weight.dtype == np.float32


def test_an_untied_head_is_used(tiny_path: Path, tmp_path: Path) -> None:
    """Twice the embedding as the head: exactly twice the logits, since powers of two round nowhere."""
    embedding = read_gguf(tiny_path).tensors["token_embd.weight"]
    blocks = embedding.data.reshape(VOCAB, -1, 34).copy()
    blocks[..., :2] = (2 * blocks[..., :2].copy().view(np.float16)).view(np.uint8)
    doubled = (blocks.reshape(VOCAB, -1), GGMLQuantizationType.Q8_0)
    untied = load(altered(tiny_path, tmp_path / "untied.gguf", tensors={"output.weight": doubled}))
    assert not untied.decoder.spec.tied_head
    np.testing.assert_array_equal(logits_of(untied), 2 * logits_of(load(tiny_path)))
    tied = load(tiny_path)
    assert tied.decoder.weights.lm_head.matrix is tied.decoder.weights.embedding


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_rope_factor_without_a_type_is_linear(tiny_path: Path, tmp_path: Path, key: str) -> None:
    scaled = load(altered(tiny_path, tmp_path / "a.gguf", metadata={f"{LLAMA}{key}": 4.0}))
    assert scaled.decoder.spec.ropes[0].factors == 4.0


def test_rope_factors_do_not_hide_another_scaling(tiny_path: Path, tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {"rope_freqs.weight": (np.full(8, 2.0, np.float32), F32)}
    other = {f"{LLAMA}rope.scaling.type": "dynamic"}
    with pytest.raises(ModelError, match="'dynamic'"):
        load(altered(tiny_path, tmp_path / "a.gguf", metadata=other, tensors=tensors))
    metadata = {f"{LLAMA}rope.scaling.type": "linear", f"{LLAMA}rope.scaling.factor": 4.0}
    both = load(altered(tiny_path, tmp_path / "b.gguf", metadata=metadata, tensors=tensors))
    assert both.decoder.spec.ropes[0].factors == 8.0, "of all pairs"


def test_linear_rope_scaling_is_position_interpolation(tiny_path: Path, tmp_path: Path) -> None:
    metadata = {f"{LLAMA}rope.scaling.type": "linear", f"{LLAMA}rope.scaling.factor": 4.0}
    scaled = load(altered(tiny_path, tmp_path / "linear.gguf", metadata=metadata))
    unscaled = load(tiny_path)
    np.testing.assert_array_equal(table_of(scaled)[400], table_of(unscaled)[100])
    assert not np.array_equal(logits_of(scaled), logits_of(unscaled))


def test_rope_factors_divide_each_frequency(tiny_path: Path, tmp_path: Path) -> None:
    factors = np.asarray([1, 1, 1, 2, 2, 4, 8, 8], np.float32)
    scaled = load(altered(tiny_path, tmp_path / "llama3.gguf", tensors={"rope_freqs.weight": (factors, F32)}))
    unscaled = table_of(load(tiny_path))
    cos_sin = table_of(scaled)
    for pair, factor in enumerate(factors.astype(int)):
        np.testing.assert_array_equal(cos_sin[8 * np.arange(8), pair], unscaled[8 // factor * np.arange(8), pair])


def test_a_window_as_long_as_the_context_is_none(tiny_path: Path, tmp_path: Path) -> None:
    for window in (0, 512, 4096):
        path = altered(tiny_path, tmp_path / f"{window}.gguf", metadata={f"{LLAMA}attention.sliding_window": window})
        assert load(path).decoder.spec.num_layers == 2


def test_a_model_without_a_chat_template(tiny_path: Path, tmp_path: Path) -> None:
    assert load(tiny_path).chat_template is not None
    for change in ({"without": ["tokenizer.chat_template"]}, {"metadata": {"tokenizer.chat_template": ""}}):
        options: dict[str, Any] = dict(change)
        assert load(altered(tiny_path, tmp_path / "plain.gguf", **options)).chat_template is None


def test_a_conversation_begins_as_the_file_says_even_where_its_template_forgot_it(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "the"}]
    prompts = []
    for adds in (True, False):
        extra = {"tokenizer.ggml.add_bos_token": adds, "tokenizer.ggml.bos_token_id": 0}
        model = load(tiny_llama(tmp_path / f"{adds}.gguf", extra_metadata=extra))
        assert model.chat_template is not None
        prompts.append(encode_chat(model.chat_template, model.tokenizer, chat))
    assert prompts[0] == [0, *prompts[1]]
    assert prompts[1][0] != 0
    template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    extra = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 0}
    model = load(tiny_llama(tmp_path / "w.gguf", extra_metadata=extra | {"tokenizer.chat_template": template}))
    assert model.chat_template is not None
    assert encode_chat(model.chat_template, model.tokenizer, chat)[:2].count(0) == 1


def split_of(path: Path, folder: Path, count: int = 3) -> list[Path]:
    """The file as llama.cpp's gguf-split cuts it: all metadata in the first part, some tensors in each."""
    folder.mkdir()
    whole, paths = read_gguf(path), []
    metadata = {key: list(value) if isinstance(value, Texts) else value for key, value in whole.metadata.items()}
    tensors = [
        (name, (np.array(one.data).reshape(*one.shape[:-1], -1), GGMLQuantizationType(one.type)))
        for name, one in whole.tensors.items()
    ]
    for number in range(count):
        own = {"split.no": number, "split.count": count, "split.tensors.count": len(tensors)}
        paths.append(folder / f"m-{number + 1:05}-of-{count:05}.gguf")
        write_gguf(paths[-1], own | (metadata if number == 0 else {}), dict(tensors[number::count]))
    return paths


def test_a_split_model_is_loaded_as_one_by_any_of_its_parts(tmp_path: Path, tiny_path: Path) -> None:
    parts = split_of(tiny_path, tmp_path / "m")
    whole = logits_of(load(tiny_path))
    for path in parts:
        assert np.array_equal(logits_of(load(path)), whole)
        assert weight_files(path) == parts
        shape = find_shape(str(path))
        assert shape.tensors is not None
        assert shape.tensors.file_bytes == sum(one.stat().st_size for one in parts)
    assert weight_files(tiny_path) == [tiny_path]


def test_a_part_alone_says_which_others_are_missing(tmp_path: Path, tiny_path: Path) -> None:
    first, second, third = split_of(tiny_path, tmp_path / "m")
    second.unlink()
    with pytest.raises(ModelError, match=r"part 3 of 3 of a model that was split; parts missing beside it: 2"):
        load(third)
    second.write_bytes(first.read_bytes())
    with pytest.raises(ModelError, match=r"m-00002-of-00003\.gguf: is not part 2 of 3, as its name says"):
        load(third)


def test_parts_of_other_models_are_refused(tmp_path: Path, tiny_path: Path) -> None:
    parts = split_of(tiny_path, tmp_path / "m")
    tensors = read_gguf(parts[0]).tensors
    name = next(iter(read_gguf(tiny_path).tensors))  # it lies in the first part
    assert name in tensors
    for own, said in (({name: plain(3, 32)}, "is in m-00001-of-00003.gguf too"), ({}, "the parts have")):
        write_gguf(parts[2], {"split.no": 2, "split.count": 3}, own)
        with pytest.raises(ModelError, match=said):
            load(parts[0])
