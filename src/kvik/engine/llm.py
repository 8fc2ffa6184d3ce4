"""The front door: a model, its engine, and text in and out."""

from __future__ import annotations

import operator
import os
import reprlib
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any, TypeAlias

from kvik.config import Activations, Backend, EngineConfig, KVDType, SamplingParams
from kvik.engine.engine import Engine
from kvik.engine.output import Completion, Piece
from kvik.engine.sequence import Sequence
from kvik.errors import InvalidInput, ModelError, NotEnoughMemory
from kvik.machine import available_memory_bytes
from kvik.models.loader import load_model
from kvik.models.progress import terminal_progress
from kvik.models.spec import DecoderSpec
from kvik.models.store import resolve
from kvik.ops.base import Ops

Prompt: TypeAlias = str | SequenceOf[int]
Message: TypeAlias = Mapping[str, Any]

GREEDY = SamplingParams()


class LLM:
    """A model ready to write.

    `model` is `smollm2`, a path to a .gguf file, or a Hub id (`org/name`, `org/name@revision`, `org/name:file.gguf`).
    The other arguments are those of `EngineConfig`. Raises `ModelError`, `InvalidInput`, `NotEnoughMemory`.

    >>> llm = LLM("smollm2")
    >>> for piece in llm.stream("Once upon a time", SamplingParams(max_tokens=64)):
    ...     print(piece.text, end="")
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "smollm2",
        *,
        activations: Activations = "int8",
        kv_dtype: KVDType = "f16",
        context: int | None = None,
        threads: int | None = None,
        token_budget: int = 512,
        kv_memory: int | str = "auto",
        backend: Backend = "native",
    ) -> None:
        self.config = EngineConfig(
            activations=activations,
            kv_dtype=kv_dtype,
            context=context,
            threads=threads,
            token_budget=token_budget,
            kv_memory=kv_memory,
            backend=backend,
        )
        with terminal_progress() as report:
            path = resolve(os.fspath(model), progress=report)
        self.model = load_model(path, _make_ops(self.config), context=context, approve=self._check_memory)
        self.engine = self.new_engine()

    def generate(
        self, prompts: Prompt | SequenceOf[Prompt], params: SamplingParams = GREEDY, *, use_cache: bool = True
    ) -> list[Completion]:
        """Completes each prompt, text or token ids; one prompt gives a list of one. All are checked before any runs."""
        sequences = [self._new_sequence(prompt, params, use_cache) for prompt in _as_list(prompts)]
        return [self._run(sequence) for sequence in sequences]

    def stream(self, prompt: Prompt, params: SamplingParams = GREEDY, *, use_cache: bool = True) -> Iterator[Piece]:
        """Completes one prompt piece by piece, a token each; the last piece carries the `Completion`.

        Closing the iterator early stops the request. The prompt is checked before this returns.
        """
        return self._stream(self._new_sequence(prompt, params, use_cache))

    def chat(
        self, messages: SequenceOf[Message], params: SamplingParams = GREEDY, *, use_cache: bool = True
    ) -> Completion:
        """Answers a conversation of messages like {"role": "user", "content": "..."}."""
        return self._run(self._new_sequence(self.render_chat(messages), params, use_cache))

    def stream_chat(
        self, messages: SequenceOf[Message], params: SamplingParams = GREEDY, *, use_cache: bool = True
    ) -> Iterator[Piece]:
        """Answers a conversation piece by piece; see `stream`."""
        return self.stream(self.render_chat(messages), params, use_cache=use_cache)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; ids pass unchanged."""
        if isinstance(prompt, str):
            return self.model.tokenizer.encode(prompt)
        try:
            if isinstance(prompt, bytes | bytearray) or any(isinstance(token_id, bool) for token_id in prompt):
                raise TypeError
            return [operator.index(token_id) for token_id in prompt]
        except TypeError:
            raise InvalidInput(
                f"the prompt is {reprlib.repr(prompt)}", hint="give text, or a list of token ids"
            ) from None

    def render_chat(self, messages: SequenceOf[Message]) -> list[int]:
        """Token ids of a conversation in the model's own chat template, ready for the answer.

        As in transformers, the names of control tokens are read as those tokens wherever they stand, also inside a
        message: whoever passes on what strangers wrote should take `<|im_end|>` and its like out first.
        """
        template = self.model.chat_template
        if template is None:
            raise ModelError(
                f"{self.model.path.name} has no chat template",
                hint="use generate or stream (`kvik run --raw`): it is a model for plain completion",
            )
        # The template writes the beginning-of-text token itself where the model wants one.
        return self.model.tokenizer.encode(template.render(messages), add_special=False)

    @property
    def is_chat_model(self) -> bool:
        """Whether the model brings a chat template."""
        return self.model.chat_template is not None

    def new_engine(self) -> Engine:
        """Another engine over the same weights, with a cache of its own."""
        return Engine(self.model, kv_dtype=self.config.kv_dtype, token_budget=self.config.token_budget)

    def _check_memory(self, spec: DecoderSpec, context: int) -> None:
        kv_spec = spec.kv_spec(self.config.kv_dtype)
        token_bytes = kv_spec.token_bytes + spec.rope.token_bytes
        available = available_memory_bytes()
        if context * token_bytes > available:
            fits = available * 3 // 4 // token_bytes
            raise NotEnoughMemory(
                f"a cache of {context:,} tokens takes {context * token_bytes / 2**30:,.1f} GiB,"
                f" the machine has {available / 2**30:,.1f} GiB available",
                hint=f"set the context to {fits} or less (`--context {fits}`)",
            )

    def _new_sequence(self, prompt: Prompt, params: SamplingParams, use_cache: bool) -> Sequence:
        return self.engine.new_sequence(self.encode(prompt), params, keep_cache=use_cache)

    def _run(self, sequence: Sequence) -> Completion:
        completion = None
        for piece in self._stream(sequence):
            completion = piece.completion
        assert completion is not None
        return completion

    def _stream(self, sequence: Sequence) -> Iterator[Piece]:
        try:
            yield from stream_sequence(self.engine, sequence)
        finally:
            self.engine.release(sequence)


