"""The front door: a model, its engine, and text in and out."""

from __future__ import annotations

import copy
import os
import reprlib
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, Unpack

from kvik.cache.sizing import choose_pool_size
from kvik.config import EngineConfig, Pooling, SamplingParams
from kvik.engine.admission import check_token_id_list
from kvik.engine.beams import Beam, search_beams
from kvik.engine.cache_view import CacheView
from kvik.engine.engine import Engine
from kvik.engine.output import Completion, Embedding, Piece
from kvik.engine.request import (
    ChatOptions,
    Message,
    Request,
    RequestOptions,
    TemplateOptions,
    check_options,
    split_options,
)
from kvik.engine.stream import collect, collect_embeddings, run_all, stream_sequence
from kvik.errors import InvalidInput, ModelError, NotEnoughMemory
from kvik.hub.progress import bytes_progress, counted_progress
from kvik.hub.store import resolve
from kvik.machine import available_memory_bytes, give_back_memory
from kvik.models.decoder import Decoder
from kvik.models.loader import check_config_of, load_model
from kvik.models.spec import DecoderSpec
from kvik.ops.base import Ops
from kvik.text.chat_prompt import encode_chat
from kvik.text.constraint import Constraint
from kvik.text.grammar import Grammar
from kvik.text.grammar_compiler import GrammarCompiler
from kvik.text.tokenizer import encode_prompt
from kvik.units import amount

Prompt: TypeAlias = str | SequenceOf[int]

GREEDY = SamplingParams()


