"""`kvik plan`: tables that fit into 80 columns, JSON whose names stay, and clear refusals."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from command_line import Kvik
from kvik.planner.catalogue import device_entries, model_entries
from subprocesses import python

ROOT = Path(__file__).parents[2]
NAMES = ROOT / "docs" / "reference" / "plan-json.md"
EXAMPLES = [
    "llama-3-70b --context 4096 --users 10 --device h100",
    "--compare llama-3-8b,mistral-7b,gpt3-175b",
    "gemma-3-27b --context 32768 --users 4 --memory 80GB --kv int8",
    "deepseek-v3 --context 8192 --device h200",
    "mistral-7b --device 4090 --users 20 --prefix 1000 --context 2048 --weights q4_0",
    "qwen3-next-80b-a3b",
    "llama-4-scout",
    "--list models",
    "--list devices",
    "--compare llama-2-7b,llama-2-70b,falcon-7b --users 100 --context 2048 --device a100",
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_what_is_printed_fits_into_80_columns(kvik: Kvik, example: str) -> None:
    result = kvik("plan", *shlex.split(example))
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    long = [line for line in result.stdout.splitlines() if len(line) > 80]
    assert long == []


@pytest.mark.parametrize("name", [*model_entries()])
def test_every_model_is_printed_within_80_columns(kvik: Kvik, name: str) -> None:
    result = kvik("plan", name, "--users", "1000", "--device", "mi300x", "--prefix", "100")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    entry = model_entries()[name]
    doubts = [line for line in result.stdout.splitlines() if line.startswith("uncertain:")]
    assert bool(doubts) == bool(entry["uncertain"])


def test_planning_imports_nothing_heavy() -> None:
    """Counted in modules, in place of a stopwatch."""
    code = "import sys\nfrom kvik.cli.app import app\nsys.argv = ['kvik', 'plan', *sys.argv[1:]]\n"
    code += "try:\n    app()\nfinally:\n    print(*sys.modules, sep='\\n')"
    for example in EXAMPLES:
        result = python("-c", code, *shlex.split(example))
        assert result.returncode == 0, result.stderr
        modules = set(result.stdout.split())
        assert "kvik.cli.plan" in modules
        heavy = {"numpy", "gguf", "tokenizers", "huggingface_hub", "jinja2", "rich.live", "matplotlib"}
        assert not modules & (heavy | {"kvik.engine", "kvik._native", "kvik.ops"}), example


def test_the_first_example_says_what_matters(kvik: Kvik) -> None:
    text = kvik("plan", *shlex.split(EXAMPLES[0])).stdout
    words = " ".join(text.split())
    for part in (
        "80 layers (80 full), 64 heads, 8 KV heads of 128 (GQA-8)",
        "keys and values 13.4 GB 10 users with 4,096 tokens, f16",
        "does not fit into NVIDIA H100 SXM (80.0 GB)",
        "f16 * 327,680 1.34 GB 13.4 GB",
        "MHA 64 2,621,440 107 GB 100 %",
        "bandwidth",
        "(assumed)",
        "the 64-head figure; its 8 KV heads make it 0.33 MB (1.34 GB)",
        "98.4 %",
    ):
        assert part in words, part


def test_models_side_by_side_have_the_shortest_context(kvik: Kvik) -> None:
    lines = kvik("plan", "--compare", "llama-3-8b,mistral-7b,gpt3-175b").stdout.splitlines()
    assert lines[0].startswith("f16 keys and values at 2,048 tokens")
    assert [line.split()[0] for line in lines[2:5]] == ["llama-3-8b", "mistral-7b-v0.1", "gpt3-175b"]
    assert [line.split()[4] for line in lines[2:5]] == ["131,072", "131,072", "4,718,592"]


def test_what_is_uncertain_is_shown_as_such(kvik: Kvik) -> None:
    text = kvik("plan", "kimi-k2", "--context", "4096", "--device", "tpu-v5e").stdout
    assert "uncertain: params_b" in text
    assert "? uncertain: all its figures" not in text  # no speed: its active parameters are not known
    text = kvik("plan", "phi-3-medium", "--context", "4096", "--device", "tpu-v5e").stdout
    assert "uncertain: all figures" in text
    assert "? uncertain: all its figures" in text
    assert "Google TPU v5e (16.0 GB) ?" in " ".join(text.split())


def test_this_machine_is_measured(kvik: Kvik, tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVIK_HOME", str(tmp_path))
    limits = "kvik.ops.limits.MEASURE_S"
    monkeypatch.setattr(limits, 0.0)
    result = kvik("plan", str(tiny), "--context", "300", "--users", "2", "--device", "here", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    speed = report["speed"]
    assert speed["is_measured"]
    assert 0 < speed["read_efficiency"] <= 3
    assert speed["decode"]["tokens_per_s"] > 0
    assert speed["prefill"]["seconds"] > 0
    assert report["memory"]["kv_auto_bytes"] > 0
    assert report["fit"]["fits"]


# JSON.


def leaves(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in leaves(inner, f"{name}.{key}".lstrip("."))]
    if isinstance(value, list) and value:
        return [leaf for inner in value for leaf in leaves(inner, f"{name}[]")]
    return [(f"{name}[]", None) if value == [] else (name, value)]


@pytest.mark.parametrize("example", EXAMPLES)
def test_json_has_bytes_as_whole_numbers(kvik: Kvik, example: str) -> None:
    report = json.loads(kvik("plan", *shlex.split(example), "--json").stdout)
    assert (report["kind"], report["version"]) == ("kvik plan", 1)
    for name, value in leaves(report):
        if name.endswith("_bytes"):
            assert value is None or type(value) is int, name


def test_json_names_are_those_of_the_documentation(kvik: Kvik) -> None:
    """A name that goes, comes or changes has to be told in docs/reference/plan-json.md."""
    arguments = "gemma-3-27b --context 4096 --users 100 --replicas 4 --device h100 --json"
    report = json.loads(kvik("plan", *shlex.split(arguments)).stdout)
    types = re.compile(r"^(kv|weights)\.(f32|f16|int8|k4v4|bf16|q\w+)\.")
    names = {types.sub(r"\1.TYPE.", name) for name, _ in leaves(report)}
    names = {re.sub(r"^speed\.(decode|prefill)\.", "speed.PHASE.", name) for name in names}
    text = NAMES.read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `([\w.\[\]]+)` \|", text, re.MULTILINE))
    assert names == listed


def test_json_and_the_tables_tell_the_same(kvik: Kvik) -> None:
    report = json.loads(kvik("plan", *shlex.split(EXAMPLES[0]), "--json").stdout)
    assert report["memory"]["kv_bytes"] == report["kv"]["f16"]["total_bytes"] == 13_421_772_800
    assert report["memory"]["total_bytes"] == sum(
        report["memory"][name] for name in ("weights_bytes", "kv_bytes", "activations_bytes", "tables_bytes")
    )
    assert [row["kv_token_bytes"] for row in report["what_if"]] == [2_621_440, 327_680, 40_960]
    assert [row["attention"] for row in report["what_if"]] == ["MHA", "GQA-8", "MQA"]
    assert report["weights"]["q8_0"]["file_bytes"] == 70_600_000_000 * 34 // 32
    assert report["fit"]["fits"] is False
    assert report["fit"]["needed_bytes"] == report["memory"]["total_bytes"]


def test_the_listing_has_every_entry(kvik: Kvik) -> None:
    for what, entries in (("models", model_entries()), ("devices", device_entries())):
        report = json.loads(kvik("plan", "--list", what, "--json").stdout)
        assert [one["name"] for one in report[what]] == list(entries)
        assert all(one["source"] and isinstance(one["uncertain"], list) for one in report[what])


# Plots.


@pytest.mark.parametrize(
    "arguments", [["llama-3-8b"], ["gemma-3-27b", "--users", "4"], ["--compare", "llama-3-8b,gpt2"]]
)
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_plot_is_drawn(kvik: Kvik, tmp_path: Path, arguments: list[str], suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plan{suffix}"
    result = kvik("plan", *arguments, "--plot", str(path))
    assert result.exit_code == 0, result.output
    assert path.stat().st_size > 5000


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "said", "hint"),
    [
        ("lama-3-8b", "no model is called lama-3-8b", "did you mean llama-3-8b"),
        ("llama-3-8b --device rtx", "rtx stands for several devices", "NVIDIA RTX 4090"),
        ("llama-3-8b --device h1000", "h1000 is no device", "NVIDIA H100 SXM"),
        ("llama-3-8b --context 8193", "context is 8,193; llama-3-8b was made for 8,192", "from 1 to 8,192"),
        ("--compare llama-3-8b,gpt3-175b --context 4096", "context is 4,096; gpt3-175b was made for 2,048", "2,048"),
        ("llama-3-8b --context -1", "context is -1", "from 1"),
        ("llama-3-8b --users 0", "users is 0", "from 1"),
        ("llama-3-8b --memory 0", "memory is '0'", "like 512MiB"),
        ("llama-3-8b --memory -5GB", "memory is '-5GB'", "like 512MiB"),
        ("llama-3-8b --memory 999999999TB", "memory is '999999999TB'", "up to 1024TiB"),
        ("llama-3-8b --weights q17", "weights is 'q17'", "q8_0"),
        ("llama-3-8b --prefix 9000", "prefix is 9,000", "from 0 to"),
        ("llama-3-8b --compare gpt2,opt-13b", "--compare takes the place of MODEL", "among those compared"),
        ("--compare gpt2,,opt-13b", "--compare is 'gpt2,,opt-13b'", "commas"),
        ("--compare gpt2,gpt2", "--compare is 'gpt2,gpt2'", "each once"),
        ("llama-3-8b --plot /nowhere/at/all.png", "there is no folder /nowhere/at", "make it"),
        ("llama-3-8b --plot plan.pdf", "--plot is plan.pdf", ".png or .svg"),
    ],
)
def test_bad_input_is_one_line_and_a_hint(kvik: Kvik, arguments: str, said: str, hint: str) -> None:
    result = kvik("plan", *shlex.split(arguments))
    first, second = result.stderr.splitlines()
    assert result.exit_code == 2
    assert result.stdout == ""
    assert said in first
    assert second.startswith("hint: ")
    assert hint in second


def test_more_models_than_can_be_read_side_by_side_are_refused(kvik: Kvik) -> None:
    result = kvik("plan", "--compare", ",".join([*model_entries()][:21]))
    assert result.exit_code == 2
    assert "--compare has 21 models" in result.stderr
