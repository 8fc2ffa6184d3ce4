"""How a server is run: where it listens, who may call it, and its limits."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from kvik.errors import InvalidInput

DEFAULT_PORT = 8000
MIN_KEY_BYTES = 8

DAY_S = 86_400.0

# The least and the most that each may be.
_BOUNDS: Mapping[str, tuple[float, float]] = {
    "port": (0, 65_535),
    "max_body_bytes": (1, 1 << 40),
    "max_prompts": (1, 1 << 20),
    "work_limit": (1, 1 << 40),
    "ping_s": (0.001, DAY_S),
    "unread_s": (0.1, DAY_S),
    "drain_s": (0, DAY_S),
    "hang_s": (0.1, DAY_S),
    "pin_share": (0, 1),
    "max_sessions": (0, 1 << 20),
    "session_ttl_s": (1, DAY_S),
    "max_remembered": (0, 1 << 20),
    "max_remembered_tokens": (0, 1 << 40),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The operator's choices. Raises `InvalidInput`."""

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT  # 0: any that is free
    api_keys: Mapping[str, str] = field(default_factory=dict)  # key to the name of whom it was given to
    no_auth: bool = False  # said aloud where it listens beyond this machine without keys
    shared_cache: bool = False  # requests of all keys may share what was computed
    cors_origins: tuple[str, ...] = ()  # of browsers' pages; "localhost" is any page of this machine
    allowed_hosts: tuple[str, ...] = ()  # further names by which browsers and proxies may call the server
    max_body_bytes: int = 16 << 20
    max_prompts: int = 2048  # of one request to /v1/completions or /v1/embeddings
    work_limit: int = 1 << 20  # most tokens that one request may ask for, over all of its completions
    ping_s: float = 10.0  # a stream that is silent for so long gets a comment
    unread_s: float = 30.0  # who reads nothing of an answer that is over for so long loses the connection
    drain_s: float = 30.0  # what runs at SIGTERM may go on for so long
    hang_s: float = 10.0  # a step without any sign of life for so long is a hang
    pin_share: float = 0.25  # of each model's blocks, that breakpoints and pinned sessions may keep
    max_sessions: int = 256  # of each key
    session_ttl_s: float = 3600.0  # a session that nobody uses for so long ends, unless it says otherwise
    max_remembered: int = 1024  # answers of each key that later ones can be compared with
    max_remembered_tokens: int = 1 << 20  # of their prompts
    log_format: Literal["text", "json"] = "text"
    access_log: bool = True
    read_only: bool = False  # the page only shows: no chat on it, and nobody's request can be aborted
    kv_events: str | None = None  # the endpoint at which routers hear of blocks
    kv_events_replay: str | None = None  # that repeats what they missed
    kv_events_topic: str = ""
    redact: bool = False  # those who watch see no text of tokens
    is_replica: bool = False  # behind a front, which tells of each answer what it follows from
    drop_billing_line: bool = False  # the one that Claude Code puts before its system prompt, another each time

    def __post_init__(self) -> None:
        for name, (least, most) in _BOUNDS.items():
            given = getattr(self, name)
            if not least <= given <= most:  # nor is NaN
                raise InvalidInput(f"{name} is {given}", hint=f"give a number from {least:g} to {most:,.0f}")
        for key in self.api_keys:
            if not key.isascii() or not key.isprintable() or " " in key or len(key) < MIN_KEY_BYTES:
                raise InvalidInput(
                    f"an API key has {len(key)} characters, or some that are not printable ASCII",
                    hint=f"give at least {MIN_KEY_BYTES} letters, digits and signs, without spaces",
                )
        if not self.is_local and not self.api_keys and not self.no_auth:
            raise InvalidInput(
                f"the server would listen on {self.host}, where others reach it, without asking for a key",
                hint="add --api-key, or --no-auth if everybody on that network may use it",
            )
        if self.no_auth and self.api_keys:
            raise InvalidInput("--no-auth and --api-key contradict each other", hint="leave out one")

        if self.kv_events is None and (self.kv_events_replay is not None or self.kv_events_topic):
            raise InvalidInput("there are no KV events to repeat or to name", hint="give --kv-events too")

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether the name or address is this machine's own."""
    address = parsed_address(host)
    return host.lower() == "localhost" or (address is not None and address.is_loopback)


def parsed_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that the text is, with or without brackets; None for a name."""
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None
