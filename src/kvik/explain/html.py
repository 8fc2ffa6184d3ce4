"""One page with everything in it: data, style and modules, and a policy that lets nothing in or out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any
from urllib.parse import quote

STYLES, MAIN = ("base.css", "style.css"), "main.js"


def render_page(data: Mapping[str, Any]) -> str:
    """The page of what `page_data` gave.

    A browser loads modules by address; here each one's address is its own text (RFC 2397), so that no server and no
    build step is needed.
    """
    folders = (files("kvik").joinpath("drawing"), files("kvik.explain").joinpath("page"))
    parts = {part.name: part.read_text(encoding="utf-8") for folder in folders for part in folder.iterdir()}
    modules = {
        f"kvik/{name}": "data:text/javascript;charset=utf-8," + quote(text, safe=" ;,/?:@&=+$!*()'[]{}")
        for name, text in sorted(parts.items())
        if name.endswith(".js") and name != MAIN
    }
    marks = {
        "__TITLE__": _escape(f"{data['model']['name']}: why the KV cache works"),
        "__STYLE__": "".join(parts[name] for name in STYLES),
        "__MODULES__": _script_json({"imports": modules}),
        "__DATA__": _script_json(data),
        "__MAIN__": parts[MAIN],
    }
    # In one pass: a prompt may have a mark's name in it.
    return re.sub("|".join(marks), lambda found: marks[found.group()], parts["page.html"])


def _script_json(value: Any) -> str:
    """JSON that can stand in a script element: nothing in it ends the element."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
