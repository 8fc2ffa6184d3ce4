"""The names of sealed blocks: digests of all tokens up to a block's end, and of all else that its bytes depend on."""

from __future__ import annotations

from _blake2 import blake2b  # hashlib's own; hashlib itself brings OpenSSL, 7 MB, which nothing here needs
from dataclasses import dataclass
from typing import TypeAlias

Digest: TypeAlias = bytes

DIGEST_BYTES = 16

MAX_KEY_BYTES = 64
"""Of BLAKE2b; a longer secret is hashed first."""


def next_digest(parent: Digest, tokens: bytes) -> Digest:
    """The name of a block with these tokens, an int32 each, behind the block or root named `parent`."""
    return blake2b(parent + tokens, digest_size=DIGEST_BYTES).digest()


def chain(parent: Digest, tokens: bytes, block_bytes: int) -> list[Digest]:
    """The names of all whole blocks of `tokens` behind `parent`, where a block's tokens take so many bytes."""
    digests = []
    for start in range(0, len(tokens) - block_bytes + 1, block_bytes):
        parent = blake2b(parent + tokens[start : start + block_bytes], digest_size=DIGEST_BYTES).digest()
        digests.append(parent)
    return digests


@dataclass(frozen=True, slots=True)
class Identity:
    """What keys and values depend on beside their tokens, the same for all blocks of an engine.

    Two engines give a block the same name only where both would write the same bytes. Who does not know the secret can
    neither guess a name nor tell whether two blocks of different salts hold the same tokens.
    """

    fingerprint: bytes = b""  # of the weights
    numerics: str = ""  # the arithmetic: backend, its version, activations
    secret: bytes = b""

    def scope(self, kv_format: str) -> Digest:
        """Names all that is kept of one model in one format, whatever its salt and secret."""
        return _digest(b"", b"scope", self.fingerprint, kv_format.encode(), self.numerics.encode())

    def root(self, kv_format: str, salt: str | None = None, adapter: str = "") -> Digest:
        """What the first block of a sequence stands behind."""
        # Strings of Python's may hold lone surrogates.
        salted = b"" if salt is None else b"salt:" + salt.encode(errors="surrogatepass")
        return _digest(self.key(b"root"), self.scope(kv_format), adapter.encode(), salted)

    def key(self, purpose: bytes) -> bytes:
        """A key made of the secret, another one for each purpose; none without a secret."""
        if not self.secret:
            return b""
        secret = self.secret if len(self.secret) <= MAX_KEY_BYTES else blake2b(self.secret).digest()
        return blake2b(purpose, key=secret, digest_size=32).digest()


def _digest(key: bytes, *fields: bytes) -> Digest:
    state = blake2b(key=key, digest_size=DIGEST_BYTES)
    for field in fields:
        state.update(len(field).to_bytes(8, "little") + field)
    return state.digest()
