"""docs/reference says what the program says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import kvik

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_current(reference: ModuleType) -> None:
    assert reference.stale() == [], "run `make reference`"


@pytest.mark.full
def test_every_error_and_its_hints_are_there(reference: ModuleType) -> None:
    found = reference.raised()
    assert set(found) <= {kind.__name__ for kind in reference.error_kinds()}
    assert sum(map(len, found.values())) > 200
    text = reference.current("errors")
    exported = [name for name in kvik.__all__ if isinstance(getattr(kvik, name), type)]
    errors = [name for name in exported if issubclass(getattr(kvik, name), Exception)]
    assert [name for name in errors if f"`{name}`" not in text and name != "KvikError"] == []


def test_every_page_of_the_site_is_reached_from_its_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {str(path.relative_to(ROOT / "docs")) for path in ROOT.glob("docs/**/*.md")}
    assert {page for page in pages if page not in text} == set()
