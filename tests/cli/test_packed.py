"""`--packed-cache` and `kvik cache packed`: answers are the same from kept weights, which are shown and removed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import Kvik
from kvik.store import fingerprints


def test_kept_weights_answer_alike_and_are_shown_and_removed(
    kvik: Kvik, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "SETTLED_S", 0.0)
    folder = str(tmp_path / "packed")
    command = ("run", "--raw", "--max-tokens", "4", "Hello")
    answers = [kvik(*command).stdout] + [kvik(*command, "--packed-cache", folder).stdout for _ in range(2)]
    assert answers[0] == answers[1] == answers[2] != ""
    (shown,) = json.loads(kvik("cache", "packed", "--packed-cache", folder, "--json").stdout)
    assert shown["model"] == str(tiny)
    assert shown["num_bytes"] == Path(shown["path"]).stat().st_size
    assert "tiny.gguf" in kvik("cache", "packed", "--packed-cache", folder).stdout
    assert "1 files removed" in kvik("cache", "packed", "--packed-cache", folder, "--rm").stdout
    assert json.loads(kvik("cache", "packed", "--packed-cache", folder, "--json").stdout) == []


def test_alone_it_is_kviks_cache_folder(kvik: Kvik, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "SETTLED_S", 0.0)
    monkeypatch.setenv("KVIK_HOME", str(tmp_path))
    kvik("run", "--raw", "--max-tokens", "1", "--packed-cache", "Hello")
    (shown,) = json.loads(kvik("cache", "packed", "--json").stdout)
    assert Path(shown["path"]).parent == tmp_path / "packed"


def test_what_the_log_warns_of_is_a_note(kvik: Kvik, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "SETTLED_S", 1e9)
    result = kvik("run", "--raw", "--max-tokens", "1", "--packed-cache", str(tmp_path / "packed"), "Hello")
    assert "tiny.gguf: was changed a moment ago, so its packed weights are not kept yet" in result.stderr
    assert result.exit_code == 0
