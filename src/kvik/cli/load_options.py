"""The options of `kvik bench --url` that are the load's own."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from kvik.cli.options import flag, value
from kvik.errors import InvalidInput

LOAD = "Load on a server (with --url)"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How many ask, when, and what."""

    concurrency: Annotated[
        str | None, value(LOAD, "N,N,…", "Clients that ask one request after the other; 8 where no --rate is given.")
    ] = None
    rate: Annotated[
        float | None, value(LOAD, "R", "Instead of clients, chats that begin at random times, R a second on average.")
    ] = None
    requests: Annotated[
        int | None, value(LOAD, "N", "Requests in all; default: one chat for each client, or 100 with --rate.")
    ] = None
    duration: Annotated[float | None, value(LOAD, "S", "Begin no request after S seconds.")] = None
    shared_prefix: Annotated[
        int,
        value(
            LOAD, "TOKENS", "All chats begin with the same system prompt of about so many tokens.", show_default=True
        ),
    ] = 0
    turns: Annotated[int, value(LOAD, "N", "Turns of each chat; answers stay in it.", show_default=True)] = 1
    max_tokens: Annotated[int, value(LOAD, "N", "Tokens of each answer.", show_default=True)] = 64
    warmup: Annotated[
        int, value(LOAD, "N", "Requests before the measurement, with other texts.", show_default=True)
    ] = 1
    seed: Annotated[
        int, value(LOAD, "N", "Of texts and arrivals; another seed makes texts that no cache has.", show_default=True)
    ] = 0
    stop_at_eos: Annotated[bool, flag(LOAD, "--stop-at-eos", "Let answers end before --max-tokens.")] = False

    def check_absent(self, given: dict[str, str]) -> None:
        """Raise `InvalidInput` for any of them without a server."""
        others = [given[field.name] for field in fields(self) if field.name in given]
        if others:
            raise InvalidInput(f"{', '.join(others)} without --url", hint="add --url, or leave it out")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOutput:
    """How the result is shown."""

    as_json: bool
    as_markdown: bool
    save: Path | None
