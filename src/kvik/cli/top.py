"""`kvik top`: what a server does, in the terminal."""

from __future__ import annotations

import os
import sys
from typing import Annotated

from kvik.cli.options import SERVER, ServerOptions, flag, value
from kvik.cli.terminal import is_terminal
from kvik.errors import InvalidInput


def top(
    *,
    url: Annotated[str, value(SERVER, "URL", "The server to watch.", show_default=True)] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, value(SERVER, "KEY", "The server's key.", envvar=["KVIK_API_KEY", "OPENAI_API_KEY"])
    ] = None,
    timeout: Annotated[float, value(SERVER, "S", "Give up after S seconds without a byte.", show_default=True)] = 15.0,
    model: Annotated[
        str | None, value(SERVER, "NAME", "Which of its models; default: the first.", "-m", "--model")
    ] = None,
    as_json: Annotated[bool, flag(SERVER, "--json", "Print one JSON object, as where stdout is no terminal.")] = False,
) -> None:
    """Watch a server: its speed, its cache's blocks, its requests, and why prefixes were missed.

    q or Ctrl-C ends it. Where the server stops, it is waited for.
    """
    options = ServerOptions(url=url, api_key=api_key, timeout=timeout)
    options.check({})
    from kvik.cli.top_screen import print_once, watch
    from kvik.client.completions import Server
    from kvik.client.http import parse_url
    from kvik.client.watching import Watching

    watching = Watching(parse_url(url), Server(api_key), timeout_s=timeout)
    if as_json or not is_terminal(sys.stdout):
        print_once(watching, model)
        return
    terminal = os.environ.get("TERM")
    if terminal in ("dumb", "unknown"):
        raise InvalidInput(f"this terminal (TERM={terminal}) cannot be drawn over", hint="add --json")
    watch(watching, model, has_key=api_key is not None)
