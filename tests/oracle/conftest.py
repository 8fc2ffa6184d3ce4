"""Fixtures of the comparisons with transformers: they need torch, and a venv of their own (`make test-oracle`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest

from kvik import LLM
from kvik.config import ActivationDType, KVDType

if TYPE_CHECKING:
    from oracle.hf_llama import Continuation

NUM_NEW_TOKENS = 96
CONTEXT = 2048
NUM_WINDOWS, WINDOW = 2, 1024  # 2,048 tokens, each window a sequence of its own

PROMPTS = (
    "Once upon a time",
    "The three largest cities of Denmark are",
    'def fibonacci(n):\n    """Return the first n Fibonacci numbers."""\n',
    ("<|im_start|>user\nWhy is the sky blue? Answer in three sentences.<|im_end|>\n<|im_start|>assistant\n"),
    # Longer than the token budget of a step and than two segments of attention.
    "".join(f"{number} times 7 is {7 * number}.\n" for number in range(1, 60)),
)

LLMFactory: TypeAlias = Callable[[ActivationDType, KVDType], LLM]
Report: TypeAlias = Callable[[object], None]
Window: TypeAlias = tuple[list[int], npt.NDArray[np.float32]]

# Without torch there is nothing to compare with; the summary says that these tests were left out.
HAS_TORCH = find_spec("torch") is not None and find_spec("transformers") is not None
collect_ignore_glob = [] if HAS_TORCH else ["test_*.py"]


@pytest.fixture(scope="session")
def hf_model(default_model_path: Path) -> Any:
    """The default model in transformers, as transformers' own GGUF loader reads it."""
    from oracle.hf_llama import load

    return load(default_model_path)


@pytest.fixture(scope="session")
def llm_of(default_model_path: Path) -> LLMFactory:
    """The default model in kvik, by the precision of activations and the format of keys and values."""

    @cache
    def make(activations: ActivationDType, kv_dtype: KVDType) -> LLM:
        return LLM(str(default_model_path), activations=activations, kv_dtype=kv_dtype, context=CONTEXT)

    return make


@pytest.fixture(scope="session")
def prompts(llm_of: LLMFactory) -> list[list[int]]:
    """Token ids of the prompts."""
    return [llm_of("int8", "f16").encode(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="session")
def hf_continuations(hf_model: Any, prompts: list[list[int]]) -> list[Continuation]:
    """What transformers writes after each prompt."""
    from oracle.hf_llama import continue_greedily

    return [continue_greedily(hf_model, prompt, NUM_NEW_TOKENS) for prompt in prompts]


@pytest.fixture(scope="session")
def windows(llm_of: LLMFactory, hf_model: Any) -> list[Window]:
    """Stretches of Python's manual far apart, as token ids, and the reference's logits."""
    from oracle.hf_llama import logits

    text = "\n\n".join(topics[name] for name in sorted(topics))
    token_ids = llm_of("int8", "f16").encode(text)
    starts = [len(token_ids) * index // NUM_WINDOWS for index in range(NUM_WINDOWS)]
    stretches = [token_ids[start : start + WINDOW] for start in starts]
    assert [len(stretch) for stretch in stretches] == [WINDOW] * NUM_WINDOWS
    return [(stretch, logits(hf_model, stretch)) for stretch in stretches]


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Report:
    """Adds measured figures to the summary of the run."""

    def add(figures: object) -> None:
        record_property("figures", str(figures))

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures that tests reported, passed or not: a pass alone does not say by how much."""
    if not HAS_TORCH:
        terminalreporter.write_line("tests/oracle was left out: torch or transformers is missing (`make test-oracle`)")
    lines = [f"{name}: {figures}" for name, figures in _figures(terminalreporter)]
    if lines:
        terminalreporter.section("against transformers in float32")
        for line in lines:
            terminalreporter.write_line(line)


def _figures(terminalreporter: pytest.TerminalReporter) -> Iterator[tuple[str, object]]:
    for outcome in ("passed", "failed"):
        for test in terminalreporter.getreports(outcome):
            for name, value in test.user_properties:
                if name == "figures":
                    yield test.nodeid.rpartition("::")[2], value
