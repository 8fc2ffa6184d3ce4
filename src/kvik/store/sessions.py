"""Saved conversations: their messages, and the names of the blocks that hold what was computed of them."""

from __future__ import annotations

import hmac
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from struct import Struct
from typing import Any

from kvik.cache.digest import Digest
from kvik.errors import InvalidInput
from kvik.store import disk
from kvik.store.entry import CHECKSUM, MAC, TAG_BYTES, BadEntry, tag_of
from kvik.store.files import SESSIONS, FileStore

MAGIC = b"KVIKSES\n"
VERSION = 1
_FIELDS = Struct("<8sHHI")  # magic, version, algorithm, bytes of the body; the tag follows
MAX_BODY_BYTES = 64 << 20

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedSession:
    """A conversation as it was saved."""

    name: str
    model: str
    messages: Sequence[Mapping[str, Any]]
    template: Mapping[str, Any]  # what the chat template was given beside them
    num_tokens: int = 0  # whose keys and values the blocks hold
    digests: Sequence[str] = ()  # of those blocks, in order, in hex
    num_stored_blocks: int = 0  # of them, in the store when it was saved
    saved: int = field(default_factory=lambda: int(time.time()))


def check_name(name: object) -> str:
    """The name of a saved session. Raises `InvalidInput`."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidInput(
            f"a session's name is {str(name)[:70]!r}",
            hint="give 1 to 64 letters, digits, dots, dashes and underscores, the first a letter or digit",
        )
    return name


def save_session(store: FileStore, owner: Digest, session: SavedSession) -> None:
    """Write it, in the place of one of the same name; `owner` is the root of its blocks, so salts do not meet.

    Raises `InvalidInput`.
    """
    path = _path(store, owner, check_name(session.name))
    try:
        body = json.dumps(asdict(session), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"the session cannot be saved: {error}", hint="keep to what JSON can say") from None
    if len(body) > MAX_BODY_BYTES:
        raise InvalidInput(
            f"the session has {len(body):,} bytes, {MAX_BODY_BYTES:,} may be saved", hint="rewind it, or begin another"
        )
    fields = _FIELDS.pack(MAGIC, VERSION, MAC if store.key else CHECKSUM, len(body))
    try:
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        disk.write_whole(path, [fields, _tag(store, owner, fields, body), body])
    except OSError as error:
        raise InvalidInput(
            f"the session cannot be saved: {error.strerror}", hint="free some space, or name another store"
        ) from None


def load_session(store: FileStore, owner: Digest, name: str) -> SavedSession:
    """The session of a name. Raises `InvalidInput` where there is none, or one that is damaged."""
    path = _path(store, owner, check_name(name))
    least = _FIELDS.size + TAG_BYTES
    try:
        data = disk.read_whole(path, least, least + MAX_BODY_BYTES)
        fields, tag, body = data[: _FIELDS.size], data[_FIELDS.size : least], data[least:]
        magic, version, algorithm, num_bytes = _FIELDS.unpack(fields)
        is_whole = (magic, version, num_bytes) == (MAGIC, VERSION, len(body))
        if not is_whole or algorithm != (MAC if store.key else CHECKSUM):
            raise _damaged(name)
        if not hmac.compare_digest(_tag(store, owner, fields, body), tag):
            raise _damaged(name)
        return _read(name, json.loads(body))
    except FileNotFoundError:
        raise InvalidInput(
            f"there is no saved session {name!r} of this model and salt", hint="`kvik cache ls` shows what is stored"
        ) from None
    except OSError as error:
        raise InvalidInput(f"session {name!r} cannot be read: {error.strerror}", hint="see that it can be") from None
    except (BadEntry, ValueError, RecursionError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise _damaged(name) from None


def session_names(store: FileStore, owner: Digest) -> list[str]:
    """Names of the saved sessions of one owner."""
    try:
        found = list(disk.files_in(os.path.dirname(_path(store, owner, ""))))
    except OSError:
        return []
    return sorted(entry.name for entry in found if NAME.fullmatch(entry.name))


def remove_session(store: FileStore, owner: Digest, name: str) -> bool:
    """Forget a saved session; False where there is none. Its blocks go when nobody wants them."""
    try:
        return disk.remove(_path(store, owner, check_name(name)))
    except OSError as error:
        raise InvalidInput(f"session {name!r} cannot be removed: {error.strerror}", hint="see that it can be") from None


def _read(name: str, found: Any) -> SavedSession:
    kinds = {
        "model": str,
        "messages": list,
        "template": dict,
        "num_tokens": int,
        "digests": list,
        "num_stored_blocks": int,
        "saved": int,
    }
    if not isinstance(found, dict) or found.keys() != {"name", *kinds} or found["name"] != name:
        raise _damaged(name)
    if not all(isinstance(found[key], kind) for key, kind in kinds.items()):
        raise _damaged(name)
    return SavedSession(**found)


def _damaged(name: str) -> InvalidInput:
    return InvalidInput(f"saved session {name!r} is damaged, or of another secret", hint="begin it anew")


def _path(store: FileStore, owner: Digest, name: str) -> str:
    return f"{store.folder}/{SESSIONS}/{owner.hex()}/{name}"


def _tag(store: FileStore, owner: Digest, fields: bytes, body: bytes) -> bytes:
    return tag_of(store.key, fields, store.scope, owner, body)
