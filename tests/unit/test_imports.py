"""`import kvik` is light, and every name it promises is there."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvik
from gguf_files import tiny_llama
from subprocesses import python

HEAVY = (
    "numpy",
    "tokenizers",
    "gguf",
    "huggingface_hub",
    "jinja2",
    "safetensors",
    "typer",
    "rich",
    "torch",
    "transformers",
    "asyncio",
    "kvik._native",
    "kvik.engine",
    "kvik.models",
    "kvik.ops",
)


def imported_by(statement: str) -> set[str]:
    result = python("-c", f"import sys\n{statement}\nprint(*sys.modules, sep='\\n')")
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_importing_kvik_brings_nothing_heavy() -> None:
    modules = imported_by("import kvik")
    assert not modules.intersection(HEAVY)


def test_importing_kvik_brings_few_modules() -> None:
    """Counted against Python's own start, in place of a stopwatch."""
    modules = imported_by("import kvik")
    assert {name for name in modules if name.startswith("kvik")} == {"kvik"}
    assert not modules & {"dataclasses", "enum", "inspect", "re", "typing"}
    own = imported_by("import dataclasses, typing, math, numbers")
    assert len(imported_by("import kvik; kvik.SamplingParams()") - own) <= 5


@pytest.mark.parametrize("statement", ["from kvik import LLM", "import kvik.engine.llm"])
def test_the_engine_never_imports_torch(statement: str) -> None:
    modules = imported_by(statement)
    assert {"numpy", "kvik.engine.llm"} <= modules
    assert not modules.intersection({"torch", "transformers", "typer", "kvik.cli"})


def test_a_prompt_answered_brings_only_what_it_needs(tmp_path: Path) -> None:
    """`kvik run --raw` of a file on disk: no template engine, no downloads, no terminal art, no library of formats."""
    path = tiny_llama(tmp_path / "tiny.gguf")
    arguments = ["kvik", "run", "--raw", "--max-tokens", "1", "--threads", "1", "-m", str(path), "a"]
    modules = imported_by(
        f"from kvik.cli.app import main\nsys.argv = {arguments}\ntry:\n    main()\nexcept SystemExit as end:\n"
        "    assert not end.code"
    )
    assert {"kvik.engine.llm", "kvik.ops.native", "typer"} <= modules
    others = {"jinja2", "huggingface_hub", "safetensors", "rich", "gguf", "yaml", "statistics", "asyncio", "pydantic"}
    # Of kvik's own: what other commands need.
    others |= {"kvik.ops.reference", "kvik.cli.chat", "kvik.measure.passes", "kvik.cli.race_view"}
    assert not modules.intersection(others)


def test_the_engine_brings_no_library_of_formats_and_no_openssl() -> None:
    """40 ms and 7 MB, for a model that needs neither."""
    modules = imported_by("import kvik.engine.llm, kvik.ops.native")
    assert not modules.intersection({"gguf", "yaml", "_hashlib", "jinja2", "huggingface_hub", "asyncio"})


@pytest.mark.parametrize("name", kvik.__all__)
def test_every_exported_name_is_there(name: str) -> None:
    assert getattr(kvik, name) is not None


def test_dir_shows_every_exported_name() -> None:
    """What a shell completes, before any of it was used."""
    result = python("-c", "import kvik; print(*dir(kvik))")
    assert set(kvik.__all__) <= set(result.stdout.split())


def test_exported_names_are_unique_and_sorted() -> None:
    assert len(set(kvik.__all__)) == len(kvik.__all__)
    assert set(kvik.__all__) >= {"LLM", "SamplingParams", "Session", "KvikError", "Completion", "Piece", "Stats"}


def test_every_lazy_name_is_exported() -> None:
    result = python("-c", "from kvik import *; print(LLM.__name__, Session.__name__, Stats.__name__)")
    assert result.stdout.split() == ["LLM", "Session", "Stats"], result.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'kvik' has no attribute 'Model'"):
        kvik.Model  # noqa: B018
