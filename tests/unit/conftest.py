"""Fixtures for the tests of the model store."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvik.hub import store
from wheels import TINY, WHEEL


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The models folder of a fresh KVIK_HOME; the registry holds only the tiny model, which pip finds nowhere."""
    monkeypatch.setenv("KVIK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(store, "REGISTRY", {"tiny": TINY})
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "home" / "models"


@pytest.fixture
def links(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which pip finds the tiny wheel."""
    links = tmp_path / "links"
    links.mkdir()
    (links / "tiny_model-1.0-py3-none-any.whl").write_bytes(WHEEL)
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return links
