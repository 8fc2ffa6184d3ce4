"""Random models of a shape, and the comparison that they are made for."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from bars import BARS, EXPERTS, Bars, bar_cases, bars_of, context_of
from comparison import Case, Results, table
from gguf_files import tiny_llama
from gguf_shapes import tensors
from kvik import LLM, SamplingParams
from kvik.files.gguf import read_gguf
from kvik_runs import KvikRuns, NotAvailable
from llama_cpp_runs import IkLlamaCppRuns, LlamaCppRuns
from looped import looped
from random_blocks import FLOATS, SCALES, draw
from random_model import quantized_kinds, write_random_model

CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 400,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
EXPERTS_CONFIG = CONFIG | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT_OSS_CONFIG = CONFIG | {
    "model_type": "gpt_oss",
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
    "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 8},
}


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    path = tmp_path / "vocabulary.gguf"
    tiny_llama(path)
    return path


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_random_model_has_the_shape_and_runs(vocabulary: Path, tmp_path: Path, family: str) -> None:
    path = tmp_path / "random.gguf"
    write_random_model(CONFIG | {"model_type": family}, path, read_gguf(vocabulary))
    llm = LLM(str(path), threads=1)
    spec = llm.model.decoder.spec
    assert (spec.hidden_size, spec.num_layers, spec.head_dim, spec.vocab_size, spec.tied_head) == (
        64,
        2,
        32,
        400,
        False,
    )
    assert spec.qk_norm == ("head" if family == "qwen3" else "none")
    assert llm.encode("the") == LLM(str(vocabulary), threads=1).encode("the")
    (completion,) = llm.generate(["the"], SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(completion.token_ids) == 4
    gate = read_gguf(path).tensors["blk.1.ffn_gate.weight"]
    values = gate.data.view(np.float16).astype(np.float32).reshape(gate.shape)
    assert (values**2).sum(axis=1).mean() == pytest.approx(1, abs=0.1)  # rows as long as one
    assert len(np.unique(values)) > 3000


@pytest.mark.parametrize(("model_type", "name"), [("qwen3_moe", "qwen3moe"), ("olmoe", "olmoe")])
def test_a_random_mixture_of_experts(vocabulary: Path, tmp_path: Path, model_type: str, name: str) -> None:
    path = tmp_path / "random.gguf"
    write_random_model(EXPERTS_CONFIG | {"model_type": model_type}, path, read_gguf(vocabulary))
    file = read_gguf(path)
    keys = ("expert_count", "expert_used_count", "expert_feed_forward_length")
    assert [file.metadata[f"{name}.{key}"] for key in keys] == [5, 2, 32]
    shapes = {tensor: file.tensors[tensor].shape for tensor in file.tensors if tensor.startswith("blk.1.")}
    assert shapes["blk.1.ffn_gate_exps.weight"] == shapes["blk.1.ffn_up_exps.weight"] == (5, 32, 64)
    assert shapes["blk.1.ffn_down_exps.weight"] == (5, 64, 32)
    assert shapes["blk.1.attn_k_norm.weight"] == ((32,) if name == "qwen3moe" else (64,))
    assert "blk.1.ffn_up.weight" not in shapes
    assert file.tensors["blk.1.ffn_gate_inp.weight"].type.name == "F32"
    router = file.tensors["blk.1.ffn_gate_inp.weight"].data.view(np.float32)
    assert (router.reshape(5, 64) ** 2).sum(axis=1).mean() == pytest.approx(1, abs=0.5)


def test_a_random_gpt_oss(vocabulary: Path, tmp_path: Path) -> None:
    path = tmp_path / "random.gguf"
    write_random_model(GPT_OSS_CONFIG, path, read_gguf(vocabulary))
    file = read_gguf(path)
    told = ("attention.sliding_window", "rope.scaling.type", "rope.scaling.factor", "expert_count")
    assert [file.metadata[f"gpt-oss.{key}"] for key in told] == [16, "yarn", 32.0, 5]
    assert file.metadata["gpt-oss.rope.scaling.original_context_length"] == 8
    shapes = {tensor: file.tensors[tensor].shape for tensor in file.tensors if tensor.startswith("blk.0.")}
    assert shapes["blk.0.attn_sinks.weight"] == (4,)
    assert shapes["blk.0.ffn_down_exps.bias"] == (5, 64)
    assert shapes["blk.0.ffn_gate_inp.bias"] == (5,)
    assert shapes["blk.0.attn_output.bias"] == (64,)
    assert "blk.0.post_attention_norm.weight" in shapes
    assert "blk.0.ffn_norm.weight" not in shapes
    biases = [file.tensors[tensor] for tensor in shapes if tensor.endswith(".bias")]
    assert {bias.type.name for bias in biases} == {"F32"}
    with pytest.raises(ValueError, match="rope_scaling of type longrope: only yarn"):
        write_random_model(GPT_OSS_CONFIG | {"rope_scaling": {"rope_type": "longrope"}}, path, read_gguf(vocabulary))


@looped("kind", [*FLOATS, *SCALES, GGMLQuantizationType.MXFP4])
def test_weights_are_drawn_in_blocks(kind: GGMLQuantizationType) -> None:
    values, size = GGML_QUANT_SIZES[kind]
    drawn = draw(kind, 512 * 512, 0.03, np.random.default_rng(0))
    assert drawn.size == 512 * 512 // values * size
    rows = dequantize(drawn, kind).reshape(512, 512)
    assert np.isfinite(rows).all()
    assert rows.std() == pytest.approx(0.03, rel=0.02)
    assert rows.mean() == pytest.approx(0, abs=0.001)
    assert len(np.unique(rows, axis=0)) == 512


def test_a_format_of_which_no_weights_are_drawn() -> None:
    with pytest.raises(ValueError, match="IQ1_S: no random weights"):
        draw(GGMLQuantizationType.IQ1_S, 256, 1.0, np.random.default_rng(0))


def test_formats_are_those_that_llama_quantize_names(vocabulary: Path, tmp_path: Path) -> None:
    config = CONFIG | {"model_type": "llama", "hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    plain = tmp_path / "plain.gguf"
    write_random_model(config, plain, read_gguf(vocabulary))
    said = ["llama_model_quantize_impl: n_tensors = 21", ""]
    for number, (name, tensor) in enumerate(read_gguf(plain).tensors.items()):
        kind = "q6_K" if "attn_v" in name else "q4_K"
        end = f"    1.00 MiB ->     0.25 MiB ({kind})" if tensor.type.name == "F16" else "    0.001 MiB"
        head = f"[{number + 1:4}/  21] {name:36} - [   64,    64,     1,     1], type = {tensor.type.name.lower():>6}"
        said.append(f"{head}, size = {end}")
    (tmp_path / "said").write_text("\n".join(said) + "\nmain: quantize time = 1 ms\n")
    program(tmp_path / "bin" / "llama-quantize", f"cat {tmp_path}/said >&2; ls -s --block-size=1 $2 >{tmp_path}/size")
    kinds = quantized_kinds(config, read_gguf(vocabulary), tmp_path, "Q4_K_M", LlamaCppRuns(tmp_path, 1))
    assert (tmp_path / "bin" / "called").read_text() == f"--dry-run {tmp_path}/shape.gguf Q4_K_M\n"
    assert int((tmp_path / "size").read_text().split()[0]) < plain.stat().st_size  # a hole takes no room
    assert not (tmp_path / "shape.gguf").exists()
    named = {name: kind.name for name, kind in kinds.items()}
    assert (named["blk.0.attn_v.weight"], named["blk.0.ffn_up.weight"]) == ("Q6_K", "Q4_K")
    assert (named["token_embd.weight"], named["output_norm.weight"]) == ("Q4_K", "F32")

    path = tmp_path / "random.Q4_K_M.gguf"
    write_random_model(config, path, read_gguf(vocabulary), kinds, file_type="Q4_K_M")
    file = read_gguf(path)
    assert {name: tensor.type.name for name, tensor in file.tensors.items()} == named
    assert file.metadata["general.file_type"] == 15
    (completion,) = LLM(str(path), threads=1).generate(["the"], SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(completion.token_ids) == 4

    (tmp_path / "said").write_text("\n".join(said[:-3]))
    with pytest.raises(RuntimeError, match="told the formats of 18 tensors, not of 21"):
        quantized_kinds(config, read_gguf(vocabulary), tmp_path, "Q4_K_M", LlamaCppRuns(tmp_path, 1))


def test_what_no_random_model_is_made_of(vocabulary: Path, tmp_path: Path) -> None:
    file = read_gguf(vocabulary)
    with pytest.raises(ValueError, match="gemma3_text: only the shapes of llama, qwen2, qwen3"):
        write_random_model(CONFIG | {"model_type": "gemma3_text"}, tmp_path / "x.gguf", file)
    with pytest.raises(ValueError, match="vocab_size is 10, the vocabulary has"):
        write_random_model(CONFIG | {"vocab_size": 10}, tmp_path / "x.gguf", file)
    kinds = dict.fromkeys(tensors(CONFIG), GGMLQuantizationType.IQ1_S)
    with pytest.raises(ValueError, match="IQ1_S: no random weights"):
        write_random_model(CONFIG | {"hidden_size": 256}, tmp_path / "x.gguf", file, kinds)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vocabulary.gguf"]


def test_bars_belong_to_shapes(vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bars_of(vocabulary) == Bars()
    path = tmp_path / "random.Q4_K_M.gguf"
    write_random_model(CONFIG, path, read_gguf(vocabulary))
    monkeypatch.setitem(BARS, ("qwen3", 64, 2), Bars(1.05, 0.9, deep=1.5, prefill=1.8, batch=2.0))
    bars = bars_of(path)
    assert (bars.decode, bars.deep_int8) == (1.05, None)
    theirs, ik = LlamaCppRuns(tmp_path, 1), IkLlamaCppRuns(tmp_path, 1)
    cases = list(bar_cases(KvikRuns(1), theirs, ik, path))
    assert [(case.name, case.target, case.share_target) for case in cases] == [
        ("decode 128 from empty", 1.05, 0.9),
        ("decode 32 at 8,000, f16 KV", 1.5, None),
        ("decode 32 at 8,000, int8 KV", None, None),
        ("prefill 512", 1.8, None),
        ("decode 64 after 128, 8 sequences", 2.0, None),
    ]
    assert {name for name in cases[2].theirs if "q8_0" in name} < set(cases[2].theirs)  # f16 of theirs counts there too
    with pytest.raises(NotAvailable, match=r"build_ik_llama_cpp\.sh makes it"):
        cases[0].theirs["ik_llama.cpp, fa on"]()


def test_bars_of_experts_are_against_llama_cpp_alone(
    vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "random.gguf"
    write_random_model(EXPERTS_CONFIG | {"model_type": "qwen3_moe"}, path, read_gguf(vocabulary))
    monkeypatch.setitem(BARS, ("qwen3moe", 64, 2), EXPERTS)
    assert context_of(path) == 256
    cases = list(bar_cases(KvikRuns(1), LlamaCppRuns(tmp_path, 1), IkLlamaCppRuns(tmp_path, 1), path))
    assert [(case.name, case.target, sorted(case.theirs)) for case in cases] == [
        (name, target, ["llama.cpp, fa off", "llama.cpp, fa on"])
        for name, target in (
            ("decode 128 from empty", 1.0),
            ("prefill 512", 1.5),
            ("decode 64 after 128, 8 sequences", 1.5),
        )
    ]


def test_the_table_takes_the_better_of_both_and_shows_both_bars() -> None:
    def figure(value: float) -> float:
        return value

    theirs = {"llama.cpp, fa on": partial(figure, 40.0), "ik_llama.cpp, fa on": partial(figure, 50.0)}
    case = Case("decode", partial(figure, 60.0), theirs, target=1.05, share_target=0.9, step_bytes=lambda: 1e9)
    results = Results()
    for number in range(2):
        results.start_round(80e9)
        results.run(case, number)
    assert table(results, [case], "the others").splitlines()[-1] == (
        "| decode, tok/s | 60 (60 … 60) | 50 (50 … 50) [ik_llama.cpp, fa on] | 1.20"
        " | ≥ 1.05, ≥ 90% of the bandwidth | 75% |"
    )


def program(path: Path, script: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/bin/sh\necho "$@" >> {path.parent}/called\n{script}\n')
    path.chmod(0o755)


def test_what_ik_llama_cpp_prints_is_read(tmp_path: Path) -> None:
    program(tmp_path / "bin" / "ik-llama-bench", """echo 'chatter' >&2; echo '[ {"avg_ts": 12.5} ]'""")
    row = "|   128 |     64 |    8 |   1536 |    1.000 |   100.00 |    2.000 |    256.50 |    3.000 |   200.00 |"
    program(tmp_path / "bin" / "ik-llama-batched-bench", f"echo '|----|' >&2; echo '{row}' >&2")
    ik = IkLlamaCppRuns(tmp_path, 2)
    assert ik.version == "not built"
    assert ik.prefill(Path("m.gguf"), 512, "on", ("rtr",)) == 12.5
    assert ik.decode(Path("m.gguf"), 32, "off", depth=8000, kv_type="q8_0") == 12.5
    assert ik.batched_decode(Path("m.gguf"), 8, 128, 64, "on", ("rtr", "thp")) == 256.5
    assert (tmp_path / "bin" / "called").read_text().splitlines() == [
        "-m m.gguf -t 2 -fa 1 -rtr 1 -p 512 -n 0 -r 1 -o json",
        "-m m.gguf -t 2 -fa 0 -p 0 -n 0 -gp 8000,32 -ctk q8_0 -ctv q8_0 -r 1 -o json",
        "-m m.gguf -npp 128 -ntg 64 -npl 8 -c 1536 -t 2 -tb 2 -fa on -rtr -thp",
    ]
