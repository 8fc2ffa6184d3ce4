"""Request bodies: JSON to frozen structs, and the fields that several routes share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from kvik.config import SamplingParams
from kvik.server.errors import ApiError, bad_request

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Text = Annotated[str, Meta(min_length=1, max_length=1024)]
JsonObject = dict[str, Any]

MAX_STOPS = 4
MAX_TOP_LOGPROBS = 20

_PLAIN_PARAMS = (
    *("top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "n"),
    *("stop_token_ids", "min_tokens", "ignore_eos", "speculate"),
)

NEUTRAL = {
    "no_stop_trim": False,
    "skip_special_tokens": True,
    "separate_reasoning": True,
    "stream_reasoning": True,
    "return_hidden_states": False,
    "include_reasoning": True,
}
"""Fields that routers add to requests, and the one value of each that asks for what kvik does anyway."""

T = TypeVar("T")


class Body(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A body of which every field is known; `accepted` are the names of those that change nothing."""

    accepted = frozenset[str]()

    def ignored(self) -> list[str]:
        """The accepted fields that were sent."""
        return sorted(name for name in self.accepted if getattr(self, name) is not None)


class StreamOptions(Body, frozen=True, kw_only=True):
    """What a stream carries beside its pieces."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool | None = None  # never done


class CacheOptions(Body, frozen=True, kw_only=True):
    """OpenAI's `prompt_cache_options`."""

    mode: Literal["implicit", "explicit"] = "implicit"
    ttl: str | None = None
    comparison_response_id: Text | None = None


class StructuredOutputs(Body, frozen=True, kw_only=True):
    """vLLM's `structured_outputs`: one of them."""

    json: JsonObject | bool | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class JsonSchema(Body, frozen=True, kw_only=True):
    """A schema and what it is called."""

    name: str = ""
    description: str | None = None
    schema: JsonObject | bool | None = None
    strict: bool | None = None


class ResponseFormat(Body, frozen=True, kw_only=True):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class SamplingFields(Body, frozen=True, kw_only=True):
    """How tokens are chosen, by the names of OpenAI's API and of vLLM's."""

    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    ignore_eos: bool | None = None
    speculate: Literal["ngram"] | None = None
    # Structured output.
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonObject | bool | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = None
    # The cache.
    cache_salt: Text | None = None
    cache_prompt: bool | None = None  # llama.cpp's: false computes everything
    priority: Annotated[int, Meta(ge=-100, le=100)] | None = None
    prompt_cache_key: Text | None = None
    prompt_cache_options: CacheOptions | None = None
    comparison_response_id: Text | None = None
    # Streams.
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_progress: bool | None = None
    return_token_ids: bool | None = None  # vLLM's
    timings_per_token: bool | None = None
    # Those of `NEUTRAL`.
    no_stop_trim: bool | None = None
    skip_special_tokens: bool | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    return_hidden_states: bool | None = None
    include_reasoning: bool | None = None
    # Accepted.
    user: str | None = None
    metadata: JsonObject | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_retention: str | None = None

    def check(self) -> None:
        """Raise `ApiError` for fields that contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options needs stream: true", "stream_options")
        if self.return_progress and not self.stream:
            raise bad_request("return_progress needs stream: true", "return_progress")
        for name, neutral in NEUTRAL.items():
            if getattr(self, name) is (not neutral):
                said, wanted = str(not neutral).lower(), str(neutral).lower()
                raise bad_request(
                    f"{name} is {said}, which this server does not do (hint: leave it out or {wanted})", name
                )
        stops = self.stops
        if len(stops) > MAX_STOPS or not all(stops):
            raise bad_request(f"stop has {len(stops)} strings, give up to {MAX_STOPS} that are not empty", "stop")

    @property
    def compared_id(self) -> str | None:
        """The answer whose prompt this one's is compared with; the name stands in the options too, as in Responses."""
        options = self.prompt_cache_options
        nested = None if options is None else options.comparison_response_id
        return self.comparison_response_id if nested is None else nested

    def ignored(self) -> list[str]:
        """The accepted fields that were sent, one within `stream_options` among them."""
        hides = self.stream_options is not None and self.stream_options.include_obfuscation
        return super().ignored() + (["stream_options.include_obfuscation"] if hides else [])

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def params(self, *, max_tokens: int, **others: Any) -> SamplingParams:
        """The engine's parameters; temperature is 1 unless it is said, as in OpenAI's API."""
        given = {name: value for name in _PLAIN_PARAMS if (value := getattr(self, name)) is not None}
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(0, self.top_k or 0),
            seed=None if self.seed is None else self.seed % 2**64,
            stop=self.stops,
            logit_bias=_biases(self.logit_bias),
            max_tokens=max_tokens,
            **given,
            **others,
        )


def _biases(values: Mapping[str, float] | None) -> dict[int, float] | None:
    if values is None:
        return None
    for name in values:
        if not re.fullmatch(r"[0-9]{1,10}", name, re.ASCII):
            raise bad_request(f"logit_bias has {name[:40]!r}, which is no token id", "logit_bias")
    if len({int(name) for name in values}) < len(values):
        raise bad_request("logit_bias names a token twice", "logit_bias")
    return {int(name): value for name, value in values.items()}


def decode(kind: type[T], body: bytes) -> T:
    """The body as a struct. Raises `ApiError` 400, which names the field."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _validation_error(str(error), kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the body is not valid JSON: it is nested too deeply", code="invalid_json") from None


def convert(kind: type[T], value: Any, where: str) -> T:
    """A part of a body, whose kind is known by what it says of itself. Raises `ApiError` 400, as `decode` does."""
    try:
        return msgspec.convert(value, type=kind)
    except msgspec.ValidationError as error:
        said, _, path = str(error).partition(" - at `$")
        raise _validation_error(f"{said} - at `$.{where}{path.rstrip('`')}`") from None


def _validation_error(message: str, kind: type | None = None) -> ApiError:
    """msgspec's message, and the field that it names; of a struct's own, also the one that is most like it."""
    said, _, path = message.partition(" - at `$")
    param = path.rstrip("`").lstrip(".").replace("[...]", "")
    code = "invalid_type" if ", got " in said else "invalid_value"
    named = re.search(r"field `([^`]*)`", said)
    if named is not None:
        param = f"{param}.{named[1]}" if param else named[1]
        code = "unknown_field" if "unknown" in said else "missing_field"
    where, hint = f"{param}: " if param else "the body: ", ""
    if code == "unknown_field" and named is not None and named[1] == param and kind is not None:
        alike = get_close_matches(param, getattr(kind, "__struct_fields__", ()), n=1, cutoff=0.7)
        hint = f" (hint: is it `{alike[0]}`?)" if alike else ""
    return ApiError(400, where + said[:1].lower() + said[1:] + hint, code=code, param=param or None)
