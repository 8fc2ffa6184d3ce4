"""Which replica's cache holds which blocks: as they tell, or else as was sent to them."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import TypeAlias

Name: TypeAlias = bytes | int
"""Of a block, chained: who holds a block holds, or held of late, all that come before it."""


class Contents:
    """For each block the set of replicas that hold it, a bit for each slot.

    A replica that tells what it stores and removes is known exactly. Of one that does not, what was sent to it is
    taken for what it holds, the blocks that were sent longest ago evicted beyond `max_guessed` of them. What is wrong
    here costs time and never an answer.
    """

    def __init__(self) -> None:
        self._holders: dict[Name, int] = {}
        self._guessed: dict[int, OrderedDict[Name, None]] = {}  # by slot, of those that do not tell
        self._max_guessed: dict[int, int] = {}
        self._expected: dict[int, Counter[Name]] = {}  # by slot, of those that tell: sent there, and not told of yet

    def open(self, slot: int, max_guessed: int | None) -> None:
        """A replica begins, with nothing; None: it tells what it holds."""
        self.clear(slot)
        self._guessed.pop(slot, None)
        self._expected.pop(slot, None)
        if max_guessed is None:
            self._expected[slot] = Counter()
        else:
            self._guessed[slot] = OrderedDict()
            self._max_guessed[slot] = max_guessed

    def __len__(self) -> int:
        """Blocks that some replica holds."""
        return len(self._holders)

    def clear(self, slot: int) -> None:
        """A replica holds nothing any more."""
        kept = ~(1 << slot)
        self._holders = {name: rest for name, slots in self._holders.items() if (rest := slots & kept)}
        if slot in self._guessed:
            self._guessed[slot].clear()
        if slot in self._expected:
            self._expected[slot].clear()

    def told_stored(self, slot: int, names: Iterable[Name]) -> None:
        """A replica tells that it holds these."""
        expected = self._expected[slot]
        for name in names:
            expected.pop(name, None)
            self._add(slot, name)

    def told_removed(self, slot: int, names: Iterable[Name]) -> None:
        """A replica tells that it has evicted these."""
        expected = self._expected[slot]
        for name in names:
            if name not in expected:
                self._discard(slot, name)

    def sent(self, slot: int, names: Sequence[Name]) -> None:
        """A request with these blocks goes to a replica, which will soon hold them."""
        guessed = self._guessed.get(slot)
        if guessed is None:
            expected, bit, holders = self._expected[slot], 1 << slot, self._holders
            for name in names:
                if name in expected or not holders.get(name, 0) & bit:
                    expected[name] += 1
                    self._add(slot, name)
            return
        for name in reversed(names):  # the first are evicted last, as in a replica's own cache
            if name in guessed:
                guessed.move_to_end(name)
            else:
                guessed[name] = None
                self._add(slot, name)
        while len(guessed) > self._max_guessed[slot]:
            self._discard(slot, guessed.popitem(last=False)[0])

    def computed(self, slot: int, names: Iterable[Name]) -> None:
        """Such a request is computed, or failed: what the replica has not told of by now, it does not hold."""
        expected = self._expected.get(slot)
        if not expected:
            return
        for name in names:
            if name in expected:
                expected[name] -= 1
                if not expected[name]:
                    del expected[name]
                    self._discard(slot, name)

    def num_held(self, names: Sequence[Name], slots: int) -> dict[int, int]:
        """How many of the first blocks each of these slots holds, where it is any.

        Holders only become fewer along the chain, so each place where some drop out is found by halving.
        """
        found: dict[int, int] = {}
        holders, last = self._holders.get, len(names) - 1
        low, held = 0, holders(names[0], 0) & slots if names else 0
        while held:
            high = last
            rest = holders(names[high], 0) & held
            if rest != held:
                while high - low > 1:
                    middle = (low + high) // 2
                    if holders(names[middle], 0) & held == held:
                        low = middle
                    else:
                        high = middle
                rest = holders(names[high], 0) & held if high > low else 0
            else:
                high, rest = last + 1, 0
            gone = held & ~rest
            while gone:
                bit = gone & -gone
                found[bit.bit_length() - 1] = high
                gone ^= bit
            low, held = high, rest
        return found

    def _add(self, slot: int, name: Name) -> None:
        self._holders[name] = self._holders.get(name, 0) | 1 << slot

    def _discard(self, slot: int, name: Name) -> None:
        rest = self._holders.get(name, 0) & ~(1 << slot)
        if rest:
            self._holders[name] = rest
        else:
            self._holders.pop(name, None)
