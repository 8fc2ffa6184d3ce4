"""Names of blocks: every field that decides a block's bytes decides its name, and names are the same everywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from kvik.cache import BlockEvents, CacheManager, Identity, KVCacheSpec, PoolSize
from kvik.cache.digest import DIGEST_BYTES, chain, next_digest
from kvik.cache.tables import packed

pytestmark = pytest.mark.tiny

IDENTITY = Identity(b"weights", "native 1", b"secret")
TOKENS = packed(range(96))


def test_names_are_the_same_in_every_process_and_for_ever() -> None:
    """Stored blocks are found by them: what is written here must not change while the store's version does not."""
    root = IDENTITY.root("f16", "ada")
    assert root.hex() == "011e3a47191e2f83d4bd073f55adca2f"
    assert [digest.hex() for digest in chain(root, TOKENS[:256], 128)] == [
        "024b10f90778eccc5f729e652137c6b7",
        "9f06d004b764f38b369d5483dc6cf17a",
    ]
    code = (
        "from kvik.cache import Identity; print(Identity(b'weights', 'native 1', b'secret').root('f16', 'ada').hex())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert told.stdout.strip() == root.hex()


def test_each_field_decides_the_name() -> None:
    roots = [
        IDENTITY.root("f16"),
        IDENTITY.root("int8"),
        IDENTITY.root("f16", ""),
        IDENTITY.root("f16", "ada"),
        IDENTITY.root("f16", "\udc80"),
        IDENTITY.root("f16", adapter="ada"),
        IDENTITY.root("f16", adapter="salt:ada"),
        replace(IDENTITY, fingerprint=b"weight").root("f16"),
        replace(IDENTITY, numerics="snative 1").root("f16"),
        replace(IDENTITY, secret=b"").root("f16"),
        replace(IDENTITY, secret=b"s" * 64).root("f16"),
        replace(IDENTITY, secret=b"s" * 65).root("f16"),
        Identity().root("f16"),
        IDENTITY.scope("f16"),
    ]
    assert len(set(roots)) == len(roots)
    assert {len(root) for root in roots} == {DIGEST_BYTES}
    assert IDENTITY.scope("f16") == replace(IDENTITY, secret=b"another").scope("f16")
    assert IDENTITY.key(b"root") != IDENTITY.key(b"tag")
    assert Identity().key(b"root") == b""


def test_a_chain_names_whole_blocks_by_all_that_comes_before() -> None:
    root = IDENTITY.root("f16")
    names = chain(root, TOKENS, 128)
    assert len(names) == len(set(names)) == 3
    assert names[1:] == chain(names[0], TOKENS[128:], 128)
    assert names[0] == next_digest(root, TOKENS[:128])
    assert chain(root, TOKENS[:-1], 128) == names[:2]
    assert chain(root, b"", 128) == []
    other = bytearray(TOKENS)
    other[0] ^= 1
    assert not set(chain(root, bytes(other), 128)) & set(names)


def test_the_tree_claims_and_events_use_the_names() -> None:
    spec = KVCacheSpec.uniform(1, 1, 1, "f16")
    cache = CacheManager(spec, PoolSize(8, (8,)), identity=IDENTITY)
    cache.events = BlockEvents()
    names = chain(IDENTITY.root(spec.format, "ada"), TOKENS, 128)
    table = cache.new_table("ada")
    cache.adopt(table, range(96), cache.match(range(96), "ada"))
    assert table.claims == names[::-1]
    assert cache.reserve(table, 96, 0) == []
    cache.seal(table, range(96), 96)
    assert cache.events.sealed_digests == names
    assert [cache.tree.digest_of(block_id) for block_id in table.block_ids] == names
    cache.release(table)
    assert cache.match([*range(64), *range(40)], "ada").next_digest == next_digest(names[1], packed(range(32)))
    cache.clear()
    assert cache.events.evicted_digests == names[::-1]
    assert cache.match(range(97), "ada").next_digest == names[0]
    assert cache.tree.digest_of(0) is None
