"""A model with its KV arrays: all of the arithmetic that the engine asks for."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvik.cache import KVCacheSpec, PoolSize
from kvik.engine.batch import ScheduledBatch
from kvik.engine.output import TokenLogprobs
from kvik.engine.sampler import Sampled, SampleRow, make_sampler
from kvik.models.loader import LoadedModel

if TYPE_CHECKING:
    from kvik.ops.program import OpProfile

FloatArray = npt.NDArray[np.float32]


class StepOutput(NamedTuple):
    """What comes out of one pass over the layers."""

    logits: FloatArray  # (R, vocab_size) of the batch's `logit_rows`
    hidden: FloatArray  # (H, hidden_size) of its `hidden_rows`, behind the last norm


class Runner(Protocol):
    """What an engine needs of a model; what names blocks names those of one group of layers."""

    def run(self, batch: ScheduledBatch) -> StepOutput:
        """Compute the batch's tokens, keep their keys and values, and give the rows that are wanted."""

    def sample(self, logits: FloatArray, rows: SequenceOf[SampleRow]) -> list[Sampled]:
        """The next token of each row, all in one call."""

    def prompt_logprobs(self, logits: FloatArray, next_ids: SequenceOf[int], num_top: int) -> list[TokenLogprobs]:
        """Logprobs of the token that does follow each row of `logits`, and of the `num_top` most likely."""

    def copy_blocks(self, copies: SequenceOf[tuple[int, int]], group: int) -> None:
        """Copy keys and values from the first block of each pair to the second."""

    def discard_blocks(self, superblocks: SequenceOf[int], group: int) -> None:
        """Give the memory of whole superblocks back; what was in them is gone."""

    def read_blocks(self, block_ids: SequenceOf[int], group: int) -> bytes:
        """The bytes of blocks, one block after the other."""

    def write_blocks(self, block_ids: SequenceOf[int], data: bytes | memoryview, group: int) -> None:
        """Put bytes that `read_blocks` gave into blocks; raises ValueError where they are not as many."""

    def step_bytes(self, num_tokens: int, num_logits: int) -> int:
        """Bytes of the weights that a step of so many tokens and logit rows reads."""


class ModelRunner:
    """Runs a decoder over the KV arrays of one engine."""

    def __init__(self, model: LoadedModel, kv_spec: KVCacheSpec, size: PoolSize) -> None:
        self.decoder = model.decoder
        self.kv_spec = kv_spec
        self.kv_arrays = model.decoder.ops.allocate_kv(kv_spec, size.group_blocks)
        self._step = model.decoder.capture(self.kv_arrays)
        self._no_hidden = np.empty((0, model.decoder.spec.hidden_size), np.float32)
        self._sampler = make_sampler(model.decoder.ops)

    def run(self, batch: ScheduledBatch) -> StepOutput:
        """Compute a batch; see `Runner`."""
        decoder, arrays = self.decoder, batch.arrays
        if not len(arrays.hidden_rows):
            return StepOutput(decoder.ops.to_numpy(self._step(arrays)), self._no_hidden)
        logits, hidden = self._step.with_hidden(arrays)
        return StepOutput(decoder.ops.to_numpy(logits), decoder.ops.to_numpy(decoder.normed(hidden)))

    def sample(self, logits: FloatArray, rows: SequenceOf[SampleRow]) -> list[Sampled]:
        """Choose tokens; see `Runner`."""
        return self._sampler.sample(logits, rows)

    def prompt_logprobs(self, logits: FloatArray, next_ids: SequenceOf[int], num_top: int) -> list[TokenLogprobs]:
        """Logprobs of tokens that are known; see `Runner`."""
        return self._sampler.prompt_logprobs(logits, next_ids, num_top)

    def copy_blocks(self, copies: SequenceOf[tuple[int, int]], group: int) -> None:
        """Copy blocks; see `Runner`."""
        self.decoder.ops.copy_blocks(self.kv_arrays, copies, group)

    def discard_blocks(self, superblocks: SequenceOf[int], group: int) -> None:
        """Give memory back; see `Runner`."""
        self.decoder.ops.discard_blocks(self.kv_arrays, superblocks, group)

    def read_blocks(self, block_ids: SequenceOf[int], group: int) -> bytes:
        """The bytes of blocks; see `Runner`."""
        return self.decoder.ops.read_blocks(self.kv_arrays, block_ids, group)

    def write_blocks(self, block_ids: SequenceOf[int], data: bytes | memoryview, group: int) -> None:
        """Put bytes into blocks; see `Runner`."""
        self.decoder.ops.write_blocks(self.kv_arrays, block_ids, data, group)

    def step_bytes(self, num_tokens: int, num_logits: int) -> int:
        """Bytes of weights; see `Runner`."""
        return self.decoder.step_bytes(self.kv_spec, num_tokens, num_logits)

    def profile(self, batch: ScheduledBatch) -> list[OpProfile]:
        """Run a batch that has run before once more, with a clock beside each op; it writes what is there already."""
        from kvik.ops.program import CapturedStep

        assert isinstance(self._step, CapturedStep), "only the native backend has a profile"
        return self._step.profile(batch.arrays)
