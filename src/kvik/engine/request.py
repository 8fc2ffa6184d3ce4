"""What is asked of the engine: built and checked once, on every route, and never changed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, cast

from kvik.cache import Hold
from kvik.config import Pooling, SamplingParams
from kvik.text.constraint import Constraint

if TYPE_CHECKING:
    from kvik.engine.lease import Lease

Message: TypeAlias = Mapping[str, Any]
RequestKind: TypeAlias = Literal["generate", "embed"]

_numbers = itertools.count(1)


class RequestOptions(TypedDict, total=False):
    """What a caller may say of a request beside its prompt and its sampling params; defaults are those of `Request`."""

    use_cache: bool  # False: forget everything computed after each token, as naive decoding does
    priority: int  # more is earlier
    salt: str | None  # requests of different salts share nothing
    request_id: str | None  # names it in logs; never used as a key
    constraint: Constraint | None  # a grammar that every completion follows; `LLM.compile_grammar` makes one


class HeldOptions(RequestOptions, total=False):
    """And those of an engine's own clients, such as sessions, for blocks that outlive a request."""

    lease: Lease | None  # blocks to go on from, beside those that the prefix cache finds
    hold: bool  # when it ends, `Sequence.lease` holds what was computed, if anything was
    share: bool  # False: nothing of it is read from the prefix cache, or left there


class TemplateOptions(TypedDict, total=False):
    """What a caller may hand to the model's chat template beside the messages."""

    tools: SequenceOf[Mapping[str, Any]] | None  # function tools, as in OpenAI's API
    template_vars: Mapping[str, Any] | None  # the template's own switches, such as `enable_thinking`
    add_generation_prompt: bool  # False: end with the last message as it is
    continue_final_message: bool  # end within the last message
    plain_content: bool  # control tokens only where the template writes them


class ChatOptions(RequestOptions, TemplateOptions, total=False):
    """Both, for the routes that take messages."""


def split_options(options: ChatOptions) -> tuple[TemplateOptions, RequestOptions]:
    """Those for the template, and the others. Raises `TypeError` for one that no route has."""
    given: Mapping[str, Any] = options
    check_options(given, ChatOptions)
    names = TemplateOptions.__annotations__
    template = {name: value for name, value in given.items() if name in names}
    others = {name: value for name, value in given.items() if name not in names}
    return cast(TemplateOptions, template), cast(RequestOptions, others)


def check_options(options: Mapping[str, Any], kind: type) -> None:
    """Raise `TypeError` for an option that is not one of this kind, as Python does for an argument."""
    for name in options:
        if name not in kind.__annotations__:
            raise TypeError(f"there is no option {name!r}: there are {', '.join(kind.__annotations__)}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """One prompt and what is wanted of it; `Admission` makes it and checks every field.

    It is to be completed, or ("embed") to become one vector: then it ends with its prompt, and no token is sampled.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int  # of the first completion's draws; the i-th draws with seed + i (modulo 2**64)
    stop_token_ids: frozenset[int]  # the caller's, and the model's own unless they are ignored and nothing constrains
    max_total_tokens: int  # of prompt and completion
    use_cache: bool = True
    priority: int = 0
    salt: str | None = None
    request_id: str = field(default_factory=lambda: f"request-{next(_numbers)}")
    constraint: Constraint | None = None
    held: Hold | None = None  # of its lease, which has an end of its own
    hold: bool = False
    share: bool = True
    kind: RequestKind = "generate"
    pooling: Pooling = "last"  # of an embedding
    normalize: bool = True  # the same

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_ids)

    @property
    def unwanted_end_ids(self) -> frozenset[int]:
        """Of a constrained request: what would end a text that shall go on as long as its grammar lets it."""
        return self.stop_token_ids.difference(self.params.stop_token_ids) if self.params.ignore_eos else frozenset()

    @property
    def may_reuse(self) -> bool:
        """Whether some of it may come from the cache."""
        return self.use_cache and self.share and not self.wants_prompt_logprobs and not self.wants_all_hidden

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether each prompt token's logits are asked for, so that none can come from the prefix cache."""
        return self.params.echo and self.params.logprobs is not None

    @property
    def wants_all_hidden(self) -> bool:
        """Whether each prompt token's hidden state is asked for: then too."""
        return self.kind == "embed" and self.pooling == "mean"

    @property
    def max_kept_tokens(self) -> int:
        """Tokens whose keys and values come to be needed: the last of a completion is never computed."""
        return self.max_total_tokens - (1 if self.kind == "generate" else 0)
