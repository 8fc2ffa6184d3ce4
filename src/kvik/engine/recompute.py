"""Prove a stored block by computing it again: what promises the same bits can be held to it."""

from __future__ import annotations

from array import array
from dataclasses import replace

from kvik.cache import Digest
from kvik.config import SamplingParams
from kvik.engine.engine import Engine
from kvik.engine.llm import LLM
from kvik.engine.stream import run_all
from kvik.store import Fault, Store, StoredBlock

ONE_TOKEN = SamplingParams(max_tokens=1, ignore_eos=True)


def recomputing_engine(llm: LLM) -> Engine:
    """An engine of the same numerics that knows no store."""
    return Engine(llm.model, replace(llm.config, store=None))


def is_as_computed(engine: Engine, store: Store, digest: Digest) -> bool | None:
    """Whether a stored block's bytes are those that the model makes of its tokens.

    None where they cannot be computed: some block before it is not stored, or the context is shorter.
    """
    block = store.get(digest)
    path: list[StoredBlock] = []
    while not isinstance(block, Fault):
        path.insert(0, block)
        # Each is checked to be what the next one names, so positions that do not fall are no path.
        if block.first_position == 0 or block.first_position >= engine.model.context:
            break
        before = store.get(block.parent)
        if isinstance(before, StoredBlock) and before.first_position >= block.first_position:
            return False
        block = before
    if not path or path[0].first_position:
        return None
    token_ids = list(array("i", b"".join(each.tokens for each in path)))
    if len(token_ids) >= engine.model.context:
        return None
    engine.clear_cache()
    (sequence,) = run_all(engine, [engine.new_sequence(engine.new_request(token_ids, ONE_TOKEN))])
    if sequence.error is not None:
        raise sequence.error
    found = engine.cache.match([*token_ids, 0])
    places = engine.cache.places_of(found.block_ids[-1])
    assert places is not None
    computed = b"".join(engine.runner.read_blocks([block_id], group) for group, block_id in places)
    return computed == path[-1].payload
