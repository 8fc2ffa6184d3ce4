"""Stored blocks as a tier of the cache: what they spare, who waits for whom, and that no token ever changes."""

from __future__ import annotations

import gc
import math
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from kvik.cache import Digest, MissReason
from kvik.config import SamplingParams
from kvik.engine.sequence import Sequence
from kvik.engine.stream import run_all
from kvik.store import Fault, StoredBlock
from simulation import VOCAB, SimulatedEngine, SimulatedFailure, Windows, expected_sequence
from store.stored import DictStore

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
_chance = random.Random(1)
PROMPT = [_chance.randrange(VOCAB - 1) for _ in range(200)]  # six whole blocks
NUM_BLOCKS = 6


class GatedStore(DictStore):
    """One that gives nothing before `gate` is set."""

    def __init__(self, blocks: dict[Digest, StoredBlock]) -> None:
        super().__init__()
        self.blocks = blocks
        self.gate = threading.Event()

    def get(self, digest: Digest) -> StoredBlock | Fault:
        assert self.gate.wait(30)
        return super().get(digest)


def an_engine(store: DictStore | None, **options: Any) -> SimulatedEngine:
    settings: dict[str, Any] = {"num_blocks": 64, "token_budget": 64, "max_running": 8}
    return SimulatedEngine(**(settings | options), open_store=None if store is None else lambda scope, size: store)


def new(engine: SimulatedEngine, prompt: list[int] = PROMPT, salt: str | None = None, **options: Any) -> Sequence:
    return engine.new_sequence(engine.new_request(prompt, PARAMS, salt=salt, **options))


def run(engine: SimulatedEngine, *sequences: Sequence) -> None:
    """To their ends; what they wrote is what the model's definition says."""
    run_all(engine, sequences)
    engine.scheduler.check()
    for sequence in sequences:
        request = sequence.request
        expected = expected_sequence(engine, list(request.prompt_ids), PARAMS, request.seed, request.salt)
        assert sequence.token_ids == expected.token_ids


@pytest.fixture
def store() -> DictStore:
    """With what a request of `PROMPT` left."""
    store = DictStore()
    engine = an_engine(store)
    run(engine, new(engine))
    engine.close_store()
    assert len(store.blocks) == NUM_BLOCKS
    return store


@pytest.fixture
def closing() -> Iterator[list[SimulatedEngine]]:
    engines: list[SimulatedEngine] = []
    yield engines
    for engine in engines:
        engine.close_store()


@pytest.mark.parametrize("windows", [(None,), (None, 40), (24,), (5, None, 70)])
@pytest.mark.parametrize("num_blocks", [8, 64])
def test_what_was_stored_is_not_computed_after_a_restart(windows: Windows, num_blocks: int) -> None:
    store = DictStore()
    for attempt in range(3):
        engine = an_engine(store, windows=windows, num_blocks=num_blocks)
        sequence = new(engine)
        run(engine, sequence)
        stats = sequence.stats()
        if attempt:
            assert stats.num_stored_tokens == stats.num_cached_tokens == 32 * NUM_BLOCKS
            assert stats.num_computed_tokens == 200 + 5 - 32 * NUM_BLOCKS
            assert stats.load_s > 0
        else:
            assert (stats.num_stored_tokens, stats.load_s, stats.saved_s) == (0, 0.0, None)
        again = new(engine)
        run(engine, again)
        assert again.stats().num_stored_tokens == 0, "they are in the cache by now"
        engine.close_store()
        run(engine, new(engine))  # it goes on without


def test_the_end_of_a_longer_prompt_is_computed(store: DictStore) -> None:
    engine = an_engine(store)
    longer = [*PROMPT, *PROMPT[:150]]
    sequence = new(engine, longer)
    run(engine, sequence)
    assert sequence.stats().num_stored_tokens == 32 * NUM_BLOCKS
    assert sequence.costs.miss_reason is MissReason.UNSEEN
    engine.flush_store(10)
    assert len(store.blocks) > NUM_BLOCKS
    other = new(engine, [*PROMPT[:70], *PROMPT[:100]])
    run(engine, other)
    assert other.stats().num_cached_tokens >= 70
    assert other.stats().num_stored_tokens == 0
    engine.close_store()


