"""What a caller may choose, frozen and checked once at the edge: after it the engine meets no surprise."""

from __future__ import annotations

import operator
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, cast, get_args

from kvik.errors import InvalidInput

ActivationDType = Literal["int8", "int16"]
KVDType = Literal["f32", "f16", "int8"]
SealedDType = Literal["k4", "v4"]
StoredDType = Literal[KVDType, SealedDType]
Backend = Literal["native", "reference"]
Speculation = Literal["ngram"]
Pooling = Literal["last", "mean"]
WeightFormat = Literal["q8", "q4"]
StorePolicy = Literal["end", "reuse"]

MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 1024
MAX_LOGPROBS = 20
MAX_BIASES = 300
MAX_COMPLETIONS = 128
MAX_BEAM_WIDTH = 10
MAX_SEED = 2**64 - 1
MAX_TOKENS = 2**31 - 1
MAX_SIZE_BYTES = 2**50

DEFAULT_QUOTA = "2GB"
"""For stored blocks in a folder."""

_UNITS = {"": 1} | {
    letter + ending: base**power
    for power, letter in enumerate("kmgt", start=1)
    for ending, base in (("", 1000), ("b", 1000), ("ib", 1024))
}
_KV_DTYPES = re.compile(r"k=(\w{1,8}),v=(\w{1,8})|(\w{1,8})", re.ASCII)
_SIZE = re.compile(r"(\d{1,16})(?:\.(\d{1,16}))? ?([kmgt]i?b|[kmgt]?)", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when to stop; the default is greedy.

    Order: penalties, logit_bias, temperature, top_k, top_p, min_p, then one draw. The draw for a token depends on
    (seed, position) alone, so the same seed gives the same text whatever else the engine does. Scalars of NumPy are
    kept as Python's own numbers. Raises `InvalidInput`.
    """

    n: int = 1  # completions of one prompt; the i-th draws with seed + i (modulo 2**64)
    max_tokens: int = 256  # of each completion; n * max_tokens stays below 2**31
    min_tokens: int = 0  # no end-of-text token and no stop before this many
    temperature: float = 0.0  # 0 takes the most likely token
    top_k: int = 0  # 0: all
    top_p: float = 1.0  # the smallest set of tokens with this much probability; 1: all
    min_p: float = 0.0  # relative to the most likely token
    repetition_penalty: float = (
        1.0  # divides positive logits of tokens seen in prompt or completion (Keskar et al., 2019)
    )
    presence_penalty: float = 0.0  # subtracted once from tokens seen in the completion
    frequency_penalty: float = 0.0  # subtracted for each time a token was seen in the completion
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None = ()  # added, by token id; `biases` has it
    stop: Sequence[str] = ()  # the text ends before the first of these
    stop_token_ids: Sequence[int] = ()  # the completion ends when one of these is sampled
    seed: int | None = None  # None: one is drawn and reported
    logprobs: int | None = None  # this many of the most likely tokens beside each chosen one
    ignore_eos: bool = False  # continue past end-of-text tokens
    echo: bool = False  # the text begins with the prompt's; with logprobs, the prompt's tokens have theirs too
    speculate: Speculation | None = None  # "ngram": guess from what followed the same tokens; never changes a token

    def __post_init__(self) -> None:
        # A string or a list is what callers have at hand; a tuple cannot change afterwards.
        _keep(self, "stop", _texts_of("stop", (self.stop,) if isinstance(self.stop, str) else self.stop))
        _keep(self, "stop_token_ids", _token_ids_of("stop_token_ids", self.stop_token_ids))
        _keep(self, "logit_bias", _checked_biases(self.logit_bias))
        _keep_int(self, "n", 1, MAX_COMPLETIONS)
        _keep_int(self, "max_tokens", 1, MAX_TOKENS)
        if self.n * self.max_tokens > MAX_TOKENS:
            raise InvalidInput(
                f"n is {self.n} and max_tokens {self.max_tokens:,}: together {self.n * self.max_tokens:,} tokens",
                hint=f"lower n, or max_tokens to {MAX_TOKENS // self.n:,} or less",
            )
        _keep_int(self, "min_tokens", 0, MAX_TOKENS)
        if self.min_tokens > self.max_tokens:
            raise InvalidInput(
                f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}",
                hint="lower min_tokens or raise max_tokens",
            )
        _keep_number(self, "temperature", 0.0, 100.0)
        _keep_int(self, "top_k", 0, MAX_TOKENS)
        _keep_number(self, "top_p", 0.0, 1.0, above=True)
        _keep_number(self, "min_p", 0.0, 1.0)
        _keep_number(self, "repetition_penalty", 0.01, 100.0)
        _keep_number(self, "presence_penalty", -100.0, 100.0)
        _keep_number(self, "frequency_penalty", -100.0, 100.0)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidInput(f"stop has {len(self.stop)} strings", hint=f"give at most {MAX_STOP_STRINGS}")
        for text in self.stop:
            if not 1 <= len(text.encode("utf-8", "surrogatepass")) <= MAX_STOP_BYTES:
                raise InvalidInput(
                    f"a stop string has {len(text):,} characters", hint=f"give 1 to {MAX_STOP_BYTES} bytes of UTF-8"
                )
        for token_id in self.stop_token_ids:
            _check_int("stop_token_ids", token_id, 0, MAX_TOKENS)
        if self.seed is not None:
            _keep_int(self, "seed", 0, MAX_SEED)
        if self.logprobs is not None:
            _keep_int(self, "logprobs", 0, MAX_LOGPROBS)
        _keep_bool(self, "ignore_eos")
        _keep_bool(self, "echo")
        if self.speculate is not None:
            _keep_choice(self, "speculate", get_args(Speculation), otherwise=" or None")

    @property
    def has_penalties(self) -> bool:
        """Whether tokens before the one to be chosen matter."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as pairs in order of their token ids."""
        return cast(tuple[tuple[int, float], ...], self.logit_bias)


TOKEN_BUDGET = 256
"""Most tokens that one step computes, unless the caller says otherwise.

Whoever decodes waits that long for a prompt's chunk, and memory for intermediate results grows with it; longer chunks
are no faster (docs/log.md).
"""

MIXED_BUDGET = 128
"""Most tokens of prompts in a step in which others wait for their next token.

A chunk of this size makes them wait half as long as one of `TOKEN_BUDGET`, and new prompts come to their turn sooner;
less costs throughput (docs/log.md).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How a model is run. Raises `InvalidInput`."""

    activations: ActivationDType = "int8"  # what quantised weights are multiplied with; int16 is as good as float32
    weights: WeightFormat | None = None  # quantise a checkpoint's weights to this when they are loaded; None: keep them
    kv_dtype: str = "f16"  # of keys and values: f32, f16, int8 or k4v4, or of each its own, as in "k=int8,v=f16"
    context: int | None = None  # most tokens of a sequence, prompt and completion; None: the model's own limit
    threads: int | None = None  # None: the processors this process may use
    token_budget: int = TOKEN_BUDGET  # most tokens one step computes; never changes a result
    mixed_budget: int = MIXED_BUDGET  # of them, most for prompts where others wait for their next token
    kv_memory: int | str = "auto"  # for keys and values: bytes, or text like "2GiB", which is turned into bytes
    prefix_cache: bool = True  # keep what was computed, for requests that begin alike
    max_running: int = 64  # most sequences in one step
    max_waiting: int = 1024  # requests that wait; more are refused
    store: str | None = None  # a folder for blocks that outlive the process, or redis://…; None: they do not
    store_quota: int | str = DEFAULT_QUOTA  # for the files there, as `kv_memory` takes it
    store_policy: StorePolicy = "end"  # store what a request has computed when it ends, or what is used a second time
    store_key: str | None = None  # a file with the secret that stored blocks are sealed with; None: a checksum alone
    packed_cache: str | None = None  # a folder for packed weights, which the next start maps; None: pack at each start
    backend: Backend = "native"  # or "reference": NumPy, slow, the definition of each op

    def __post_init__(self) -> None:
        _keep_choice(self, "activations", get_args(ActivationDType))
        _keep(self, "kv_dtype", kv_dtype_name(*parse_kv_dtype(self.kv_dtype)))
        _keep_choice(self, "backend", get_args(Backend))
        if self.weights is not None:
            _keep_choice(self, "weights", get_args(WeightFormat), otherwise=" or None")
        if self.context is not None:
            _keep_int(self, "context", 2, MAX_TOKENS)
        if self.threads is not None:
            _keep_int(self, "threads", 1, 256)
        _keep_int(self, "token_budget", 1, 1 << 20)
        _keep_int(self, "mixed_budget", 1, 1 << 20)
        is_auto = isinstance(self.kv_memory, str) and self.kv_memory == "auto"
        _keep(self, "kv_memory", "auto" if is_auto else parse_bytes("kv_memory", self.kv_memory))
        _keep_bool(self, "prefix_cache")
        _keep_int(self, "max_running", 1, 4096)
        _keep_int(self, "max_waiting", 1, 1 << 20)
        for name in ("store", "store_key", "packed_cache"):
            if getattr(self, name) is not None:
                _keep_path(self, name)
        _keep(self, "store_quota", parse_bytes("store_quota", self.store_quota))
        _keep_choice(self, "store_policy", get_args(StorePolicy))
        if self.store is not None and "://" in self.store:
            _check_shared(self)
        if self.store is not None and not self.prefix_cache:
            raise InvalidInput("store needs the prefix cache, which is off", hint="leave out one of the two")


def is_shared(store: str) -> bool:
    """Whether a store is a server's address and no folder."""
    return store.startswith(("redis://", "rediss://"))


def _check_shared(config: EngineConfig) -> None:
    """Raise `InvalidInput` for a store on a server that is not to be had, or not like this."""
    assert config.store is not None
    if not is_shared(config.store):
        scheme = config.store.partition("://")[0]
        raise InvalidInput(f"store is at {scheme[:20]}://", hint="give a folder, redis://HOST or rediss://HOST")
    if config.store_key is None:
        raise InvalidInput(
            "store is a server, where others could change what is stored", hint="add store_key, a file with a secret"
        )
    if config.store_quota != parse_bytes("store_quota", DEFAULT_QUOTA):
        raise InvalidInput("store_quota is for folders", hint="set the server's maxmemory; leave store_quota out")


def parse_kv_dtype(value: str, name: str = "kv_dtype") -> tuple[StoredDType, StoredDType]:
    """The types of keys and of values from "f16", which is both, from "k4v4", or from text such as "k=int8,v=f16".

    Raises `InvalidInput`, which calls the value `name`.
    """
    plain: dict[str, StoredDType] = {dtype: dtype for dtype in get_args(KVDType)}
    match = _KV_DTYPES.fullmatch("k=k4,v=v4" if value == "k4v4" else value) if isinstance(value, str) else None
    key, values, both = match.groups() if match else (None, None, None)
    found_key = "k4" if key == "k4" else plain.get(key or both or "")
    found_value = "v4" if values == "v4" else plain.get(values or both or "")
    if found_key is None or found_value is None:
        choices = ", ".join(plain)
        raise InvalidInput(
            f"{name} is {_shown(value)}",
            hint=f"give one of {choices}, k4v4, or a pair like k=int8,v=f16, where k4 is for keys and v4 for values",
        )
    return found_key, found_value


def kv_dtype_name(key: StoredDType, value: StoredDType) -> str:
    """Types of keys and values as `parse_kv_dtype` takes them."""
    if (key, value) == ("k4", "v4"):
        return "k4v4"
    return key if key == value else f"k={key},v={value}"


def parse_bytes(name: str, value: int | str) -> int:
    """Bytes from a number or from text such as "512MiB", "1.5GB" or "800M"; a unit without i counts in thousands.

    Fractions of a byte are dropped. Raises `InvalidInput`, which calls the value `name`.
    """
    num_bytes = plain_int(value)
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        whole, decimals, unit = match[1], match[2] or "", match[3].lower()
        num_bytes = int(whole + decimals) * _UNITS[unit] // 10 ** len(decimals)
    if num_bytes is None or not 1 <= num_bytes <= MAX_SIZE_BYTES:
        raise InvalidInput(
            f"{name} is {_shown(value)}", hint="give bytes or a size like 512MiB, 2GiB or 1.5GB, up to 1024TiB"
        )
    return num_bytes


def plain_int(value: Any) -> int | None:
    """The whole number that the value is by `__index__`, as scalars of NumPy are; `None` for all else and for bools."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _checked_biases(values: Any) -> tuple[tuple[int, float], ...]:
    if values is None:
        return ()
    try:
        pairs = [(token_id, bias) for token_id, bias in (values.items() if isinstance(values, Mapping) else values)]
    except (TypeError, ValueError):
        raise InvalidInput(f"logit_bias is {_shown(values)}", hint="give a dict of token ids to numbers") from None
    if len(pairs) > MAX_BIASES:
        raise InvalidInput(f"logit_bias has {len(pairs):,} entries", hint=f"give at most {MAX_BIASES}")
    checked = {
        _check_int("a token id in logit_bias", token_id, 0, MAX_TOKENS): float(
            _check_number(f"logit_bias of token {token_id}", bias, -100.0, 100.0)
        )
        for token_id, bias in pairs
    }
    if len(checked) < len(pairs):
        raise InvalidInput("logit_bias names a token twice", hint="give one number for each token id")
    return tuple(sorted(checked.items()))


def _check_int(name: str, value: Any, minimum: int, maximum: int) -> int:
    """The value as a plain int. Raises `InvalidInput`, which calls it `name`."""
    number = plain_int(value)
    if number is None or not minimum <= number <= maximum:
        raise InvalidInput(f"{name} is {_shown(value)}", hint=f"give a whole number from {minimum} to {maximum:,}")
    return number


def _plain_number(value: Any) -> int | float | None:
    number: int | float | None = plain_int(value)
    if number is not None or isinstance(value, bool) or not isinstance(value, Real):
        return number
    try:
        return float(value)
    except OverflowError:
        return None


def _keep(config: SamplingParams | EngineConfig, name: str, value: Any) -> None:
    object.__setattr__(config, name, value)


def _keep_int(config: SamplingParams | EngineConfig, name: str, minimum: int, maximum: int) -> None:
    _keep(config, name, _check_int(name, getattr(config, name), minimum, maximum))


def _keep_number(config: SamplingParams, name: str, minimum: float, maximum: float, *, above: bool = False) -> None:
    _keep(config, name, _check_number(name, getattr(config, name), minimum, maximum, above=above))


def _check_number(name: str, value: Any, minimum: float, maximum: float, *, above: bool = False) -> int | float:
    """The value as a plain number. Raises `InvalidInput`, which calls it `name`."""
    number = _plain_number(value)
    # NaN fails every comparison.
    if number is None or not minimum <= number <= maximum or (above and number == minimum):
        low = f"above {minimum:g}" if above else f"from {minimum:g}"
        raise InvalidInput(f"{name} is {_shown(value)}", hint=f"give a number {low} to {maximum:g}")
    return number


def _keep_bool(config: SamplingParams | EngineConfig, name: str) -> None:
    value = getattr(config, name)
    # NumPy's bool is no subclass of Python's; every scalar of NumPy has the shape () and an `item`.
    plain = value.item() if getattr(value, "shape", None) == () else value
    if type(plain) is not bool:
        raise InvalidInput(f"{name} is {_shown(value)}", hint="give True or False")
    _keep(config, name, plain)


def _keep_path(config: EngineConfig, name: str) -> None:
    value = getattr(config, name)
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(path, str) or not path or "\0" in path:
        raise InvalidInput(f"{name} is {_shown(value)}", hint="give the path of a folder or file")
    _keep(config, name, path)


def _keep_choice(
    config: SamplingParams | EngineConfig, name: str, choices: tuple[str, ...], *, otherwise: str = ""
) -> None:
    value = getattr(config, name)
    if not isinstance(value, str) or value not in choices:
        raise InvalidInput(f"{name} is {_shown(value)}", hint=f"give one of {', '.join(choices)}{otherwise}")
    _keep(config, name, choices[choices.index(value)])


def _texts_of(name: str, values: Any) -> tuple[str, ...]:
    if not isinstance(values, (tuple, list)) or not all(isinstance(value, str) for value in values):
        raise InvalidInput(f"{name} is {_shown(values)}", hint="give a list of str values")
    return tuple(map(str, values))


def _token_ids_of(name: str, values: Any) -> tuple[int, ...]:
    numbers = [plain_int(value) for value in values] if isinstance(values, (tuple, list)) else [None]
    if any(number is None for number in numbers):
        raise InvalidInput(f"{name} is {_shown(values)}", hint="give a list of int values")
    return tuple(number for number in numbers if number is not None)


def _shown(value: Any) -> str:
    """The value in one short line; Python refuses to write out integers of thousands of digits."""
    if type(value) is int and value.bit_length() > 256:
        return f"a whole number of {value.bit_length():,} bits"
    return reprlib.repr(value)
