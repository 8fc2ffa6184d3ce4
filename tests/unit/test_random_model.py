"""Random models of a shape, and the comparison that they are made for."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from bars import BARS, Bars, bar_cases, bars_of
from comparison import Case, Results, table
from gguf_files import tiny_llama
from kvik import LLM, SamplingParams
from kvik.files.gguf import read_gguf
from kvik_runs import KvikRuns, NotAvailable
from llama_cpp_runs import IkLlamaCppRuns, LlamaCppRuns
from random_model import write_random_model

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


def test_what_no_random_model_is_made_of(vocabulary: Path, tmp_path: Path) -> None:
    file = read_gguf(vocabulary)
    with pytest.raises(ValueError, match="gemma3_text: only the shapes of llama, qwen2, qwen3"):
        write_random_model(CONFIG | {"model_type": "gemma3_text"}, tmp_path / "x.gguf", file)
    with pytest.raises(ValueError, match="vocab_size is 10, the vocabulary has"):
        write_random_model(CONFIG | {"vocab_size": 10}, tmp_path / "x.gguf", file)
    assert not (tmp_path / "x.gguf").exists()


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