def test_a_match_in_memory_goes_on_in_the_store(store: DictStore) -> None:
    engine = an_engine(store)
    run(engine, new(engine, PROMPT[:100]))
    sequence = new(engine)
    run(engine, sequence)
    assert (sequence.stats().num_cached_tokens, sequence.stats().num_stored_tokens) == (192, 96)
    engine.close_store()


def test_equal_requests_load_once(store: DictStore, closing: list[SimulatedEngine]) -> None:
    gated = GatedStore(store.blocks)
    engine = an_engine(gated)
    closing.append(engine)
    sequences = [new(engine) for _ in range(5)]
    for sequence in sequences:
        engine.add(sequence)
    assert engine.step() is None, "nothing to compute while blocks are being read"
    assert engine.scheduler.has_work
    gated.gate.set()
    run(engine)
    while engine.scheduler.has_work:
        engine.step()
    assert gated.num_gets == NUM_BLOCKS
    assert [sequence.stats().num_stored_tokens for sequence in sequences] == [192, 0, 0, 0, 0]
    assert [sequence.stats().num_cached_tokens for sequence in sequences[:1]] == [192]
    assert all(sequence.stats().num_cached_tokens >= 192 for sequence in sequences)


def test_others_run_while_one_loads(store: DictStore, closing: list[SimulatedEngine]) -> None:
    gated = GatedStore(store.blocks)
    engine = an_engine(gated)
    closing.append(engine)
    waiting, other = new(engine), new(engine, PROMPT[50:180])
    engine.add(waiting)
    run(engine, other)
    assert waiting.finish_reason is None
    assert waiting in engine.scheduler.waiting
    gated.gate.set()
    while engine.scheduler.has_work:
        engine.step()
    assert waiting.stats().num_stored_tokens == 192


def test_who_leaves_while_loading_leaves_nothing_behind(store: DictStore, closing: list[SimulatedEngine]) -> None:
    gated = GatedStore(store.blocks)
    engine = an_engine(gated)
    closing.append(engine)
    first, second = new(engine), new(engine)
    engine.add(first)
    engine.add(second)
    engine.step()
    engine.abort(first)
    engine.scheduler.check()
    gated.gate.set()
    while engine.scheduler.has_work:
        engine.step()
    assert second.stats().num_stored_tokens == 192, "the other one loads for itself then"
    engine.abort(second)
    engine.scheduler.check()
    assert engine.cache.pool.num_held == 0


@pytest.mark.parametrize("harm", ["tokens", "payload", "name"])
def test_a_store_that_lies_is_not_believed(store: DictStore, harm: str) -> None:
    names = list(store.blocks)
    block = store.blocks[names[2]]
    if harm == "tokens":
        store.blocks[names[2]] = replace(block, tokens=bytes(128))
    elif harm == "payload":
        store.blocks[names[2]] = replace(block, payload=bytes(block.payload)[:-8])
    else:
        store.blocks[names[2]] = store.blocks[names[3]]
    engine = an_engine(store)
    sequence = new(engine)
    run(engine, sequence)
    assert sequence.stats().num_stored_tokens == 64
    assert sequence.costs.miss_reason is MissReason.DAMAGED
    engine.close_store()


def test_blocks_that_are_gone_end_a_load(store: DictStore) -> None:
    del store.blocks[list(store.blocks)[3]]
    engine = an_engine(store)
    sequence = new(engine)
    run(engine, sequence)
    assert sequence.stats().num_stored_tokens == 96
    engine.close_store()
    assert len(store.blocks) == NUM_BLOCKS, "what was computed instead is stored again"


