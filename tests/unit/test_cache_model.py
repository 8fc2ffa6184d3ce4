"""Any order of what sequences do to the cache, against a plain model of what stands in each slot.

A slot of the model holds the namespace and all tokens up to its own: what its keys and values depend on. So a table
that reads back anything but its own history has been given, or left with, a wrong block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvik.cache import BlockCopy, BlockTable, CacheManager, Hold, KVCacheSpec, MissReason, packed
from tiers import examples

SIZE = 4
NUM_BLOCKS = 11
SALTS = (None, None, "a")
History = tuple[str | None, tuple[int, ...]]

# Two letters, and beginnings that many share.
tokens_of_a_prompt = st.one_of(
    st.lists(st.integers(0, 1), min_size=1, max_size=14),
    st.tuples(
        st.sampled_from([4, 8, 12, 16, 20]) | st.integers(1, 24), st.lists(st.integers(0, 1), min_size=1, max_size=5)
    ).map(lambda parts: [0] * parts[0] + parts[1]),
)


@dataclass(eq=False)
class Running:
    """A sequence, as an engine would keep it."""

    salt: str | None
    tokens: list[int]
    table: BlockTable
    num_computed: int = 0

    def history(self, num_tokens: int) -> History:
        return self.salt, tuple(self.tokens[:num_tokens])


@dataclass(eq=False)
class Pin:
    """Blocks that are pinned, and what stands in them."""

    hold: Hold
    salt: str | None
    tokens: list[int] = field(default_factory=list)


class CacheMachine(RuleBasedStateMachine):
    """Sequences that come, are computed in chunks, fork, go back and leave, over a pool that is always too small."""

    def __init__(self) -> None:
        super().__init__()
        spec = KVCacheSpec.uniform(num_layers=1, num_kv_heads=1, head_dim=8, dtype="f16", block_size=SIZE)
        self.cache = CacheManager(spec, spec.pool_size_for(NUM_BLOCKS, 1, 1))
        self.content: dict[tuple[int, int], History] = {}  # (block, slot)
        self.running: list[Running] = []
        self.pins: list[Pin] = []
        self.copies: list[BlockCopy] = []  # asked for, not yet made
        self.last_held: dict[int, int] = {}  # by block: when somebody held it last
        self.clock = 0

    def a_sequence(self, data: st.DataObject) -> Running:
        return data.draw(st.sampled_from(self.running), label="sequence")

    def step(self, batch: list[tuple[Running, int]]) -> None:
        """What an engine does for sequences that have their blocks: copies, then arithmetic, then seals."""
        self.note_holds()
        for copy in self.copies:
            for slot in range(SIZE):
                if (copy.source, slot) in self.content:
                    self.content[copy.target, slot] = self.content[copy.source, slot]
        self.copies.clear()
        self.cache.end_copies()
        for sequence, count in batch:
            for position in range(sequence.num_computed, sequence.num_computed + count):
                block, slot = divmod(position, SIZE)
                block_id = sequence.table.block_ids[block]
                assert self.cache.pool.ref_count(block_id) == 1, "written while others hold it"
                assert not self.cache.pool.is_named(block_id), "written while the tree names it"
                self.content[block_id, slot] = sequence.history(position + 1)
            sequence.num_computed += count
        for sequence, _ in batch:
            self.cache.seal(sequence.table, sequence.tokens, sequence.num_computed)
        self.note_holds()
        self.check_reads()

    def reserve(self, sequence: Running, count: int) -> bool:
        """Whether the sequence has the blocks now; a shortage must be a true one, and change nothing."""
        pool, table = self.cache.pool, sequence.table
        before = (list(table.block_ids), pool.num_free, pool.num_reusable)
        missing = self.cache.num_missing(table, sequence.num_computed + count)
        copies = self.cache.reserve(table, sequence.num_computed + count, sequence.num_computed)
        if copies is None:
            assert before == (list(table.block_ids), pool.num_free, pool.num_reusable)
            assert pool.num_available <= missing
            return False
        self.copies += copies
        return True

    @rule(tokens=tokens_of_a_prompt, salt=st.sampled_from(SALTS), data=st.data())
    def begin(self, tokens: list[int], salt: str | None, data: st.DataObject) -> None:
        if len(self.running) == 5:
            return
        pin = data.draw(st.sampled_from([None, *self.pins]))
        if pin is not None and data.draw(st.booleans()):
            tokens = pin.tokens + tokens
        found = self.cache.match(tokens, salt, None if pin is None else pin.hold)
        if pin is not None and salt == pin.salt:
            assert found.num_cached_tokens >= common(tokens[:-1], tuple(pin.tokens[: pin.hold.num_tokens]))
        assert found.num_cached_tokens < len(tokens)
        sequence = Running(salt, tokens, self.cache.new_table(salt))
        sequence.num_computed = self.cache.adopt(sequence.table, tokens, found)
        self.running.append(sequence)
        self.check_reads()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        """A step over some sequences; one may be preempted after it got its blocks and before the copies are made."""
        chosen = data.draw(st.lists(st.sampled_from(self.running), min_size=1, max_size=3, unique_by=id))
        batch: list[tuple[Running, int]] = []
        for sequence in chosen:
            while len(sequence.tokens) <= sequence.num_computed:
                sequence.tokens.append(data.draw(st.integers(0, 1), label="sampled"))
            count = data.draw(st.integers(1, len(sequence.tokens) - sequence.num_computed), label="count")
            if self.reserve(sequence, count):
                batch.append((sequence, count))
        if batch and data.draw(st.integers(0, 3), label="preempt") == 0:
            preempted, _ = batch.pop(0)
            self.cache.release(preempted.table)
            preempted.num_computed = 0
            if data.draw(st.sampled_from([True, False]), label="clear"):
                self.cache.clear()
        self.cache.check(sequence.table for sequence in self.running)
        self.step(batch)

    @rule(
        prompts=st.lists(tokens_of_a_prompt, min_size=1, max_size=4),
        salt=st.sampled_from(SALTS),
        keeps_ends=st.booleans(),
    )
    def serve(self, prompts: list[list[int]], salt: str | None, keeps_ends: bool) -> None:
        """Requests that are computed at once and leave, one after another, where there is room for them."""
        for tokens in prompts:
            sequence = Running(salt, tokens, self.cache.new_table(salt))
            sequence.num_computed = self.cache.adopt(sequence.table, tokens, self.cache.match(tokens, salt))
            self.running.append(sequence)
            count = len(tokens) - sequence.num_computed
            self.step([(sequence, count)] if self.reserve(sequence, count) else [])
            self.running.remove(sequence)
            if keeps_ends:
                self.keep_end(sequence)
            self.cache.release(sequence.table)

    def keep_end(self, sequence: Running) -> None:
        """All that a sequence has computed is found from then on."""
        self.cache.keep_end(sequence.table, sequence.tokens, sequence.num_computed)
        found = self.cache.match([*sequence.tokens[: sequence.num_computed], 0], sequence.salt)
        assert found.num_cached_tokens == sequence.num_computed

    @precondition(lambda self: len(self.running) == 1)
    @rule(tokens=tokens_of_a_prompt, salt=st.sampled_from(SALTS))
    def run_alone(self, tokens: list[int], salt: str | None) -> None:
        """A sequence that no other runs beside gets, at once, all the blocks that are within its reach."""
        for other in self.running:
            self.cache.release(other.table)
        self.running.clear()
        found = self.cache.match(tokens, salt)
        num_tokens = SIZE * self.cache.num_blocks_within_reach(found)
        if num_tokens < len(tokens):
            return
        tokens = tokens + [1] * (num_tokens - len(tokens))
        sequence = Running(salt, tokens, self.cache.new_table(salt))
        sequence.num_computed = self.cache.adopt(sequence.table, tokens, found)
        self.running.append(sequence)
        count = num_tokens - sequence.num_computed
        assert self.reserve(sequence, count)
        self.step([(sequence, count)])

    @precondition(lambda self: 0 < len(self.running) < 5)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        sequence = self.a_sequence(data)
        self.cache.release(sequence.table, sequence.num_computed)  # room behind the computed tokens
        table = self.cache.fork(sequence.table, sequence.num_computed)
        self.running.append(Running(sequence.salt, list(sequence.tokens), table, sequence.num_computed))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def go_back(self, data: st.DataObject) -> None:
        """To fewer tokens, perhaps to go on with others."""
        sequence = self.a_sequence(data)
        kept = data.draw(st.integers(0, sequence.num_computed), label="kept")
        self.cache.release(sequence.table, kept)
        sequence.num_computed = kept
        if data.draw(st.booleans(), label="others"):
            sequence.tokens[kept:] = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=6))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        sequence = self.a_sequence(data)
        self.running.remove(sequence)
        if data.draw(st.booleans(), label="keeps its end"):
            self.keep_end(sequence)
        self.cache.release(sequence.table)

    @precondition(lambda self: self.running and len(self.pins) < 2)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        sequence = self.a_sequence(data)
        count = None  # of full blocks, or of so many tokens
        if sequence.num_computed and data.draw(st.booleans(), label="exactly"):
            count = data.draw(st.integers(1, sequence.num_computed))
        hold = self.cache.keep(sequence.table, packed(sequence.tokens), is_pinned=True, num_pinned_tokens=count)
        assert count in (None, hold.num_tokens)
        self.pins.append(Pin(hold, sequence.salt, list(sequence.tokens)))

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        pin = data.draw(st.sampled_from(self.pins))
        self.pins.remove(pin)
        self.cache.let_go(pin.hold)

    @precondition(lambda self: self.cache.pool.num_reusable > 4)
    @rule()
    def clear(self) -> None:
        self.cache.clear()
        assert self.cache.pool.num_reusable == 0

    @rule(at_once=st.booleans())
    def give_memory_back(self, at_once: bool) -> None:
        for superblock in self.cache.take_idle(0 if at_once else None)[0]:
            for key in [key for key in self.content if key[0] // 8 == superblock]:
                del self.content[key]

    @rule(tokens=tokens_of_a_prompt, salt=st.sampled_from(SALTS))
    def match(self, tokens: list[int], salt: str | None) -> None:
        """Finds the longest beginning that the tree holds, and nothing that is not there."""
        found = self.cache.match(tokens, salt)
        wanted = tokens[:-1]
        places = self.sealed()
        most = max((common(wanted, held) for at, held in places.values() if at == salt), default=0)
        assert found.num_cached_tokens == most
        for index, block_id in enumerate(found.block_ids):
            assert places[block_id] == (salt, tuple(wanted[: (index + 1) * SIZE]))
        if found.tail is not None:
            block_id, count = found.tail
            assert places[block_id][1][: found.num_tokens + count] == tuple(wanted[: found.num_tokens + count])
        assert (found.miss_reason is MissReason.ALL) == (most == len(wanted))

    def sealed(self) -> dict[int, History]:
        """What stands in each block of the tree, as the model has it."""
        lengths = {edge.block_ids[-1]: (len(edge.tokens) // 4 - 1) % SIZE + 1 for _, edge in self.cache.tree.edges()}
        named = filter(self.cache.pool.is_named, range(NUM_BLOCKS))
        return {block: self.content[block, lengths.get(block, SIZE) - 1] for block in named}

    def tables(self) -> Iterator[tuple[BlockTable, int, History]]:
        for sequence in self.running:
            yield sequence.table, sequence.num_computed, sequence.history(sequence.num_computed)
        for pin in self.pins:
            num_tokens = pin.hold.num_tokens
            yield pin.hold.table, num_tokens, (pin.salt, tuple(pin.tokens[:num_tokens]))

    def note_holds(self) -> None:
        self.clock += 1
        for block_id in range(NUM_BLOCKS):
            if self.cache.pool.ref_count(block_id):
                self.last_held[block_id] = self.clock

    def check_reads(self) -> None:
        for table, num_tokens, (salt, tokens) in self.tables():
            for position in range(num_tokens):
                block, slot = divmod(position, SIZE)
                read = self.content.get((table.block_ids[block], slot))
                assert read == (salt, tokens[: position + 1]), f"token {position} reads {read}"

    @invariant()
    def agrees(self) -> None:
        self.cache.check(sequence.table for sequence in self.running)
        self.check_reads()
        sealed = self.sealed()
        assert len(set(sealed.values())) == len(sealed), "the same tokens in two blocks of the tree"

    @invariant()
    def what_was_held_last_is_evicted_last(self) -> None:
        """By the machine's clock the oldest reusable block is never younger than another one."""
        self.note_holds()
        pool = self.cache.pool
        oldest = pool.oldest_reusable()
        reusable = [block for block in self.sealed() if pool.ref_count(block) == 0]
        assert (oldest is None) == (not reusable)
        if oldest is not None:
            assert self.last_held.get(oldest, 0) <= min(self.last_held.get(block, 0) for block in reusable)

    def teardown(self) -> None:
        for sequence in self.running:
            self.cache.release(sequence.table)
        for pin in self.pins:
            self.cache.let_go(pin.hold)
        self.cache.clear()
        self.cache.check([])
        assert self.cache.pool.num_free == NUM_BLOCKS
        assert len(self.cache.tree) == 0


def common(one: list[int], other: tuple[int, ...]) -> int:
    """How many tokens two beginnings share."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


CacheMachine.TestCase.settings = settings(max_examples=examples(250), stateful_step_count=50)
TestCache = CacheMachine.TestCase
