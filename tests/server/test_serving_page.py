"""docs/serving.md names every field of every route."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "make_serving_tables.py"


def test_the_table_of_fields_is_current() -> None:
    spec = importlib.util.spec_from_file_location("make_serving_tables", PAGE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.PAGE.read_text(encoding="utf-8")
    assert "`prompt_cache_key`" in module.table()
    assert module.page_with_table(page) == page, "python docs/make_serving_tables.py"