def test_a_store_that_breaks_is_a_miss(store: DictStore, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(DictStore):
        def get(self, digest: Digest) -> StoredBlock | Fault:
            raise ZeroDivisionError

        def put(self, block: StoredBlock) -> bool:
            raise ZeroDivisionError

    broken = Broken()
    broken.blocks = store.blocks
    engine = an_engine(broken)
    sequence = new(engine)
    run(engine, sequence)
    assert (sequence.stats().num_stored_tokens, sequence.costs.miss_reason) == (0, MissReason.DAMAGED)
    assert engine.flush_store(10)
    assert "stored blocks could not be read" in caplog.text
    engine.close_store()


def test_where_computing_is_faster_nothing_is_loaded(store: DictStore) -> None:
    engine = an_engine(store)
    assert engine.tier is not None
    engine.tier._load_byte_s, engine.tier._compute_token_s = 1.0, 1e-9
    counts = []
    for _ in range(16):
        sequence = new(engine)
        run(engine, sequence)
        counts.append(sequence.stats().num_stored_tokens)
        engine.clear_cache()
    assert counts == [0] * 15 + [192], "now and then it is tried whether that is still so"
    assert engine.tier.stats.num_declined == 16
    assert engine.tier._load_byte_s < 1.0
    engine.close_store()


def test_a_receipt_says_what_computing_would_have_taken(store: DictStore) -> None:
    engine = an_engine(store)
    assert engine.tier is not None
    engine.tier.note_prefill(0.5)
    sequence = new(engine)
    run(engine, sequence)
    assert sequence.stats().saved_s == 192 * 0.5
    engine.close_store()


def test_with_reuse_a_block_is_stored_at_its_second_use() -> None:
    store = DictStore()
    engine = an_engine(store, store_policy="reuse")
    run(engine, new(engine))
    assert engine.flush_store(10)
    assert store.blocks == {}
    run(engine, new(engine, [*PROMPT[:100], *PROMPT]))
    assert engine.flush_store(10)
    assert len(store.blocks) == 3
    engine.close_store()


def test_what_may_not_be_shared_is_not_stored() -> None:
    store = DictStore()
    engine = an_engine(store)
    run(engine, new(engine, use_cache=False))
    run(engine, new(engine, share=False))
    assert engine.flush_store(10)
    assert store.blocks == {}
    engine.close_store()


def test_salts_share_nothing(store: DictStore) -> None:
    engine = an_engine(store)
    ada = new(engine, salt="ada")
    run(engine, ada)
    assert ada.stats().num_stored_tokens == 0
    engine.close_store()
    assert len(store.blocks) == 2 * NUM_BLOCKS
    again = an_engine(store)
    found, missed = new(again, salt="ada"), new(again, salt="bob")
    run(again, found, missed)
    assert (found.stats().num_stored_tokens, missed.stats().num_stored_tokens) == (192, 0)
    again.close_store()


def test_a_load_gives_way_to_who_runs(store: DictStore, closing: list[SimulatedEngine]) -> None:
    """Blocks are few: a load holds some that a running sequence comes to need."""
    gated = GatedStore(store.blocks)
    engine = an_engine(gated, num_blocks=8)
    closing.append(engine)
    running = new(engine, [3] * 5)
    engine.add(running)
    engine.step()
    gated.gate.set()
    waiting = new(engine)
    engine.add(waiting)
    for _ in range(200):
        engine.step()
        engine.scheduler.check()
    assert waiting.finish_reason == running.finish_reason == "length"


def test_a_failed_step_and_torn_accounts_end_loads(store: DictStore, closing: list[SimulatedEngine]) -> None:
    gated = GatedStore(store.blocks)
    engine = an_engine(gated)
    closing.append(engine)
    waiting, other = new(engine), new(engine, [4] * 50)
    engine.add(waiting)
    engine.add(other)
    engine.runner.fails = True
    result = engine.step()
    assert result is not None
    assert isinstance(result.error, SimulatedFailure)
    assert (other.finish_reason, waiting.finish_reason) == ("abort", None)
    engine._is_torn = True
    again = new(engine)
    engine.add(again)
    assert waiting.finish_reason == "abort"
    gated.gate.set()
    while engine.scheduler.has_work:
        engine.step()
    engine.scheduler.check()
    assert again.stats().num_stored_tokens == 192


def test_what_was_evicted_before_it_was_copied_is_not_stored() -> None:
    store = DictStore()
    engine = an_engine(store)
    assert engine.tier is not None
    engine.tier.after_step = lambda step_s, save_when_idle: None  # type: ignore[method-assign]  # it never comes to it
    run(engine, new(engine))
    assert engine.tier.has_pending
    engine.clear_cache()
    run(engine, new(engine, [5] * 300))
    del engine.tier.after_step
    assert engine.flush_store(10)
    assert engine.tier.stats.num_dropped_blocks == NUM_BLOCKS
    engine.close_store()
    assert len(store.blocks) == 300 // 32


def test_blocks_are_copied_within_the_share_of_a_step() -> None:
    """While sequences run, so much and no more; what is left is copied when nothing does."""
    store = DictStore()
    engine = an_engine(store)
    tier = engine.tier
    assert tier is not None
    run(engine, new(engine))
    assert engine.flush_store(10)
    spent: list[float] = []
    real = engine.runner.read_blocks

    def read_blocks(block_ids: Any, group: int) -> bytes:
        time.sleep(0.002)
        spent.append(0.002)
        return real(block_ids, group)

    engine.runner.read_blocks = read_blocks  # type: ignore[method-assign]
    other = new(engine, [6] * 300)
    engine.add(other)
    while engine.scheduler.has_work:
        engine.step()
    before = len(spent)
    for _ in range(100):
        tier.after_step(0.01, None)
    assert (len(spent) - before) * 0.002 <= 0.03 * 100 * 0.01 + 2 * 0.002 + 0.02
    assert engine.flush_store(10)
    assert len(store.blocks) == NUM_BLOCKS + 300 // 32
    engine.close_store()


def test_what_the_writer_takes_counts_too() -> None:
    """Its thread's processor time keeps blocks from being copied, as long as steps have not made up for it."""
    engine = an_engine(DictStore())
    tier = engine.tier
    assert tier is not None
    tier.after_step = lambda step_s, save_when_idle: None  # type: ignore[method-assign]
    run(engine, new(engine))
    del tier.after_step
    tier.after_step(0.0, None)
    assert (len(tier._pending), tier._saved_s) == (NUM_BLOCKS, 0.0)
    tier._writer.work_s += 0.05
    tier.after_step(1.0, None)
    assert len(tier._pending) == NUM_BLOCKS
    assert tier._saved_s == pytest.approx(0.02 - 0.05)
    for _ in range(2):
        tier.after_step(1.0, None)
    assert len(tier._pending) < NUM_BLOCKS
    engine.close_store()


def test_a_full_store_costs_no_copies_for_a_while() -> None:
    store = DictStore()
    store.is_full = True
    engine = an_engine(store)
    assert engine.tier is not None
    run(engine, new(engine))
    assert engine.flush_store(10)
    dropped = engine.tier.stats.num_dropped_blocks
    run(engine, new(engine, [7] * 300))
    assert engine.flush_store(10)
    assert engine.tier.stats.num_dropped_blocks >= dropped + 8
    assert store.blocks == {}
    engine.close_store()


def test_a_closed_store_writes_no_more_than_the_block_under_way(caplog: pytest.LogCaptureFixture) -> None:
    class SlowStore(DictStore):
        """One whose first block takes until its writer is being closed."""

        def put(self, block: StoredBlock) -> bool:
            while not writer._is_closing:
                time.sleep(0.001)
            return super().put(block)

    store = SlowStore()
    engine = an_engine(store)
    tier = engine.tier
    assert tier is not None
    writer = tier._writer
    run(engine, new(engine))
    tier.save(math.inf)
    engine.close_store(0.0)
    assert writer._thread is not None
    writer._thread.join(30)
    assert not writer._thread.is_alive()
    assert len(store.blocks) <= 1
    assert "the rest is not stored" in caplog.text


def test_an_engine_that_is_forgotten_writes_what_it_has_and_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    store = DictStore()
    for num_blocks in (0, NUM_BLOCKS):
        engine = an_engine(store)
        assert len(store.blocks) == num_blocks
        run(engine, new(engine))
        del engine
        gc.collect()
        for thread in set(threading.enumerate()) - before:
            thread.join(30)
            assert not thread.is_alive()
    assert len(store.blocks) == NUM_BLOCKS
