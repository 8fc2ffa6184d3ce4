"""`kvik cache` and `--store`: what is stored is shown, checked, computed again, and removed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from command_line import Kvik
from gguf_files import tiny_llama
from kvik.cli.cache import app
from kvik.cli.options import FolderCommand
from kvik.config import SamplingParams
from kvik.engine.llm import LLM
from kvik.engine.session import Session
from kvik.errors import InvalidInput
from kvik.store.entry import HEADER_BYTES, decode, encode


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Five blocks of one model, two of them under a salt, and a saved session; three of another."""
    folder = tmp_path / "store"
    for seed, prompts in ((1, ((list(range(100)), None), (list(range(70)), "ada"))), (2, ((list(range(100)), None),))):
        llm = LLM(tiny_llama(tmp_path / f"model-{seed}.gguf", seed=seed), threads=1, store=folder)
        for prompt, salt in prompts:
            llm.generate(prompt, SamplingParams(max_tokens=1), salt=salt)
        if seed == 1:
            Session(llm, system="Hello").save("hello")
        llm.close()
    return folder


def run(store: Path, *arguments: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, [*arguments, "--store", str(store)], catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result.stdout


def told(store: Path, *arguments: str, exit_code: int = 0) -> Any:
    return json.loads(run(store, *arguments, "--json", exit_code=exit_code))


def blocks(store: Path) -> list[Path]:
    return sorted(store.glob("v1/*/blocks/*/*"))


def test_ls_and_stats(store: Path) -> None:
    first, second = sorted(told(store, "ls"), key=lambda each: str(each["model"]))
    assert (first["model"], first["num_blocks"], first["num_sessions"]) == ("model-1.gguf", 5, 1)
    assert (second["model"], second["num_blocks"], second["num_sessions"]) == ("model-2.gguf", 3, 0)
    text = run(store, "ls")
    assert text.splitlines()[0].split() == ["SCOPE", "MODEL", "KV", "BLOCKS", "SIZE", "SESSIONS", "LAST", "USED"]
    assert "model-1.gguf" in text
    total = told(store, "stats")
    assert (total["num_models"], total["num_blocks"], total["num_sessions"]) == (2, 8, 1)
    assert total["num_bytes"] == sum(path.stat().st_size for path in blocks(store))
    assert "8 blocks of 2 models" in run(store, "stats")


def test_nothing_stored_is_no_error(tmp_path: Path) -> None:
    assert told(tmp_path, "ls") == []
    assert told(tmp_path, "stats")["num_blocks"] == 0
    assert told(tmp_path, "verify")["num_blocks"] == 0
    with pytest.raises(InvalidInput, match="nothing is stored"):
        run(tmp_path, "gc")


def test_verify_finds_what_has_changed(store: Path) -> None:
    assert "8 blocks" in run(store, "verify")
    path = blocks(store)[0]
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    report = told(store, "verify", exit_code=1)
    assert report["faults"] == {"tag": 1}
    assert not path.exists()
    assert told(store, "verify")["faults"] == {}
    assert told(store, "stats")["num_quarantined"] == 1


def test_verify_computes_blocks_again(store: Path) -> None:
    report = told(store, "verify", "--recompute", "100")
    assert (report["num_recomputed"], report["num_different"], report["num_not_computable"]) == (8, 0, 0)
    assert told(store, "verify", "--recompute", "3", "--seed", "1")["num_recomputed"] == 3


def test_verify_finds_bytes_that_no_model_computes(store: Path) -> None:
    """Whole, with the right tag, and wrong: what only computing it again can show."""
    path = blocks(store)[0]
    data = path.read_bytes()
    scope, digest = data[16:32], data[32:48]
    block = decode(data, scope, digest, b"")
    payload = bytes([block.payload[0] ^ 1, *block.payload[1:]])
    path.write_bytes(b"".join(encode(replace(block, payload=payload), scope, b"")))
    assert told(store, "verify")["faults"] == {}
    report = told(store, "verify", "--recompute", "100", exit_code=1)
    assert (report["num_different"], len(data)) == (1, HEADER_BYTES + 128 + len(payload))


def test_what_cannot_be_computed_again_is_said(store: Path, tmp_path: Path) -> None:
    (tmp_path / "model-2.gguf").unlink()
    with (tmp_path / "model-1.gguf").open("r+b") as file:
        file.seek(-40, 2)
        file.write(b"\0")
    report = told(store, "verify", "--recompute", "100")
    assert (report["num_recomputed"], report["num_not_computable"]) == (0, 8)


def test_gc_keeps_to_a_quota(store: Path) -> None:
    size = blocks(store)[0].stat().st_size
    report = told(store, "gc", "--quota", str(4 * size))
    assert (report["num_files"], report["num_removed"]) == (8, 5)
    assert "0 files removed" in run(store, "gc")


def test_rm(store: Path) -> None:
    scope = next(each["scope"] for each in told(store, "ls") if each["model"] == "model-2.gguf")
    for arguments in ([], ["x" * 8], ["", "--all"], [""]):
        with pytest.raises(InvalidInput):
            run(store, "rm", *arguments)
    run(store, "rm", scope[:8])
    assert told(store, "stats")["num_models"] == 1
    run(store, "rm", "--all")
    assert told(store, "stats")["num_models"] == 0


def test_run_stores_and_says_what_it_read(kvik: Kvik, tmp_path: Path, tiny: Path) -> None:
    prompt = "Once upon a time there was a fox who lived in the woods behind the hill, and he was old."
    arguments = ["run", "-m", str(tiny), "--raw", "--max-tokens", "3", "--store", str(tmp_path / "store")]
    first = json.loads(kvik(*arguments, "--json", prompt).stdout)
    second = json.loads(kvik(*arguments, "--json", prompt).stdout)
    assert (first["stats"]["num_stored_tokens"], second["stats"]["num_stored_tokens"] > 0) == (0, True)
    assert first["token_ids"] == second["token_ids"]
    line = kvik(*arguments, "--stats", prompt).stderr
    assert f"stored {second['stats']['num_stored_tokens']} tokens in " in line


@pytest.mark.parametrize("option", ["--store-key", "--store-quota", "--store-policy"])
def test_options_of_a_store_need_one(kvik: Kvik, tiny: Path, option: str) -> None:
    result = kvik("run", "-m", str(tiny), option, "end" if option == "--store-policy" else "9GB", "Hello")
    assert result.exit_code == 2
    assert f"{option} without --store" in result.stderr


def options_of(*words: str) -> tuple[str | None, list[str]]:
    """The store's folder and the arguments that a command line has, read as `kvik run` reads it."""
    found: dict[str, Any] = {}
    typed = typer.Typer()

    @typed.command(cls=FolderCommand)
    def command(
        words: Annotated[list[str] | None, typer.Argument()] = None,
        store: str | None = None,
        system: str | None = None,
        raw: Annotated[bool, typer.Option("--raw")] = False,
    ) -> None:
        found.update(store=store, words=words)

    result = CliRunner().invoke(typed, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return found["store"], found["words"] or []


@pytest.mark.tiny
def test_store_alone_is_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVIK_HOME", str(tmp_path))
    folder, file = str(tmp_path / "store"), tmp_path / "model.gguf"
    file.touch()
    assert options_of() == (None, [])
    for words, rest in (
        (["--store"], []),
        (["--store", "--raw"], []),
        (["--store", "Hello"], ["Hello"]),
        (["Hello", "--store"], ["Hello"]),
        (["--store", "--", "/tmp"], ["/tmp"]),
        (["--store", str(file)], [str(file)]),
    ):
        assert options_of(*words) == (folder, rest)
    for named in ("/a/b", "./a", "../a", "~/a", ".", ".."):
        assert options_of("--store", named, "Hello") == (named, ["Hello"])
        assert options_of(f"--store={named}") == (named, [])
    assert options_of("--store=a", "b") == ("a", ["b"])
    assert options_of("--system", "--store") == (None, []), "it is the value of another option"
    assert options_of("--", "--store") == (None, ["--store"])


@pytest.mark.parametrize("name", ["ls", "stats", "verify", "gc", "rm"])
def test_each_command_takes_store_without_a_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Path
) -> None:
    monkeypatch.setenv("KVIK_HOME", str(store.parent))
    result = CliRunner().invoke(app, [name, "--store", *(["--all"] if name == "rm" else [])], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_run_and_serve_take_store_without_a_folder(
    kvik: Kvik, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVIK_HOME", str(tmp_path))
    prompt = "Once upon a time there was a fox who lived in the woods behind the hill, and he was old."
    result = kvik("run", "-m", str(tiny), "--raw", "--max-tokens", "3", "--store", "--store-quota", "1MB", prompt)
    assert result.exit_code == 0, result.stderr
    assert len(blocks(tmp_path / "store")) == json.loads(kvik("cache", "stats", "--json").stdout)["num_blocks"] > 0
    result = kvik("serve", "--port", "0", "--store", "no-such-model")
    assert result.exit_code == 2
    assert "no-such-model" in result.stderr, "it is the model, and no folder"
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").touch()
    result = kvik("serve", "--store", str(tmp_path / "checkpoint"))
    assert result.exit_code == 2
    assert "a model" in result.stderr