class Session:
    """A conversation that keeps its cache: each turn computes only what the turns before it have not.

    Its blocks are its own until it is closed, left (`with`) or forgotten.

    >>> with Session(LLM("smollm2")) as session:
    ...     session.append("user", "Why is the sky blue?")
    ...     for piece in session.stream():
    ...         print(piece.text, end="")
    """

    def __init__(self, llm: LLM, *, system: str | None = None, use_cache: bool = True) -> None:
        self.llm = llm
        self.use_cache = use_cache
        self.messages: list[dict[str, str]] = []
        self._sequence: Sequence | None = None
        if system is not None:
            self.append("system", system)

    def append(self, role: str, content: str) -> None:
        """Add a message."""
        for value in (role, content):
            if not isinstance(value, str):
                raise InvalidInput(f"a message has {reprlib.repr(value)}", hint="role and content are text")
        self.messages.append({"role": role, "content": content})

    def stream(
        self, params: SamplingParams = GREEDY, *, should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[Piece]:
        """Answers the messages so far, piece by piece, and appends the answer, whole or as far as it came.

        `should_stop` is asked between steps, and ends the answer as closing the iterator does.
        """
        engine = self.llm.engine
        token_ids = self.llm.render_chat(self.messages)
        self._sequence = engine.new_sequence(token_ids, params, keep_cache=self.use_cache, previous=self._sequence)
        return self._stream(engine, self._sequence, should_stop)

    @property
    def completion(self) -> Completion | None:
        """The newest answer and what it cost; `None` before the first and while one is being written."""
        if self._sequence is None or self._sequence.finish_reason is None:
            return None
        return self.llm.engine.completion(self._sequence)

    def close(self) -> None:
        """Stop what is being written and give back the session's blocks; a later turn computes all anew."""
        if self._sequence is not None:
            self.llm.engine.abort(self._sequence)
            self.llm.engine.release(self._sequence)
            self._sequence = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        # A constructor that raised has left no sequence behind.
        if getattr(self, "_sequence", None) is not None:
            self.close()

    def _stream(self, engine: Engine, sequence: Sequence, should_stop: Callable[[], bool]) -> Iterator[Piece]:
        try:
            yield from stream_sequence(engine, sequence, should_stop)
        finally:
            if sequence is self._sequence:
                self.append("assistant", sequence.text.text)
            else:  # a newer turn, or the session's end, has left this one behind
                engine.release(sequence)


def stream_sequence(
    engine: Engine, sequence: Sequence, should_stop: Callable[[], bool] = lambda: False
) -> Iterator[Piece]:
    """Queues the sequence and steps the engine until it is finished, giving its tokens as they come.

    Closing the iterator aborts the sequence, and so does `should_stop`, asked before each step.
    """
    engine.add(sequence)
    feed = _PieceFeed(engine, sequence)
    try:
        while True:
            yield from feed.take()
            if sequence.error is not None:
                raise sequence.error
            if feed.is_done or should_stop():
                return
            engine.step()
    finally:
        engine.abort(sequence)


class _PieceFeed:
    """What a sequence has written since the last look; another stream's steps may have brought it several tokens."""

    def __init__(self, engine: Engine, sequence: Sequence) -> None:
        self._engine = engine
        self._sequence = sequence
        self._num_tokens = self._num_chars = 0
        self.is_done = False

    def take(self) -> list[Piece]:
        """The new pieces; with the last of all, `is_done` becomes true."""
        pieces = []
        sequence = self._sequence
        with self._engine.lock:
            self.is_done = sequence.finish_reason is not None
            while self._num_tokens < sequence.num_completion_tokens:
                token_id = sequence.token_ids[sequence.num_prompt_tokens + self._num_tokens]
                text = sequence.text.text[self._num_chars :]
                self._num_tokens += 1
                self._num_chars += len(text)
                is_last = self.is_done and self._num_tokens == sequence.num_completion_tokens
                pieces.append(Piece(text, token_id, self._engine.completion(sequence) if is_last else None))
        return pieces


def _make_ops(config: EngineConfig) -> Ops:
    if config.backend == "reference":
        from kvik.ops.reference import ReferenceOps

        return ReferenceOps(config.activations)
    try:
        from kvik.ops.native import NativeOps
    except ImportError as error:
        if "KVIK_ISA" not in str(error):
            raise
        raise InvalidInput(str(error), hint="unset KVIK_ISA, or set it to generic") from error
    return NativeOps(config.activations, config.threads)


def _as_list(prompts: Prompt | SequenceOf[Prompt]) -> SequenceOf[Prompt]:
    """One prompt or several: a list of token ids is one prompt."""
    if isinstance(prompts, str | bytes | bytearray):
        return [prompts]  # `encode` says what is wrong with bytes
    try:
        several: list[Any] = list(prompts)
    except TypeError:
        raise InvalidInput(f"prompts is {reprlib.repr(prompts)}", hint="give text, or a list of texts") from None
    return [several] if several and hasattr(several[0], "__index__") else several
