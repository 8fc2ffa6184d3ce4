"""docs/idea.md, run: its blocks of Python are one program, and print what stands below them."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvik

DOCS = Path(__file__).parents[2] / "docs" / "idea.md"
TEXT = DOCS.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```\n(?:\s*^```text\n(.*?)^```\n)?", TEXT, re.DOTALL | re.MULTILINE)
PROMPTS = [[3, 1, 4, 1, 5], [0], list(range(49, 9, -1))]


def run(blocks: list[tuple[str, str]]) -> tuple[dict[str, Any], list[str]]:
    """The names that the blocks leave behind, and what each of them printed."""
    names: dict[str, Any] = {}
    printed = []
    for code, _ in blocks:
        with redirect_stdout(io.StringIO()) as output:
            exec(compile(code, DOCS.name, "exec"), names)
        printed.append(output.getvalue())
    return names, printed


def check(blocks: list[tuple[str, str]]) -> None:
    assert run(blocks)[1] == [output for _, output in blocks]


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    return run(BLOCKS)[0]


def test_it_is_short_and_no_block_is_left_out() -> None:
    assert len(BLOCKS) == TEXT.count("```python") >= 1
    assert sum(bool(output) for _, output in BLOCKS) == TEXT.count("```text") >= 1
    assert TEXT.count("```") == 2 * (TEXT.count("```python") + TEXT.count("```text"))
    lines = [line for code, _ in BLOCKS for line in code.splitlines() if line.strip()]
    assert 40 <= len(lines) <= 80
    assert max(map(len, lines)) <= 120


def test_the_blocks_print_what_the_document_says() -> None:
    check(BLOCKS)


def test_both_ways_wrote_the_same_and_something(names: dict[str, Any]) -> None:
    written = names["tokens"][len(names["prompt"]) :]
    assert names["tokens"] == names["tokens_with_cache"]
    assert len(written) == 20
    assert len(set(written)) > 5


@pytest.mark.parametrize("prompt", PROMPTS)
def test_both_ways_agree_on_other_prompts_by_a_wide_margin(names: dict[str, Any], prompt: list[int]) -> None:
    tokens, cache = names["write_with_cache"](prompt, 30)
    assert names["write_without_cache"](prompt, 30) == tokens
    x, computed = names["compute_all"](tokens[:-1])
    np.testing.assert_allclose(np.array(cache), np.array(computed), rtol=0, atol=1e-12)
    logits = np.sort((x @ names["lm_head"])[len(prompt) - 1 :], axis=1)
    assert (logits[:, -1] - logits[:, -2]).min() > 1e-6  # a last bit more or less changes no token


def test_rows_and_multiply_adds_are_those_of_the_formulas(names: dict[str, Any]) -> None:
    n, work = 100, names["work"]
    layers, width = names["num_layers"], names["hidden_size"]
    row = layers * width * 2 * (width + names["kv_size"])  # one row through the matrices
    pair = layers * width * 2  # one row that looks at one token
    for write, rows, pairs in (
        ("write_without_cache", n * (n + 1) // 2, n * (n + 1) * (2 * n + 1) // 6),
        ("write_with_cache", n, n * (n + 1) // 2),
    ):
        work.update(rows=0, multiply_adds=0)
        names[write]([0], n)
        assert work == {"rows": rows, "multiply_adds": rows * row + pairs * pair + n * width * names["vocab_size"]}


def test_the_models_bytes_are_those_that_are_planned() -> None:
    lines = re.findall(r"^(\S+) +(\d+) heads, +(\d+) of KV: +(\S+) B a token, +(\S+) B for 2,048$", TEXT, re.MULTILINE)
    assert len(lines) >= 3
    for name, heads, kv_heads, token_bytes, sequence_bytes in lines:
        plan = kvik.plan(name, context=2048)
        assert (plan.model.num_heads, plan.model.num_kv_heads) == (int(heads), int(kv_heads))
        assert plan.kv.token_bytes == int(token_bytes.replace(",", ""))
        assert plan.kv.num_bytes == int(sequence_bytes.replace(",", ""))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("[cache[index], [k, v]]", "[[k, v], cache[index]]"),  # the new ones first
        ("[cache[index], [k, v]]", "[cache[index], [v, k]]"),
        ("[cache[index], [k, v]]", "[cache[index][:, :-1], [k, v]]"),  # the newest one is overwritten
        ("embed(tokens, len(cache[0][0]))", "embed(tokens, 0)"),
        ("np.where(is_later, -np.inf, ", "np.where(is_later, 0, "),
    ],
)
def test_a_cache_or_mask_that_is_wrong_does_not_pass(right: str, wrong: str) -> None:
    """The document's own comparisons see it; else they would show nothing."""
    assert TEXT.count(right) == 1
    blocks = [(code.replace(right, wrong), output) for code, output in BLOCKS]
    with pytest.raises(AssertionError):
        check(blocks)
