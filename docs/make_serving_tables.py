"""Writes the table of every field of every route into docs/serving.md, from the structs that bodies are read into.

python docs/make_serving_tables.py [--check]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from kvik.server.app import ROUTES
from kvik.server.endpoint import Endpoint, plain_path
from kvik.server.fields import Body

PAGE = Path(__file__).with_name("serving.md")
BEGIN, END = "<!-- fields: begin -->\n", "<!-- fields: end -->\n"

# Declared so that they are refused with a reason, or only with some values.
REFUSED = {
    "suffix": "refused: the models write on, not between",
    "best_of": "honoured where it equals `n`, refused else",
    "background": "refused where true",
    "previous_response_id": "refused: nothing is stored",
}


def table() -> str:
    """Markdown: for each route its fields, by what becomes of them."""
    lines = ["| route | honoured | accepted, named in `x-kvik-ignored` |", "|---|---|---|"]
    seen: set[tuple[str, type]] = set()
    for route in ROUTES:
        assert isinstance(route, Endpoint)
        body = route.body
        if body is None or (route.path, body) in seen:
            continue
        seen.add((route.path, body))
        assert issubclass(body, Body)
        names = body.__struct_fields__
        honoured = [_shown(name) for name in names if name not in body.accepted]
        accepted = [f"`{name}`" for name in names if name in body.accepted]
        lines.append(f"| `{plain_path(route.path)}` | {', '.join(honoured)} | {', '.join(accepted)} |")
    return "\n".join(lines) + "\n"


def _shown(name: str) -> str:
    told = REFUSED.get(name)
    return f"`{name}`" if told is None else f"`{name}` ({told})"


def page_with_table(page: str) -> str:
    """The page with the table as it is now."""
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: BEGIN + table() + END, page, flags=re.DOTALL)


def main() -> None:
    """Write it, or with --check say whether it is current."""
    page = PAGE.read_text(encoding="utf-8")
    current = page_with_table(page)
    if "--check" in sys.argv[1:]:
        sys.exit(f"{PAGE} is not current: python docs/make_serving_tables.py" if current != page else 0)
    PAGE.write_text(current, encoding="utf-8")


if __name__ == "__main__":
    main()
