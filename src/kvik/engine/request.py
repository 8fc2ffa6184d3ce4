"""What is asked of the engine: built and checked once, on every route, and never changed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, cast

from kvik.cache import Hold
from kvik.config import SamplingParams

if TYPE_CHECKING:
    from kvik.engine.lease import Lease

Message: TypeAlias = Mapping[str, Any]

_numbers = itertools.count(1)


class RequestOptions(TypedDict, total=False):
    """What a caller may say of a request beside its prompt and its sampling params; defaults are those of `Request`."""

    use_cache: bool  # False: forget everything computed after each token, as naive decoding does
    priority: int  # more is earlier
    salt: str | None  # requests of different salts share nothing
    request_id: str | None  # names it in logs; never used as a key
    lease: Lease | None  # blocks to go on from, beside those that the prefix cache finds
    hold: bool  # when it ends, `Sequence.lease` holds what was computed


class TemplateOptions(TypedDict, total=False):
    """What a caller may hand to the model's chat template beside the messages."""

    tools: SequenceOf[Mapping[str, Any]] | None  # function tools, as in OpenAI's API
    template_vars: Mapping[str, Any] | None  # the template's own switches, such as `enable_thinking`


class ChatOptions(RequestOptions, TemplateOptions, total=False):
    """Both, for the routes that take messages."""


def request_options(options: ChatOptions) -> RequestOptions:
    """Those that are not for the template; unknown ones too, which `Admission` refuses."""
    return cast(RequestOptions, {name: options[name] for name in options if name not in TEMPLATE_OPTIONS})  # type: ignore[literal-required]


def template_options(options: ChatOptions) -> TemplateOptions:
    """Those that are for the template."""
    return cast(TemplateOptions, {name: options[name] for name in options if name in TEMPLATE_OPTIONS})  # type: ignore[literal-required]


TEMPLATE_OPTIONS = frozenset(TemplateOptions.__annotations__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """One prompt and how it is to be completed; `Admission.new_request` makes it and checks every field."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int  # of the first completion's draws; the i-th draws with seed + i (modulo 2**64)
    stop_token_ids: frozenset[int]  # the caller's, and the model's own unless they are ignored
    max_total_tokens: int  # of prompt and completion
    use_cache: bool = True
    priority: int = 0
    salt: str | None = None
    request_id: str = field(default_factory=lambda: f"request-{next(_numbers)}")
    held: Hold | None = None  # of its lease, which has an end of its own
    hold: bool = False
    arrived_s: float = field(default_factory=time.perf_counter)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_ids)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether each prompt token's logits are asked for, so that none can come from the prefix cache."""
        return self.params.echo and self.params.logprobs is not None
