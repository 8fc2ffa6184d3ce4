"""Find the blocks whose keys and values a new request would compute again: an index by tokens."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from kvik.cache.digest import Digest, Identity
from kvik.cache.digest import next_digest as digest_behind

MAX_EVICTED = 1 << 16
"""Evicted blocks that are remembered, so that a miss can be explained."""


@dataclass(frozen=True, slots=True)
class Namespace:
    """Whose keys and values, and how they are kept: nothing is ever matched across two of these."""

    format: str
    salt: str | None = None


class MissReason(StrEnum):
    """Why a match went no further."""

    ALL = "all tokens are cached"
    SHORT = "what is left is new, and shorter than a block"
    DIFFERS = "the tokens differ from what is cached"
    UNSEEN = "nothing cached goes on from here"
    EVICTED = "the block was evicted"
    OTHER_SALT = "cached under another salt"
    OTHER_FORMAT = "cached in another format"
    WINDOW = "a layer's window reaches back to blocks that were given up"
    DAMAGED = "the stored block is damaged"
    OFF = "the prefix cache is off"


@dataclass(frozen=True, slots=True)
class Match:
    """The longest cached prefix, and why it ends there."""

    namespace: Namespace
    block_ids: list[int]  # whole blocks, in order
    miss_reason: MissReason
    num_tokens: int  # in those blocks
    tail: tuple[int, int] | None  # the block that agrees longest with what follows, and for how many tokens: at least 1
    next_digest: Digest | None  # names the next block; None where the tokens fill none

    @property
    def num_cached_tokens(self) -> int:
        """Tokens that need not be computed, those of the tail among them: where it differs, the first that does."""
        return self.num_tokens + (self.tail[1] if self.tail else 0)

    @property
    def held_ids(self) -> list[int]:
        """The blocks that a sequence holds to go on from here, that of the tail too."""
        return [*self.block_ids, *([self.tail[0]] if self.tail else [])]


class _Node:
    """An edge: a run of whole blocks, and what follows its end; or one open block, which nothing follows."""

    __slots__ = ("block_ids", "children", "depth", "digests", "keys", "namespace", "parent", "tokens")

    def __init__(self, namespace: Namespace, parent: _Node | None, depth: int) -> None:
        self.namespace = namespace
        self.parent = parent  # None: a root, which has no blocks itself
        self.depth = depth  # blocks before this node's
        self.tokens = bytearray()  # grows and shrinks at its end, a block at a time
        self.block_ids: list[int] = []
        self.digests: list[Digest] = []  # the name of each block
        self.children: dict[bytes, _Node] = {}  # by the tokens of their first block
        self.keys: list[bytes] = []  # the same, sorted: neighbours agree longest

    @property
    def is_open(self) -> bool:
        """Whether its one block is not full, so that it has no name."""
        return len(self.digests) < len(self.block_ids)

    def add_child(self, child: _Node, key: bytes) -> None:
        self.children[key] = child
        insort(self.keys, key)

    def remove_child(self, key: bytes) -> None:
        del self.children[key]
        del self.keys[bisect_left(self.keys, key)]


@dataclass(frozen=True, slots=True)
class Edge:
    """A node as others may see it."""

    depth: int  # nodes above it
    first_token: int  # its first token's position
    tokens: bytes  # int32 each
    block_ids: list[int]
    num_children: int  # nodes that go on from it


class RadixTree:
    """Names blocks by all tokens up to their end.

    Tokens are bytes, an int32 each. `match` finds, `append` inserts; a *lock* is a hold in the pool on a block and on
    all before it; `evict` takes one block, and only the last of a branch. Time is that of comparing tokens, a block of
    them at once; a split costs no more than the match that led to it.

    The last block of a sequence that has ended stands in the tree too, though it is not full: an *open* block, the end
    of its branch. It is only ever a match's tail, and none is kept whose tokens another block behind the same path
    begins with.
    """

    def __init__(self, block_size: int, identity: Identity = Identity()) -> None:  # noqa: B008  # it is frozen
        self.identity = identity
        self._key_bytes = 4 * block_size
        self._roots: dict[Namespace, _Node] = {}
        self._node_of: dict[int, _Node] = {}
        self._depth_of: dict[int, int] = {}
        self._beginnings: dict[bytes, set[Namespace]] = {}  # first blocks, and where they are found
        self._evicted: OrderedDict[Digest, None] = OrderedDict()

    def __len__(self) -> int:
        """Blocks in the tree."""
        return len(self._node_of)

    def match(self, tokens: bytes, namespace: Namespace) -> Match:
        """The longest run of whole blocks that begin with `tokens`; changes nothing."""
        key_bytes = self._key_bytes
        node = self._roots.get(namespace)
        block_ids: list[int] = []
        at, last_digest = 0, self.root_of(namespace)
        following: bytes | None = None  # where the match ended inside an edge: the edge's next block
        following_id = -1
        while node is not None and len(tokens) - at >= key_bytes:
            child = node.children.get(tokens[at : at + key_bytes])
            if child is None:
                break
            count = len(child.block_ids)
            if not tokens.startswith(child.tokens, at):
                count = common_bytes(tokens, at, child.tokens) // key_bytes
            block_ids += child.block_ids[:count]
            at += count * key_bytes
            last_digest = child.digests[count - 1]
            node = child
            if count < len(child.block_ids):
                following = bytes(child.tokens[count * key_bytes : (count + 1) * key_bytes])
                following_id = child.block_ids[count]
                break
        rest = tokens[at : at + key_bytes]
        next_name = digest_behind(last_digest, rest) if len(rest) == key_bytes else None
        candidates: list[tuple[bytes, int]] = []
        if following is not None:
            candidates = [(following, following_id)]
        elif node is not None:
            candidates = _neighbours(node, rest)
        tail = _tail_of(rest, candidates)
        if len(rest) == 4 * (tail[1] if tail else 0):
            stop = MissReason.ALL
        else:
            num_agreed = tail[1] if tail else 0  # all tokens of an open block: then nothing goes on from it
            goes_on = bool(candidates) and all(4 * num_agreed < len(key) for key, _ in candidates)
            stop = MissReason.DIFFERS if goes_on else MissReason.SHORT if next_name is None else MissReason.UNSEEN
            if next_name is not None:
                stop = self._whereabouts(rest, next_name, namespace, is_beginning=at == 0) or stop
        return Match(namespace, block_ids, stop, at // 4, tail, next_name)

    def append(self, namespace: Namespace, previous: int | None, key: bytes, block_id: int) -> int:
        """The block that holds `key`'s tokens behind block `previous`: `block_id`, now in the tree, or one that was."""
        assert len(key) == self._key_bytes
        node, index = self._place_behind(namespace, previous)
        if index < len(node.block_ids):
            if node.tokens.startswith(key, index * self._key_bytes):
                return node.block_ids[index]
            node = self._split(node, index)
        else:
            known = node.children.get(key)
            if known is not None:
                return known.block_ids[0]
        previous_digest = node.digests[-1] if node.digests else self.root_of(namespace)
        if node.parent is None or node.children:
            node = self._branch(node, key)
        self._extend(node, key, block_id)
        node.digests.append(digest_behind(previous_digest, key))
        self._evicted.pop(node.digests[-1], None)
        return block_id

    def append_open(self, namespace: Namespace, previous: int | None, key: bytes, block_id: int) -> bool:
        """Put a block in that is not full; False where another one there begins with its tokens."""
        assert 0 < len(key) < self._key_bytes
        node, index = self._place_behind(namespace, previous)
        if index < len(node.block_ids):
            if node.tokens.startswith(key, index * self._key_bytes):
                return False
            node = self._split(node, index)
        at = bisect_left(node.keys, key)
        if at < len(node.keys) and node.keys[at].startswith(key):
            return False
        self._extend(self._branch(node, key), key, block_id)
        return True

    def take_open(self, namespace: Namespace, previous: int | None, key: bytes) -> int | None:
        """Take the open block out whose tokens `key`, the tokens of a block there, begins with; which one it was."""
        node, index = self._place_behind(namespace, previous)
        if index < len(node.block_ids):
            return None
        at = bisect_left(node.keys, key) - 1
        child = node.children[node.keys[at]] if at >= 0 else None
        if child is None or not child.is_open or not key.startswith(child.tokens):
            return None
        block_id = child.block_ids[0]
        self.evict(block_id)
        return block_id

    def evict(self, block_id: int) -> None:
        """Take a block out. It must be the last of its branch: nothing may be left that cannot be found."""
        node = self._node_of[block_id]
        assert node.block_ids[-1] == block_id, f"block {block_id} is not the last of its edge"
        assert not node.children, f"block {block_id} has others behind it"
        if not node.is_open:
            self._evicted[node.digests.pop()] = None
            if len(self._evicted) > MAX_EVICTED:
                self._evicted.popitem(last=False)
        node.block_ids.pop()
        del self._node_of[block_id], self._depth_of[block_id]
        key = bytes(node.tokens[-self._key_bytes :])
        del node.tokens[-self._key_bytes :]
        if not node.block_ids:
            self._unlink(node, key)

    def root_of(self, namespace: Namespace) -> Digest:
        """What the first blocks of a namespace stand behind."""
        return self.identity.root(namespace.format, namespace.salt)

    def digest_of(self, block_id: int) -> Digest | None:
        """The name of a block; None for one that is open or not in the tree."""
        node = self._node_of.get(block_id)
        return None if node is None or node.is_open else node.digests[self._depth_of[block_id] - node.depth]

    def last_behind(self, block_id: int) -> int:
        """The last block of a branch that leads through this one: itself where nothing is behind it."""
        node = self._node_of[block_id]
        while node.children:
            node = node.children[node.keys[0]]
        return node.block_ids[-1]

    def place_of(self, block_id: int) -> tuple[Namespace, int | None]:
        """Where a block of the tree stands: its namespace, and the block before it."""
        node = self._node_of[block_id]
        index = self._depth_of[block_id] - node.depth
        if index:
            return node.namespace, node.block_ids[index - 1]
        assert node.parent is not None
        return node.namespace, node.parent.block_ids[-1] if node.parent.block_ids else None

    def tokens_of(self, block_id: int) -> tuple[Namespace, int, bytes] | None:
        """A block's namespace, its first token's position and its tokens; None for one that is not in the tree."""
        node = self._node_of.get(block_id)
        if node is None:
            return None
        depth = self._depth_of[block_id]
        first = (depth - node.depth) * self._key_bytes
        return node.namespace, depth * (self._key_bytes // 4), bytes(node.tokens[first : first + self._key_bytes])

    def edges(
        self, max_depth: int | None = None, max_edges: int | None = None, below: int | None = None
    ) -> Iterator[tuple[Namespace, Edge]]:
        """All edges, each after the one above it; none deeper than `max_depth`, and the first `max_edges`.

        With `below`, a block of the tree, the one that the block is in and those that go on from there; depths count
        from there.
        """
        num_left = len(self._node_of) if max_edges is None else max_edges
        starts = [(root, -1) for root in self._roots.values()] if below is None else [(self._node_of[below], 0)]
        for start in starts:
            stack = [start]
            while stack:
                node, level = stack.pop()
                if node.parent is not None:
                    if num_left == 0:
                        return
                    num_left -= 1
                    first_token = node.depth * (self._key_bytes // 4)
                    tokens, block_ids = bytes(node.tokens), list(node.block_ids)
                    yield node.namespace, Edge(level, first_token, tokens, block_ids, len(node.keys))
                if max_depth is None or level < max_depth:
                    stack += [(node.children[key], level + 1) for key in reversed(node.keys)]

    def __contains__(self, block_id: int) -> bool:
        """Whether a block is in it."""
        return block_id in self._node_of

    def last_block_above(self, block_id: int) -> int | None:
        """The last block of the edge above the one that a block is in; None where that begins at a root."""
        above = self._node_of[block_id].parent
        return above.block_ids[-1] if above is not None and above.parent is not None else None

    def check(self) -> None:
        """Prove that nodes, indexes and tokens agree."""
        seen: set[int] = set()
        for namespace, root in self._roots.items():
            assert root.children, f"an empty root is kept: {namespace}"
            stack = [root]
            while stack:
                node = stack.pop()
                assert node.keys == sorted(node.children), "the sorted keys are not the children's"
                if node.is_open:
                    self._check_open(node)
                else:
                    assert len(node.tokens) == len(node.block_ids) * self._key_bytes, "an edge unlike its run"
                    assert len(node.digests) == len(node.block_ids), "an edge with other digests than blocks"
                assert (node is root) == (not node.block_ids), "a node without blocks"
                for index, block_id in enumerate(node.block_ids):
                    assert block_id not in seen, f"block {block_id} stands twice in the tree"
                    seen.add(block_id)
                    assert self._node_of.get(block_id) is node, f"block {block_id} is looked for elsewhere"
                    assert self._depth_of.get(block_id) == node.depth + index, f"block {block_id} has another depth"
                for key, child in node.children.items():
                    assert child.parent is node, "a child of another parent"
                    assert child.namespace == namespace, "a child in another namespace"
                    assert child.depth == node.depth + len(node.block_ids), "a child at another depth"
                    assert child.tokens.startswith(key), "a child that begins with other tokens"
                    stack.append(child)
        beginnings = {(key, namespace) for namespace, root in self._roots.items() for key in root.children}
        assert beginnings == {(key, at) for key, places in self._beginnings.items() for at in places}, (
            "other beginnings"
        )
        assert seen == self._node_of.keys() == self._depth_of.keys(), "the index knows other blocks than the tree"

    def _check_open(self, node: _Node) -> None:
        assert len(node.block_ids) == 1, "an edge of several blocks that is open"
        assert not node.digests, "an open block with a digest"
        assert 0 < len(node.tokens) < self._key_bytes, "an open block that is full"
        assert not node.children, "blocks behind one that is open"
        assert node.parent is not None
        key = bytes(node.tokens)
        others = [other for other in node.parent.keys if other != key and other.startswith(key)]
        assert not others, "an open block whose tokens another begins with"

    def _whereabouts(self, key: bytes, name: Digest, namespace: Namespace, *, is_beginning: bool) -> MissReason | None:
        """What is known of a block that is not where it was looked for."""
        if name in self._evicted:
            return MissReason.EVICTED
        elsewhere = self._beginnings.get(key) if is_beginning else None
        if not elsewhere:
            return None
        same_format = any(other.format == namespace.format for other in elsewhere)
        return MissReason.OTHER_SALT if same_format else MissReason.OTHER_FORMAT

    def _root(self, namespace: Namespace) -> _Node:
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = _Node(namespace, None, 0)
        return root

    def _place_behind(self, namespace: Namespace, previous: int | None) -> tuple[_Node, int]:
        """The node of a block, or the root, and how many of its blocks come before what follows."""
        if previous is None:
            return self._root(namespace), 0
        node = self._node_of[previous]
        assert not node.is_open, f"something behind block {previous}, which is open"
        return node, self._depth_of[previous] - node.depth + 1

    def _branch(self, node: _Node, key: bytes) -> _Node:
        """A new child, for blocks that begin with `key`."""
        child = _Node(node.namespace, node, node.depth + len(node.block_ids))
        node.add_child(child, key)
        if node.parent is None:
            self._beginnings.setdefault(key, set()).add(node.namespace)
        return child

    def _extend(self, node: _Node, key: bytes, block_id: int) -> None:
        node.tokens += key
        node.block_ids.append(block_id)
        self._node_of[block_id] = node
        self._depth_of[block_id] = node.depth + len(node.block_ids) - 1

    def _split(self, node: _Node, index: int) -> _Node:
        """Move the node's blocks before `index` to a new node above it, and give that.

        Whoever splits holds those blocks; those behind may be any number, and stay as they are.
        """
        at = index * self._key_bytes
        parent = node.parent
        assert parent is not None
        upper = _Node(node.namespace, parent, node.depth)
        upper.tokens, upper.block_ids, upper.digests = node.tokens[:at], node.block_ids[:index], node.digests[:index]
        del node.tokens[:at], node.block_ids[:index], node.digests[:index]
        parent.children[bytes(upper.tokens[: self._key_bytes])] = upper
        node.parent, node.depth = upper, node.depth + index
        for block_id in upper.block_ids:
            self._node_of[block_id] = upper
        upper.add_child(node, bytes(node.tokens[: self._key_bytes]))
        return upper

    def _unlink(self, node: _Node, key: bytes) -> None:
        parent = node.parent
        assert parent is not None
        parent.remove_child(key)
        if parent.parent is not None:
            return
        namespaces = self._beginnings[key]
        namespaces.remove(parent.namespace)
        if not namespaces:
            del self._beginnings[key]
        if not parent.children:
            del self._roots[parent.namespace]


def _neighbours(node: _Node, rest: bytes) -> list[tuple[bytes, int]]:
    """First blocks of the children that may agree longest with `rest`: those beside its place in their order."""
    at = bisect_left(node.keys, rest)
    return [(key, node.children[key].block_ids[0]) for key in node.keys[max(0, at - 1) : at + 1]]


def _tail_of(rest: bytes, candidates: list[tuple[bytes, int]]) -> tuple[int, int] | None:
    """The candidate that agrees longest with `rest`, and for how many tokens, if for any."""
    best = max(((common_bytes(rest, 0, key) // 4, block_id) for key, block_id in candidates), default=(0, -1))
    return (best[1], best[0]) if best[0] else None


def common_bytes(tokens: bytes, start: int, other: bytes | bytearray) -> int:
    """How many bytes of `other` agree with `tokens` from `start` on."""
    low, high = 0, min(len(tokens) - start, len(other))
    while low < high:  # the first `low` agree
        middle = (low + high + 1) // 2
        if tokens[start + low : start + middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