class LLM:
    """A model ready to write.

    `model` is `smollm2`, a path to a .gguf file or to a checkpoint folder, or a Hub id (`org/name`,
    `org/name@revision`, `org/name:file.gguf`, `org/name:safetensors`). The other arguments are an `EngineConfig`, its
    fields by name, or both. Raises `ModelError`, `InvalidInput`, `NotEnoughMemory`.

    >>> llm = LLM("smollm2")
    >>> for piece in llm.stream("Once upon a time", SamplingParams(max_tokens=64)):
    ...     print(piece.text, end="")
    """

    def __init__(
        self, model: str | os.PathLike[str] = "smollm2", config: EngineConfig | None = None, **changes: Any
    ) -> None:
        self.config = replace(config or EngineConfig(), **changes)
        with bytes_progress() as report:
            path = resolve(os.fspath(model), check_config=check_config_of, progress=report)
        with bytes_progress(wait_s=1.0) as report:
            self.model = load_model(
                path,
                _make_ops(self.config),
                context=self.config.context,
                weights=self.config.weights,
                approve=self._check_memory,
                progress=report,
                packed_cache=None if self.config.packed_cache is None else Path(self.config.packed_cache),
            )
        give_back_memory()  # return the memory freed after building the tokenizer
        self.engine = self.new_engine()
        self._grammars = GrammarCompiler(self.model.tokenizer, self.model.decoder.spec.vocab_size)

    def generate(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        params: SamplingParams = GREEDY,
        **options: Unpack[RequestOptions],
    ) -> list[Completion]:
        """Completes each prompt, text or token ids, all in one batch; one prompt gives a list of one.

        With `params.n` above 1 there are so many completions for each prompt, one after the other. All prompts are
        checked before any runs. Where a request fails while it runs, the others end before its error is raised, as
        `RequestsFailed` with their completions where there are any. A higher `priority` is served earlier; requests of
        different `salt` share nothing; a `constraint` is what `compile_grammar` gives. A terminal shows the progress.
        """
        engine = self.engine
        requests = [self._new_request(self.encode(prompt), params, options) for prompt in as_list(prompts)]
        sequences = [engine.new_sequence(request) for request in requests]
        with counted_progress("completions", len(requests) * params.n) as advance:
            branches = run_all(engine, sequences, advance)
        return collect(engine, branches)

    def stream(
        self, prompt: Prompt, params: SamplingParams = GREEDY, **options: Unpack[RequestOptions]
    ) -> Iterator[Piece]:
        """Completes one prompt piece by piece, a token each; the last piece of a completion carries the `Completion`.

        With `params.n` above 1 the pieces of all completions come as they are written; `Piece.index` says whose each
        is. Closing the iterator early stops the request. The prompt is checked before this returns.
        """
        request = self._new_request(self.encode(prompt), params, options)
        return stream_sequence(self.engine, self.engine.new_sequence(request))

    def chat(
        self, messages: SequenceOf[Message], params: SamplingParams = GREEDY, **options: Unpack[ChatOptions]
    ) -> Completion:
        """Answers a conversation of messages as `render_chat` takes them; of several answers, the first."""
        for_template, others = split_options(options)
        return self.generate(self.render_chat(messages, **for_template), params, **others)[0]

    def stream_chat(
        self, messages: SequenceOf[Message], params: SamplingParams = GREEDY, **options: Unpack[ChatOptions]
    ) -> Iterator[Piece]:
        """Answers a conversation piece by piece; see `stream`."""
        for_template, others = split_options(options)
        return self.stream(self.render_chat(messages, **for_template), params, **others)

    def beam_search(
        self, prompt: Prompt, *, width: int = 4, max_tokens: int = 64, length_penalty: float = 1.0
    ) -> list[Beam]:
        """The `width` likeliest completions that a search over so many beams finds, the best first.

        The beams are branches of one sequence: what they have in common is computed and kept once.
        """
        return search_beams(
            self.engine, self.encode(prompt), width=width, max_tokens=max_tokens, length_penalty=length_penalty
        )

    def embed(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        pooling: Pooling = "last",
        normalize: bool = True,
        **options: Unpack[RequestOptions],
    ) -> list[Embedding]:
        """Makes each prompt, text or token ids, one vector (hidden_size,), all in one batch.

        It is the hidden state behind the last norm: of the last token, or the mean over all. `normalize` makes its
        length 1. A mean needs every token's hidden state, so nothing of it is read from the prefix cache; what it
        computes is kept there for others. A model that was trained to chat gives poor embeddings: take one that was
        trained to embed, and the pooling and the end token that it was trained with. Errors are those of `generate`.
        """
        engine = self.engine
        check_options(options, RequestOptions)
        requests = [
            engine.new_embed_request(self.encode(prompt), pooling, normalize, **options) for prompt in as_list(prompts)
        ]
        for request in requests:
            engine.check_room(request)
        with counted_progress("embeddings", len(requests)) as advance:
            sequences = run_all(engine, [engine.new_sequence(request) for request in requests], advance)
        return collect_embeddings(sequences)

    @property
    def cache(self) -> CacheView:
        """The KV cache to look at: blocks by state, bytes, hits, and the prefix tree with its text."""
        return CacheView(self.engine)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; ids pass unchanged."""
        if isinstance(prompt, str):
            return encode_prompt(self.model.tokenizer, prompt)
        return check_token_id_list(prompt)

    def render_chat(self, messages: SequenceOf[Message], **options: Unpack[TemplateOptions]) -> list[int]:
        """Token ids of a conversation in the model's own chat template, ready for the answer.

        Messages are like {"role": "user", "content": "..."}, with content of text or of text parts, and may carry
        `tool_calls`, `tool_call_id` and `name`; `tools` are function tools; both as in the OpenAI API. `template_vars`
        are the template's own switches, such as {"enable_thinking": False}. `continue_final_message`, with
        `add_generation_prompt` False, has the answer go on where the last message ends.

        As in transformers, the names of control tokens are read as those tokens wherever they stand, also inside a
        message; with `plain_content` they are text there, as is right for what strangers wrote.
        """
        template = self.model.chat_template
        if template is None:
            raise ModelError(
                f"{self.model.path.name} has no chat template",
                hint="use generate or stream (`kvik run --raw`): it is a model for plain completion",
            )
        return encode_chat(template, self.model.tokenizer, messages, **options)

    @property
    def max_grammar_bytes(self) -> int:
        """Most memory that grammars take beside cache and weights, once any is used."""
        return self._grammars.max_num_bytes(self.config.max_running)

    def compile_grammar(self, grammar: Grammar) -> Constraint:
        """What makes a completion follow a grammar, as the option `constraint` of any request; from any thread.

        The grammars used last need no compiling. Raises `InvalidGrammar`; `InvalidInput` where llguidance is missing.

        >>> constraint = llm.compile_grammar(Grammar.json_schema({"type": "integer"}))
        >>> llm.generate("The answer is ", constraint=constraint)
        """
        return self._grammars.compile(grammar)

    @property
    def is_chat_model(self) -> bool:
        """Whether the model brings a chat template."""
        return self.model.chat_template is not None

    def new_engine(self, **changes: Any) -> Engine:
        """Another engine over the same weights, with a cache of its own.

        `changes` are fields of `EngineConfig` in which it differs. Raises `InvalidInput`, also for those that the
        loaded model has settled: context, activations, backend and weights.
        """
        config = replace(self.config, **changes)
        for name in ("context", "activations", "backend", "weights"):
            if getattr(config, name) != getattr(self.config, name):
                raise InvalidInput(
                    f"{name} is {getattr(config, name)!r}, the model was loaded with {getattr(self.config, name)!r}",
                    hint=f"load another: LLM(..., {name}={getattr(config, name)!r})",
                )
        model = self.model
        if config.threads != self.config.threads:
            model = replace(model, decoder=model.decoder.with_ops(_make_ops(config)))
        if config.store is None:
            return Engine(model, config)
        from kvik.engine.open_store import identity_for, open_store

        identity = identity_for(model, config)
        return Engine(model, config, identity=identity, open_store=partial(open_store, model, config, identity))

    def close(self) -> None:
        """Write what is still to be stored, and use the store no more; without one it does nothing."""
        self.engine.close_store()

    def with_decoder(self, decoder: Decoder) -> LLM:
        """The same tokenizer and settings around another decoder, with an engine of its own."""
        other = copy.copy(self)
        other.model = replace(self.model, decoder=decoder)
        other.config = replace(self.config, store=None)  # its blocks are those of the model's own decoder
        other.engine = other.new_engine()
        return other

    def _new_request(self, prompt_ids: list[int], params: SamplingParams, options: RequestOptions) -> Request:
        """A request that has been checked in full, what is pinned included."""
        check_options(options, RequestOptions)
        request = self.engine.new_request(prompt_ids, params, **options)
        self.engine.check_room(request)
        return request

    def _check_memory(self, spec: DecoderSpec, context: int) -> None:
        """Before the weights are loaded: whether the cache will find its memory."""
        config = self.config
        choose_pool_size(
            spec.kv_spec(config.kv_dtype),
            context,
            config.kv_memory,
            token_budget=config.token_budget,
            max_running=config.max_running,
        )
        turn_bytes, available = context * spec.position_bytes, available_memory_bytes()
        if turn_bytes > available:
            raise NotEnoughMemory(
                f"the angles of {context:,} positions take {amount(turn_bytes)},"
                f" the machine has {amount(available)} available",
                hint=f"set the context to {available // 2 // spec.position_bytes} or less (`--context`)",
            )


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


def as_list(prompts: Prompt | SequenceOf[Prompt]) -> SequenceOf[Prompt]:
    """One prompt or several: a list of token ids is one prompt."""
    if isinstance(prompts, str | bytes | bytearray):
        return [prompts]  # `encode` says what is wrong with bytes
    try:
        several: list[Any] = list(prompts)
    except TypeError:
        raise InvalidInput(f"prompts is {reprlib.repr(prompts)}", hint="give text, or a list of texts") from None
    return [several] if several and hasattr(several[0], "__index__") else several
