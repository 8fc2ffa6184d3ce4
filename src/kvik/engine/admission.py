"""What is refused: every check of a request, before anything is queued."""

from __future__ import annotations

import operator
import os
import reprlib
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import Any, Unpack, get_args

from kvik.cache import CacheManager, Match
from kvik.config import Pooling, SamplingParams
from kvik.engine.lease import Lease
from kvik.engine.request import HeldOptions, Request, check_options
from kvik.errors import CacheTooSmall, InvalidInput, PromptTooLong
from kvik.models.loader import LoadedModel
from kvik.text.constraint import Constraint

MAX_SALT_BYTES = 256
MAX_REQUEST_ID_BYTES = 256
MAX_PRIORITY = 100


class Admission:
    """Builds requests that an engine can serve.

    `new_request` looks at the model and the size of the pool alone, so that any thread may call it while a step runs;
    `check_room` looks at what is pinned too, and belongs to whoever holds the engine's lock.
    """

    def __init__(self, model: LoadedModel, cache: CacheManager, max_running: int) -> None:
        self.model = model
        self.cache = cache
        self.max_running = max_running

    def new_request(
        self, prompt_ids: SequenceOf[int], params: SamplingParams, **options: Unpack[HeldOptions]
    ) -> Request:
        """A checked request. Raises `InvalidInput`, `PromptTooLong`, `CacheTooSmall`."""
        if not isinstance(params, SamplingParams):
            raise InvalidInput(f"params is {reprlib.repr(params)}", hint="give SamplingParams(...)")
        self._check_prompt(prompt_ids, self.model.context - 1)
        constraint = options.get("constraint")
        self._check_constraint(constraint)
        request = Request(
            prompt_ids=tuple(prompt_ids),
            params=params,
            seed=int.from_bytes(os.urandom(8)) if params.seed is None else params.seed,
            stop_token_ids=self._stop_token_ids(params, is_constrained=constraint is not None),
            max_total_tokens=min(len(prompt_ids) + params.max_tokens, self.model.context),
            **_checked_options(options),
        )
        self._check_blocks(request, self.cache.num_reachable_blocks, 0)
        return request

    def new_embed_request(
        self, prompt_ids: SequenceOf[int], pooling: Pooling, normalize: bool, **options: Unpack[HeldOptions]
    ) -> Request:
        """The same of a prompt that is to become a vector; it may fill the context."""
        if pooling not in get_args(Pooling):
            raise InvalidInput(f"pooling is {reprlib.repr(pooling)}", hint='give "last" or "mean"')
        _check_bool("normalize", normalize)
        if options.get("constraint") is not None:
            raise InvalidInput("an embedding writes nothing that a grammar could constrain", hint="leave it out")
        self._check_prompt(prompt_ids, self.model.context)
        request = Request(
            prompt_ids=tuple(prompt_ids),
            params=SamplingParams(),
            seed=0,
            stop_token_ids=frozenset(),
            max_total_tokens=len(prompt_ids),
            kind="embed",
            pooling=pooling,
            normalize=normalize,
            **_checked_options(options),
        )
        self._check_blocks(request, self.cache.num_reachable_blocks, 0)
        return request

    def check_room(self, request: Request, match: Match) -> None:
        """Raise `CacheTooSmall` for what could never fit beside what is pinned, whatever the others give back."""
        self._check_blocks(request, self.cache.num_blocks_within_reach(match), self.cache.num_pinned)

    def check_written(self, request: Request, written: SequenceOf[SequenceOf[int]]) -> None:
        """Raise `InvalidInput` for tokens that cannot be those of the request's completions."""
        if len(written) != request.params.n:
            raise InvalidInput(
                f"tokens of {len(written)} completions are given, {request.params.n} are asked for",
                hint="give a list for each, which may be empty",
            )
        if request.params.logprobs is not None and any(written):
            raise InvalidInput(
                "a completion with logprobs cannot be resumed: those of its first tokens are not known",
                hint="begin it anew with the same seed",
            )
        for token_ids in written:
            self._check_token_ids("the completion's token id", token_ids)

    def _check_blocks(self, request: Request, num_blocks: int, num_pinned: int) -> None:
        spec = self.cache.spec
        needed = spec.num_blocks_for(request.max_kept_tokens)
        if needed <= num_blocks:
            return
        room = num_blocks * spec.block_size + 1 - request.num_prompt_tokens
        advice = f"lower max_tokens to {room:,} or less, or " if room > 0 and request.kind == "generate" else ""
        wanted = spec.pool_bytes(
            spec.pool_size(
                spec.pool_blocks_for(request.max_total_tokens),
                context=self.model.context,
                step_tokens=self.cache.step_tokens,
                max_running=self.max_running,
            )
        )
        subject = "prompt and answer need" if request.kind == "generate" else "the prompt needs"
        raise CacheTooSmall(
            f"{subject} {needed:,} blocks ({request.max_total_tokens:,} tokens), the cache has {num_blocks:,}"
            + (f" besides {num_pinned:,} pinned ones" if num_pinned else ""),
            hint=f"{advice}raise kv_memory (`--kv-memory`) to {-(-wanted // 2**20):,} MiB or more",
        )

    def _check_prompt(self, prompt_ids: SequenceOf[int], max_tokens: int) -> None:
        if not prompt_ids:
            raise InvalidInput("the prompt is empty", hint="give at least one token of text")
        self._check_token_ids("the prompt's token id", prompt_ids)
        if len(prompt_ids) > max_tokens:
            with_answer = " with the answer" if max_tokens < self.model.context else ""
            raise PromptTooLong(
                f"the prompt has {len(prompt_ids):,} tokens, the context holds {self.model.context:,}{with_answer}",
                hint=self._context_hint(),
                num_tokens=len(prompt_ids),
                context=self.model.context,
            )

    def _context_hint(self) -> str:
        limit = self.model.decoder.spec.context_length
        return (
            f"shorten the prompt, or raise the context, up to {limit}" if self.model.context < limit else "shorten it"
        )

    def _check_token_ids(self, what: str, token_ids: Iterable[int]) -> None:
        vocab_size = self.model.decoder.spec.vocab_size
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidInput(
                    f"{what} {token_id} is not in the vocabulary", hint=f"ids go from 0 to {vocab_size - 1}"
                )

    def _check_constraint(self, constraint: Constraint | None) -> None:
        if constraint is None:
            return
        if not isinstance(constraint, Constraint):
            raise InvalidInput(
                f"constraint is {reprlib.repr(constraint)}", hint="give what LLM.compile_grammar made of a grammar"
            )
        vocab_size = self.model.decoder.spec.vocab_size
        if constraint.tokenizer is not self.model.tokenizer or constraint.vocab_size != vocab_size:
            raise InvalidInput(
                "the constraint was compiled for another model", hint="compile the grammar with this LLM"
            )

    def _stop_token_ids(self, params: SamplingParams, *, is_constrained: bool) -> frozenset[int]:
        self._check_token_ids("stop_token_ids:", params.stop_token_ids)
        self._check_token_ids("logit_bias: token id", (token_id for token_id, _ in params.biases))
        # A grammar lets no text go on behind an end.
        ignores_ends = params.ignore_eos and not is_constrained
        ends = frozenset() if ignores_ends else self.model.tokenizer.eos_token_ids
        stop_token_ids = ends.union(params.stop_token_ids)
        if params.min_tokens and len(stop_token_ids) == self.model.decoder.spec.vocab_size:
            raise InvalidInput(
                f"min_tokens is {params.min_tokens}, but every token is one that ends the text",
                hint="set min_tokens to 0, or leave some tokens out of stop_token_ids",
            )
        return stop_token_ids


