"""lm-eval measures over HTTP what the library computes, to the last bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvik.config import SamplingParams
from kvik.engine.llm import LLM

TASKS = "kvik_choice,kvik_write,kvik_rolling"


@pytest.fixture
def samples(url: str, tasks: Path) -> dict[str, list[dict[str, Any]]]:
    """What lm-eval asked and was answered, by task."""
    out = tasks / "out"
    model = f"model=smollm2,base_url={url}/completions,tokenizer_backend=remote,num_concurrent=4"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", model),
            *("--include_path", str(tasks), "--tasks", TASKS, "--output_path", str(out), "--log_samples"),
        ],
        env=os.environ | {"HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tasks / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for name in TASKS.split(","):
        (path,) = out.rglob(f"samples_{name}_*.jsonl")
        found[name] = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(found[name]) == 4
    return found


def logprobs(llm: LLM, ids: list[int]) -> list[tuple[float, bool]]:
    """Of each token but the first: its logprob, and whether it is the likeliest."""
    (completion,) = llm.generate(ids, SamplingParams(max_tokens=1, logprobs=1, echo=True))
    assert completion.prompt_logprobs is not None
    return [(entry.logprob, entry.logprob == max(entry.top.values())) for entry in completion.prompt_logprobs if entry]


def test_lm_eval_measures_what_the_library_computes(
    samples: dict[str, list[dict[str, Any]]], default_model_path: Path
) -> None:
    llm = LLM(default_model_path, kv_memory="64MiB")
    for sample in samples["kvik_choice"]:
        for arguments, ((told, is_greedy),) in zip(sample["arguments"].values(), sample["resps"], strict=True):
            context, continuation = arguments["arg_0"], arguments["arg_1"]
            scored = logprobs(llm, llm.encode(context + continuation))[len(llm.encode(context)) - 1 :]
            assert float(told) == sum(logprob for logprob, _ in scored)
            assert (is_greedy == "True") == all(likeliest for _, likeliest in scored)
    for sample in samples["kvik_write"]:
        params = SamplingParams(max_tokens=12, stop=["\n", ".", "<|im_end|>"])
        (completion,) = llm.generate(sample["arguments"]["gen_args_0"]["arg_0"], params)
        assert sample["resps"] == [[completion.text]]
    for sample in samples["kvik_rolling"]:
        # lm-eval puts the token of a text's beginning before it, which has no logprob of its own.
        assert llm.model.tokenizer.bos_token_id is not None
        ids = [llm.model.tokenizer.bos_token_id, *llm.encode(sample["arguments"]["gen_args_0"]["arg_0"])]
        assert float(sample["resps"][0][0]) == sum(value for value, _ in logprobs(llm, ids))
