"""Models that several engine tests share: read-only, so one of each is enough."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvik.engine.llm import LLM
from kvik.models.loader import LoadedModel, load_model
from kvik.ops.native import NativeOps
from models import tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Two layers, two query heads to a KV head, a context of 512."""
    return tiny_model(tmp_path_factory.mktemp("tiny"), seed=5)


@pytest.fixture(scope="session")
def tiny_path(tiny: LoadedModel) -> Path:
    """The file of the tiny model."""
    return tiny.path


@pytest.fixture
def llm(tiny_path: Path) -> LLM:
    """The tiny model behind the front door, with a pool of its own."""
    return LLM(str(tiny_path), threads=1, token_budget=40)


@pytest.fixture(scope="session")
def trained(default_model_path: Path) -> LoadedModel:
    """The default model, with 300 positions: enough for every test here."""
    return load_model(default_model_path, NativeOps("int8", threads=2), context=300)
