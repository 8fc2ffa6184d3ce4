"""The loop at the centre: schedule, run the model, sample, record."""

from __future__ import annotations

import reprlib
import secrets
import threading
import time
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvik.cache import BlockPool
from kvik.config import KVDType, SamplingParams
from kvik.engine.output import Completion, TextStream
from kvik.engine.sampler import StepLogits, choose
from kvik.engine.scheduler import Scheduler
from kvik.engine.sequence import Sequence
from kvik.errors import InvalidInput, ModelError, PromptTooLong
from kvik.models.loader import LoadedModel


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step brought: the sequences that got a token, and the logits each was sampled from."""

    sequences: list[Sequence]
    logits: npt.NDArray[np.float32]  # (sequences, vocab_size)


class Engine:
    """Runs sequences of one model over one pool of blocks.

    Threads may share it: a step, and whatever else changes sequences or blocks, holds `lock`; so does whoever wants to
    read a sequence that another thread may be stepping.
    """

    def __init__(self, model: LoadedModel, *, kv_dtype: KVDType = "f16", token_budget: int = 512) -> None:
        self.model = model
        self.decoder = model.decoder
        self.kv_spec = model.decoder.spec.kv_spec(kv_dtype)
        num_blocks = self.kv_spec.pool_blocks_for(model.context)
        self.pool = BlockPool(num_blocks)
        self.forward = model.decoder.record(model.decoder.ops.allocate_kv(self.kv_spec, num_blocks))
        self.scheduler = Scheduler(self.pool, self.kv_spec, token_budget=token_budget, context=model.context)
        self.lock = threading.RLock()
        weights = model.decoder.weights
        self._step_bytes = {wanted: weights.step_bytes(with_logits=wanted) for wanted in (False, True)}

    def new_sequence(
        self,
        token_ids: SequenceOf[int],
        params: SamplingParams,
        *,
        keep_cache: bool = True,
        previous: Sequence | None = None,
    ) -> Sequence:
        """A checked request, to be given to `add`.

        `previous` is a sequence of this engine, aborted here if it still runs: its blocks pass to the new one, and the
        tokens that both begin with are not computed again. Raises `InvalidInput`, `PromptTooLong`.
        """
        if not isinstance(params, SamplingParams):
            raise InvalidInput(f"params is {reprlib.repr(params)}", hint="give SamplingParams(...)")
        self._check_prompt(token_ids)
        stop_token_ids = self._stop_token_ids(params)
        sequence = Sequence(
            token_ids=list(token_ids),
            num_prompt_tokens=len(token_ids),
            params=params,
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            stop_token_ids=stop_token_ids,
            text=TextStream(self.model.tokenizer, params.stop),
            keep_cache=keep_cache,
        )
        if previous is not None:
            with self.lock:
                self._take_over(sequence, previous)
        return sequence

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence and start its clock; the blocks that it comes to hold are the caller's to `release`."""
        with self.lock:
            sequence.started_s = time.perf_counter()
            self.scheduler.add(sequence)

    def step(self) -> StepResult | None:
        """Advance by one step; `None` when nothing is to do."""
        with self.lock:
            batch = self.scheduler.schedule()
            if batch is None:
                return None
            logits = self.decoder.ops.to_numpy(self.forward(batch.arrays))
            step = StepLogits(logits)
            if not all(step.is_finite(row) for row in range(len(logits))):
                self._refuse_logits(batch.sampling)
                return None
            token_ids = [choose(step, row, sequence) for row, sequence in enumerate(batch.sampling)]
            weight_bytes = self._step_bytes[len(token_ids) > 0]
            return StepResult(self.scheduler.record(batch, token_ids, weight_bytes=weight_bytes), logits)

    def abort(self, sequence: Sequence) -> None:
        """Stop a sequence that is not finished; a finished one stays as it is."""
        with self.lock:
            self.scheduler.abort(sequence)

    def release(self, sequence: Sequence) -> None:
        """Give back a sequence's blocks."""
        with self.lock:
            self.scheduler.release(sequence)

    def completion(self, sequence: Sequence) -> Completion:
        """The result of a finished sequence."""
        assert sequence.finish_reason is not None
        return Completion(
            text=sequence.text.text,
            token_ids=sequence.completion_ids,
            finish_reason=sequence.finish_reason,
            stats=sequence.stats(block_bytes=self.kv_spec.block_bytes),
            seed=sequence.seed,
            logprobs=sequence.logprobs if sequence.params.logprobs is not None else None,
        )

    def _check_prompt(self, token_ids: SequenceOf[int]) -> None:
        if not token_ids:
            raise InvalidInput("the prompt is empty", hint="give at least one token of text")
        self._check_token_ids("the prompt's token id", token_ids)
        if len(token_ids) >= self.model.context:
            raise PromptTooLong(
                f"the prompt has {len(token_ids):,} tokens, the context holds {self.model.context:,} with the answer",
                hint=self._context_hint(),
            )

    def _context_hint(self) -> str:
        limit = self.decoder.spec.context_length
        return (
            f"shorten the prompt, or raise the context, up to {limit}" if self.model.context < limit else "shorten it"
        )

    def _refuse_logits(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            sequence.error = ModelError(
                f"{self.model.path.name}: the logits after {sequence.num_tokens:,} tokens are no finite numbers",
                hint="the file's weights are damaged; download it again",
            )
            self.scheduler.abort(sequence)

    def _check_token_ids(self, what: str, token_ids: Iterable[int]) -> None:
        vocab_size = self.decoder.spec.vocab_size
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidInput(
                    f"{what} {token_id} is not in the vocabulary", hint=f"ids go from 0 to {vocab_size - 1}"
                )

    def _stop_token_ids(self, params: SamplingParams) -> frozenset[int]:
        self._check_token_ids("stop_token_ids:", params.stop_token_ids)
        ends = frozenset() if params.ignore_eos else self.model.tokenizer.eos_token_ids
        stop_token_ids = ends.union(params.stop_token_ids)
        if params.min_tokens and len(stop_token_ids) == self.decoder.spec.vocab_size:
            raise InvalidInput(
                f"min_tokens is {params.min_tokens}, but every token is one that ends the text",
                hint="set min_tokens to 0, or leave some tokens out of stop_token_ids",
            )
        return stop_token_ids

    def _take_over(self, sequence: Sequence, previous: Sequence) -> None:
        """The last prompt token is always computed: its logits choose the first new token."""
        self.scheduler.abort(previous)
        computed = previous.token_ids[: previous.num_computed_tokens]
        num_shared = 0
        for mine, other in zip(sequence.token_ids[:-1], computed, strict=False):
            if mine != other:
                break
            num_shared += 1
        self.scheduler.release(previous, num_shared)
        sequence.block_table, previous.block_table = previous.block_table, []
        previous.num_computed_tokens = 0
        sequence.num_computed_tokens = sequence.num_cached_tokens = num_shared
