"""The store that a configuration asks for, and the identity of the blocks in it."""

from __future__ import annotations

import secrets
from contextlib import suppress
from pathlib import Path

from kvik.cache import BLOCK_SIZE, Digest, Identity
from kvik.config import EngineConfig, is_shared
from kvik.errors import InvalidInput
from kvik.machine import user_folder
from kvik.models.loader import LoadedModel
from kvik.models.numerics import numerics_of, weight_files
from kvik.store import Store
from kvik.store.disk import make_private, read_whole, write_whole
from kvik.store.entry import BadEntry
from kvik.store.files import VERSION_FOLDER, FileStore
from kvik.store.fingerprints import fingerprint_of
from kvik.store.redis import RedisStore
from kvik.store.resp import parse_address

MIN_SECRET_BYTES, MAX_SECRET_BYTES = 16, 4096
SALTS_BYTES = 32


def read_secret(path: Path) -> bytes:
    """The secret in a file, without the white space around it. Raises `InvalidInput`."""
    try:
        with path.open("rb") as file:
            secret = file.read(MAX_SECRET_BYTES + 1).strip()
    except OSError as error:
        raise InvalidInput(f"store_key: {path}: {error.strerror}", hint="name a file that can be read") from None
    if not MIN_SECRET_BYTES <= len(secret) <= MAX_SECRET_BYTES:
        raise InvalidInput(
            f"store_key: {path} has {len(secret):,} bytes",
            hint=f"make one: head -c 32 /dev/urandom | base64 > {path}",
        )
    return secret


def identity_for(model: LoadedModel, config: EngineConfig) -> Identity:
    """What names the blocks of a model that is run so. Raises `InvalidInput`, `ModelError`."""
    assert config.store is not None
    secret = b"" if config.store_key is None else read_secret(Path(config.store_key))
    # Of weights that a shared store knows, each machine remembers the fingerprint for itself.
    root = user_folder() / "store" if is_shared(config.store) else Path(config.store).expanduser()
    version_folder = root / VERSION_FOLDER
    make_private(version_folder)
    fingerprint = fingerprint_of(weight_files(model.path), version_folder)
    return Identity(fingerprint, numerics_of(model, config), secret)


def salts_secret(config: EngineConfig) -> str:
    """What a server makes salts with, so that it finds after a restart what it stored for each key.

    It follows from the store's secret; where there is none it is drawn once, and kept with the blocks.
    """
    assert config.store is not None
    if config.store_key is not None:
        return Identity(secret=read_secret(Path(config.store_key))).key(b"salts").hex()
    path = str(Path(config.store).expanduser() / VERSION_FOLDER / "salts.secret")
    try:
        with suppress(FileNotFoundError):
            return read_whole(path, SALTS_BYTES, SALTS_BYTES).hex()
        write_whole(path, [secrets.token_bytes(SALTS_BYTES)])
        return read_whole(path, SALTS_BYTES, SALTS_BYTES).hex()
    except (OSError, BadEntry) as error:
        raise InvalidInput(f"{path}: {error}", hint="remove it: what was stored for salts is then lost") from None


def open_store(
    model: LoadedModel, config: EngineConfig, identity: Identity, scope: Digest, payload_bytes: int
) -> Store:
    """The store in the configured folder, or at the address that stands in its place. Raises `InvalidInput`."""
    assert config.store is not None
    assert isinstance(config.store_quota, int)
    if is_shared(config.store):
        shared = RedisStore(
            parse_address(config.store),
            scope,
            num_tokens=BLOCK_SIZE,
            payload_bytes=payload_bytes,
            key=identity.key(b"tag"),
        )
        shared.greet()
        return shared
    return FileStore(
        Path(config.store).expanduser(),
        scope,
        num_tokens=BLOCK_SIZE,
        payload_bytes=payload_bytes,
        key=identity.key(b"tag"),
        quota_bytes=config.store_quota,
        about={
            "model": str(model.path),
            "fingerprint": identity.fingerprint.hex(),
            "numerics": identity.numerics,
            "kv_dtype": config.kv_dtype,
            "activations": config.activations,
            "weights": config.weights,
            "backend": config.backend,
            "context": config.context,
            "block_size": BLOCK_SIZE,
            "payload_bytes": payload_bytes,
        },
    )
