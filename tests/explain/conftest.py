"""A small model, and a run of it that was watched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gguf_files import tiny_llama
from kvik import LLM, SamplingParams
from kvik.explain.run import TracedRun, trace_run
from kvik.explain.selection import select

PROMPT = "hello there"
NUM_WRITTEN = 30


def traced(llm: LLM, prompt: str | list[int] = PROMPT, max_tokens: int = NUM_WRITTEN) -> TracedRun:
    """A watched run of that model, to its full length."""
    prompt_ids = llm.encode(prompt)
    spec = llm.model.decoder.spec
    selection = select(spec, spec.kv_spec(llm.config.kv_dtype), len(prompt_ids) + max_tokens)
    return trace_run(llm, prompt_ids, SamplingParams(max_tokens=max_tokens, ignore_eos=True), selection)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights: 2 layers, 4 query heads, 2 KV heads of 16 dimensions."""
    return tiny_llama(tmp_path_factory.mktemp("explain") / "tiny.gguf", tied=False)


@pytest.fixture(scope="session")
def llm(tiny: Path) -> LLM:
    return LLM(str(tiny))


@pytest.fixture(scope="session")
def run(llm: LLM) -> TracedRun:
    return traced(llm)


@pytest.fixture(scope="session")
def data(llm: LLM, run: TracedRun) -> dict[str, Any]:
    """What the page of that run knows."""
    from kvik.explain.page_data import FirstToken, page_data
    from kvik.explain.prefixes import default_follow_ups, follow_up

    found = [
        follow_up(llm, run.token_ids, title, token_ids)
        for title, token_ids in default_follow_ups(llm, run.prompt_ids, run.token_ids)
    ]
    return page_data(run, "tiny", found, [FirstToken(1, 0.01, 0.01), FirstToken(32, 0.08, 0.011)])