def check_token_id_list(prompt: SequenceOf[int]) -> list[int]:
    """The prompt as plain integers. Raises `InvalidInput` for anything else."""
    try:
        if isinstance(prompt, str | bytes | bytearray) or any(isinstance(token_id, bool) for token_id in prompt):
            raise TypeError
        return [operator.index(token_id) for token_id in prompt]
    except TypeError:
        raise InvalidInput(f"the prompt is {reprlib.repr(prompt)}", hint="give text, or a list of token ids") from None


def _checked_options(options: HeldOptions) -> dict[str, Any]:
    """The fields of a request that they are."""
    check_options(options, HeldOptions)
    for name in ("use_cache", "hold", "share"):
        _check_bool(name, options.get(name, True))
    priority = options.get("priority", 0)
    if type(priority) is not int or abs(priority) > MAX_PRIORITY:
        raise InvalidInput(
            f"priority is {reprlib.repr(priority)}",
            hint=f"give a whole number from {-MAX_PRIORITY} to {MAX_PRIORITY}; more is earlier",
        )
    lease = options.get("lease")
    if lease is not None and not isinstance(lease, Lease):
        raise InvalidInput(f"lease is {reprlib.repr(lease)}", hint="give the lease of a sequence of this engine")
    _check_text("the salt", options.get("salt"), MAX_SALT_BYTES)
    _check_text("request_id", options.get("request_id"), MAX_REQUEST_ID_BYTES)
    fields = {name: value for name, value in options.items() if name != "lease" and value is not None}
    return fields if lease is None else fields | {"held": lease.hold}


def _check_bool(name: str, value: object) -> None:
    if type(value) is not bool:
        raise InvalidInput(f"{name} is {reprlib.repr(value)}", hint="give True or False")


def _check_text(name: str, value: str | None, max_bytes: int) -> None:
    if value is None:
        return
    if not isinstance(value, str) or not value.isprintable() or not 1 <= len(value.encode()) <= max_bytes:
        raise InvalidInput(f"{name} is {reprlib.repr(value)}", hint=f"give 1 to {max_bytes} bytes of printable text")
