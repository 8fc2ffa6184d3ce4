"""A model that tells on the cache: each next token is a hash of all tokens that were read through the block table.

Its "keys and values" are the token ids themselves, with their position and the salt of who wrote them. The real
engine, scheduler, cache and sampler run on it; one block that is wrong, stale, freed or another tenant's changes what
is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvik.cache import BLOCK_SIZE, BLOCKS_PER_SUPERBLOCK, Identity, KVCacheSpec, PoolSize
from kvik.cache.spec import SEGMENT_SIZE
from kvik.config import EngineConfig, SamplingParams
from kvik.engine.batch import ScheduledBatch
from kvik.engine.engine import Engine, OpenStore
from kvik.engine.output import TokenLogprobs
from kvik.engine.pooling import PooledHidden
from kvik.engine.runner import StepOutput
from kvik.engine.sampler import NumpySampler, Sampled, SampleRow
from kvik.engine.sampler_reference import token_logprobs
from kvik.engine.sequence import Sequence
from kvik.ops.base import Batch, IntArray
from kvik.text.constraint import Constraint, allows

VOCAB = 11
CONTEXT = 400
Windows = tuple[int | None, ...]
ALL: Windows = (None,)
IDENTITY = Identity(b"simulated")
UNWRITTEN = -1
_POWERS = np.array([pow(0x9E3779B97F4A7C15, i + 1, 2**64) for i in range(CONTEXT)], np.uint64)
_COLUMNS = np.array([pow(0xD1342543DE82EF95, i + 1, 2**64) for i in range(VOCAB)], np.uint64)


def logits_after(tokens: npt.NDArray[np.int64], salt: int) -> npt.NDArray[np.float32]:
    """Of what follows these tokens: a row (VOCAB,) that any change of any token, or of the salt, changes."""
    mixed = (tokens.astype(np.uint64) + np.uint64(1)) * _POWERS[: len(tokens)]
    total = (int(mixed.sum(dtype=np.uint64)) + salt * 0xA0761D6478BD642F) % 2**64
    total = (total ^ total >> 29) * 0xBF58476D1CE4E5B9 % 2**64
    rows = np.uint64(total) ^ _COLUMNS
    rows = (rows ^ (rows >> np.uint64(32))) * np.uint64(0x94D049BB133111EB)
    return ((rows >> np.uint64(40)).astype(np.float32) / np.float32(2**22)).astype(np.float32)


@dataclass
class Slots:
    """The memory of the fake cache: what was written to each slot."""

    tokens: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    salts: npt.NDArray[np.int64]

    def arrays(self) -> tuple[npt.NDArray[np.int64], ...]:
        return self.tokens, self.positions, self.salts


class SimulatedFailure(Exception):
    """What a simulation asked for."""


class SimulatedRunner:
    """A runner whose arithmetic is `logits_after`."""

    def __init__(self, spec: KVCacheSpec, size: PoolSize) -> None:
        self.spec = spec
        self.fails = False  # the next step stops half way
        self.before: Callable[[], None] = lambda: None  # each step
        self._sampler = NumpySampler()
        # Of each group of layers.
        self.slots = [
            Slots(*(np.full(count * BLOCK_SIZE, UNWRITTEN, np.int64) for _ in range(3))) for count in size.group_blocks
        ]

    def copy_blocks(self, copies: SequenceOf[tuple[int, int]], group: int) -> None:
        for source, target in copies:
            for array in self.slots[group].arrays():
                array[target * BLOCK_SIZE : (target + 1) * BLOCK_SIZE] = array[
                    source * BLOCK_SIZE : (source + 1) * BLOCK_SIZE
                ]

    def discard_blocks(self, superblocks: SequenceOf[int], group: int) -> None:
        size = BLOCKS_PER_SUPERBLOCK * BLOCK_SIZE
        for superblock in superblocks:
            for array in self.slots[group].arrays():
                array[superblock * size : (superblock + 1) * size] = UNWRITTEN

    def read_blocks(self, block_ids: SequenceOf[int], group: int) -> bytes:
        parts = [
            array[block_id * BLOCK_SIZE : (block_id + 1) * BLOCK_SIZE].tobytes()
            for block_id in block_ids
            for array in self.slots[group].arrays()
        ]
        return b"".join(parts)

    def write_blocks(self, block_ids: SequenceOf[int], data: bytes | memoryview, group: int) -> None:
        values = np.frombuffer(data, np.int64).reshape(len(block_ids), 3, BLOCK_SIZE)
        for block_id, parts in zip(block_ids, values, strict=True):
            for array, part in zip(self.slots[group].arrays(), parts, strict=True):
                array[block_id * BLOCK_SIZE : (block_id + 1) * BLOCK_SIZE] = part

    def step_bytes(self, num_tokens: int, num_logits: int) -> int:
        return 1

    def sample(self, logits: npt.NDArray[np.float32], rows: SequenceOf[SampleRow]) -> list[Sampled]:
        return self._sampler.sample(logits, rows)

    def prompt_logprobs(
        self, logits: npt.NDArray[np.float32], next_ids: SequenceOf[int], num_top: int
    ) -> list[TokenLogprobs]:
        return self._sampler.prompt_logprobs(logits, next_ids, num_top)

    def run(self, batch: ScheduledBatch) -> StepOutput:
        self.before()
        arrays = batch.arrays
        batch_salts = np.array([salt_number(item.sequence.request.salt) for item in batch.items])
        fails, self.fails = self.fails, False
        for index, written in zip(arrays.groups, self.slots, strict=True):
            slots = index.slot_mapping
            assert len(set(slots.tolist())) == len(slots), "two tokens in one slot"
            if fails:
                written.positions[slots[::2]] = UNWRITTEN
                continue
            written.tokens[slots] = arrays.token_ids
            written.positions[slots] = arrays.positions
            written.salts[slots] = batch_salts[arrays.sequence_index]
        if fails:
            raise SimulatedFailure
        return StepOutput(
            *(self._rows(arrays, tokens, batch_salts) for tokens in (arrays.logit_rows, arrays.hidden_rows))
        )

    def _rows(self, arrays: Batch, tokens: IntArray, batch_salts: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """What the tables show of some of the step's tokens: their logits, and their hidden states as well."""
        rows = np.zeros((len(tokens), VOCAB), np.float32)
        for group in self.spec.layer_groups:
            window = self.spec.groups[group].window
            recent = self.spec.recent_of.get(group, group)
            for index, token in enumerate(tokens):
                sequence, position = arrays.sequence_index[token], arrays.positions[token]
                seen = np.arange(0 if window is None else max(0, position + 1 - window), position + 1)
                is_recent = (seen < BLOCK_SIZE) | (seen // SEGMENT_SIZE == position // SEGMENT_SIZE)
                read, salt = np.empty(len(seen), np.int64), int(batch_salts[sequence])
                for where, those in ((group, ~is_recent), (recent, is_recent)):
                    tables, stored, places = arrays.groups[where].block_tables, self.slots[where], seen[those]
                    slots = tables[sequence, places // BLOCK_SIZE] * BLOCK_SIZE + places % BLOCK_SIZE
                    assert (stored.positions[slots] == places).all(), "a slot holds another position"
                    assert (stored.salts[slots] == salt).all(), "a slot was written under another salt"
                    read[those] = stored.tokens[slots]
                rows[index] += logits_after(read, salt)
        return rows


class FakeTokenizer:
    """Token i is the letter i."""

    add_space_prefix = False
    eos_token_ids = frozenset({VOCAB - 1})

    def decode(self, token_ids: list[int], *, skip_special: bool = True) -> str:
        return "".join(chr(ord("a") + token_id) for token_id in token_ids)

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        return bytes([ord("a") + token_id])


def fake_model(spec: KVCacheSpec) -> Any:
    """As much of a `LoadedModel` as an engine uses."""
    decoder = SimpleNamespace(
        spec=SimpleNamespace(kv_spec=lambda dtype: spec, vocab_size=VOCAB, context_length=CONTEXT)
    )
    return SimpleNamespace(decoder=decoder, context=CONTEXT, tokenizer=FakeTokenizer(), path=Path("fake.gguf"))


def logits_of_layers(tokens: npt.NDArray[np.int64], salt: int, windows: Windows) -> npt.NDArray[np.float32]:
    """Of what follows these tokens where each layer sees all of them or the newest in its window."""
    rows = [logits_after(tokens if window is None else tokens[-window:], salt) for window in windows]
    total: npt.NDArray[np.float32] = np.sum(rows, axis=0, dtype=np.float32)
    return total


def salt_number(salt: str | None) -> int:
    return 0 if salt is None else 1 + sum(salt.encode())


class SimulatedEngine(Engine):
    """The real engine over a simulated runner; `num_blocks` is the size of its cache."""

    runner: SimulatedRunner

    def __init__(
        self,
        *,
        num_blocks: int,
        windows: Windows = ALL,
        kv_dtype: str = "f32",
        least_sequences: int = 8,
        identity: Identity = IDENTITY,
        open_store: OpenStore | None = None,
        **options: Any,
    ) -> None:
        self.windows = windows
        spec = KVCacheSpec.uniform(len(windows), num_kv_heads=1, head_dim=32, dtype=kv_dtype, layer_windows=windows)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("kvik.cache.spec.MIN_SEQUENCES", least_sequences)
            size = spec.pool_size(
                num_blocks,
                context=CONTEXT,
                step_tokens=options["token_budget"],
                max_running=options["max_running"],
            )
            config = EngineConfig(kv_dtype="f32", kv_memory=max(1, spec.pool_bytes(size)), **options)
            super().__init__(
                fake_model(spec),
                config,
                make_runner=lambda model, kv_spec, size: SimulatedRunner(kv_spec, size),
                identity=identity,
                open_store=open_store,
            )


def expected_sequence(
    engine: SimulatedEngine,
    prompt: list[int],
    params: SamplingParams,
    seed: int,
    salt: str | None,
    constraint: Constraint | None = None,
) -> Sequence:
    """The same request, written by nothing but the model's definition: no cache, no batch, no engine."""
    # With the seed of the completion that is asked for, it is the only one.
    params = dataclasses.replace(params, n=1, seed=seed, echo=False)
    sequence = engine.new_sequence(engine.new_request(prompt, params, salt=salt, constraint=constraint))
    stop_token_ids = sequence.request.stop_token_ids
    while sequence.finish_reason is None:
        logits = logits_of_layers(np.array(sequence.token_ids, np.int64), salt_number(salt), engine.windows)
        forbidden = set(stop_token_ids if sequence.num_completion_tokens < params.min_tokens else ())
        mask = None
        if sequence.matcher is not None:
            if params.ignore_eos:
                forbidden |= FakeTokenizer.eos_token_ids
            try:
                (mask,) = sequence.matcher.masks()
            except Exception as error:  # noqa: BLE001
                sequence.finish("abort", error)
                break
            if not any(allows(mask, token_id) for token_id in set(range(VOCAB)) - forbidden):
                forbidden = set()
        row = SampleRow(
            row=0,
            params=params,
            seed=seed,
            position=sequence.num_tokens,
            token_ids=sequence.token_ids,
            num_prompt_tokens=len(prompt),
            forbidden_ids=tuple(forbidden),
            mask=mask,
        )
        (sampled,) = NumpySampler().sample(logits[None], [row])
        if sampled.logprobs is not None:
            sequence.logprobs.append(sampled.logprobs)
        sequence.accept(sampled.token_id)
    return sequence


def expected_vector(engine: SimulatedEngine, sequence: Sequence) -> npt.NDArray[np.float32]:
    """The embedding of a request's prompt, by the model's definition."""
    request = sequence.request
    pooled = PooledHidden(request.pooling)
    for at in range(1, len(request.prompt_ids) + 1):
        tokens = np.array(request.prompt_ids[:at], np.int64)
        pooled.add(at - 1, logits_of_layers(tokens, salt_number(request.salt), engine.windows)[None])
    return pooled.vector(normalize=request.normalize)


def expected_prompt_logprobs(
    engine: SimulatedEngine, prompt: list[int], sequence: Sequence, salt: str | None
) -> list[TokenLogprobs | None]:
    """Of each token of the prompt, by the model's definition; nothing stands before the first."""
    num_top = sequence.params.logprobs
    assert num_top is not None
    return [None] + [
        token_logprobs(
            logits_of_layers(np.array(prompt[:at], np.int64), salt_number(salt), engine.windows), prompt[at], num_top
        )
        for at in range(1, len(prompt))
    ]
