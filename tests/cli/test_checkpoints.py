"""Checkpoint folders on the command line: run as they are or quantised, and what that changed said on stderr."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from checkpoints import tiny_checkpoint
from command_line import Kvik

LINE = r"weights as q4: relative error \d\.\d\d%, worst \d\.\d\d% \(model\.layers\.\d\.[a-z_.]+\.weight\)\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "m", num_shards=2)


def test_a_folder_runs(kvik: Kvik, folder: Path) -> None:
    result = kvik("run", "--raw", "--json", "abc", "--max-tokens", "3", "--ignore-eos", "-m", str(folder))
    assert (result.exit_code, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert len(report["token_ids"]) == 3
    assert report["model"] == {"name": str(folder), "path": str(folder)}
    assert report["engine"]["weights"] is None


def test_quantising_is_said_on_stderr(kvik: Kvik, folder: Path) -> None:
    common = ("-m", str(folder), "--weights", "q4")
    results = [
        kvik("run", "--raw", "--json", "abc", "--max-tokens", "3", "--ignore-eos", *common),
        kvik("race", "--raw", "--json", "abc", "--max-tokens", "3", "--lengths", "none", *common),
        kvik("bench", "--json", "--prompt", "8", "--gen", "2", "--rounds", "1", *common),
    ]
    for result in results:
        assert result.exit_code == 0, result.output
        assert re.match(LINE, result.stderr), result.stderr
        json.loads(result.stdout)


@pytest.mark.parametrize("command", ["run", "race", "bench"])
def test_a_gguf_file_is_not_quantised(kvik: Kvik, tiny: Path, command: str) -> None:
    result = kvik(command, "-m", str(tiny), "--weights", "q8", *(() if command == "bench" else ("abc",)))
    assert (result.exit_code, result.stdout) == (2, "")
    first, second = result.stderr.splitlines()
    assert first.startswith("InvalidInput: weights is 'q8', but tiny.gguf is a GGUF file")
    assert "checkpoint folder" in second


def test_a_folder_has_a_path_and_stays(kvik: Kvik, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kvik("models", "path", str(folder)).stdout == f"{folder}\n"
    assert kvik("models", "pull", str(folder)).stderr == f"{folder}: already here\n"
    result = kvik("models", "rm", str(folder))
    assert result.exit_code == 2
    assert result.stderr.splitlines()[1] == f"hint: `rm -r {folder}` does"
    assert kvik("plan", str(folder), "--context", "128").exit_code == 0
    monkeypatch.chdir(folder.parent)
    result = kvik("run", "-m", folder.name, "abc")
    assert result.exit_code == 2
    assert f"did you mean ./{folder.name}?" in result.stderr


def test_folders_in_the_models_folder_are_listed(kvik: Kvik, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVIK_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = tiny_checkpoint(tmp_path / "models" / "mine")
    (tmp_path / "models" / "half").mkdir()
    rows = {row["name"]: row for row in json.loads(kvik("models", "ls", "--json").stdout)}
    size_bytes = (folder / "model.safetensors").stat().st_size
    assert rows[str(folder)]["size_bytes"] == size_bytes
    assert rows[str(folder)]["source"] == "models folder"
    assert not any("half" in name for name in rows)
