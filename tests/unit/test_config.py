"""What a caller may choose: the edges that are accepted, and refusals that name the field and say what to do."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from kvik.config import (
    MAX_BIASES,
    MAX_COMPLETIONS,
    MAX_SEED,
    MAX_SIZE_BYTES,
    MAX_STOP_STRINGS,
    MAX_TOKENS,
    EngineConfig,
    SamplingParams,
    parse_bytes,
)
from kvik.errors import InvalidInput, KvikError
from looped import looped

pytestmark = pytest.mark.tiny

NAN, INF = math.nan, math.inf
TINIEST = 5e-324
UNPRINTABLE = 10**5000  # more digits than Python turns into text
NUMPY_NOT_INTEGERS: list[Any] = [np.bool_(True), np.float32(1), np.array([1, 2]), np.array(True)]
NUMPY_NOT_NUMBERS: list[Any] = [np.bool_(True), np.float32(NAN), np.float64(INF), np.array([0.5, 1.0]), np.array(True)]
NOT_INTEGERS: list[Any] = [
    None, True, 1.0, "1", b"1", [1], NAN, INF, 2**31, 2**64, -(10**100), UNPRINTABLE, *NUMPY_NOT_INTEGERS,
]  # fmt: skip
NOT_NUMBERS: list[Any] = [
    None, True, "1", b"1", [1.0], NAN, INF, -INF, 1e308, 10**400, UNPRINTABLE, Fraction(10**400), 1j,
    *NUMPY_NOT_NUMBERS,
]  # fmt: skip


class Integer(int):
    """A whole number by `__index__`, with a comparison of its own."""

    def __ge__(self, other: object) -> bool:
        return True

    __le__ = __ge__


SIZES = {
    "1": 1,
    "4096": 4096,
    "007": 7,
    "1k": 1000,
    "1KB": 1000,
    "1kib": 1024,
    "800M": 800_000_000,
    "800MB": 800_000_000,
    "512MiB": 512 << 20,
    "27 MiB": 27 << 20,
    "2GiB": 2 << 30,
    "2gib": 2 << 30,
    "1.5GB": 1_500_000_000,
    "0.1GB": 100_000_000,
    "0.5GiB": 1 << 29,
    "1.00001k": 1000,
    "1T": 10**12,
    "1024TiB": MAX_SIZE_BYTES,
}
BAD_SIZES = [
    "",
    "Auto",
    "auto ",
    "0",
    "0.9",
    "0GiB",
    "0.0001k",
    "-1GiB",
    "+1GiB",
    "1e9",
    "1,5GB",
    "1.GB",
    ".5GB",
    "1  GB",
]
BAD_SIZES += [
    " 1GB",
    "1GB ",
    "1GB\n",
    "GiB",
    "1PiB",
    "1Gb/s",
    "1GiBB",
    "1iB",
    "1_000",
    "0x10",
    "inf",
    "nan",
    "\u0661GB",
    "1K\u212a",
]
BAD_SIZES += ["1 B", "1025TiB", "9" * 17, "9" * 5000, "1." + "0" * 17 + "GB", "1GB" * 1000, "1\u212a"]

GOOD_SAMPLING: dict[str, list[Any]] = {
    "n": [1, 2, MAX_COMPLETIONS],
    "max_tokens": [1, 2, MAX_TOKENS],
    "min_tokens": [0, 1, 256],
    "temperature": [0, 0.0, -0.0, TINIEST, 1, 0.7, 100.0],
    "top_k": [0, 1, MAX_TOKENS],
    "top_p": [TINIEST, 0.5, 1, 1.0],
    "min_p": [0, 0.0, 0.05, 1.0],
    "repetition_penalty": [0.01, 1, 1.1, 100.0],
    "presence_penalty": [-100.0, -2, 0, 2.0, 100],
    "frequency_penalty": [-100.0, -2, 0, 2.0, 100],
    "logit_bias": [
        None,
        {},
        {0: 1},
        {5: -100.0, 2: 100},
        [(3, 0.5), (1, -0.0)],
        {MAX_TOKENS: 1.0},
        dict.fromkeys(range(MAX_BIASES), 1.0),
    ],
    "stop": [(), [], "\n", ("a",), ["a", "b"], "x" * 1024, "é" * 512, "\ud800", ["a"] * MAX_STOP_STRINGS],
    "stop_token_ids": [(), [], (0,), [1, 2, 2], (MAX_TOKENS,)],
    "seed": [None, 0, 1, MAX_SEED],
    "logprobs": [None, 0, 20],
    "ignore_eos": [True, False],
    "echo": [True, False],
    "speculate": [None, "ngram"],
}
BAD_SAMPLING: dict[str, list[Any]] = {
    "n": [0, -1, MAX_COMPLETIONS + 1, Integer(-1), *NOT_INTEGERS],
    "max_tokens": [0, -1, Integer(0), *NOT_INTEGERS],
    "min_tokens": [-1, 257, *NOT_INTEGERS],
    "temperature": [-0.001, -1, 100.5, *NOT_NUMBERS],
    "top_k": [-1, *NOT_INTEGERS],
    "top_p": [0, 0.0, -0.5, 1.0001, 2, *NOT_NUMBERS],
    "min_p": [-0.5, 1.0001, *NOT_NUMBERS],
    "repetition_penalty": [0, 0.0, -1.0, 100.5, *NOT_NUMBERS],
    "presence_penalty": [-100.5, 100.5, *NOT_NUMBERS],
    "frequency_penalty": [-100.5, 100.5, *NOT_NUMBERS],
    "logit_bias": [
        3,
        "12",
        [1],
        [(1, 2, 3)],
        [(1, 1.0), (1, 2.0)],
        {"1": 1.0},
        {-1: 1.0},
        {True: 1.0},
        {1.0: 1.0},
        {MAX_TOKENS + 1: 1.0},
        {10**100: 1.0},
        {1: 100.5},
        {1: -100.5},
        *({1: value} for value in NOT_NUMBERS),
        dict.fromkeys(range(MAX_BIASES + 1), 1.0),
    ],
    "stop": [None, 1, "", [""], ("a", ""), "x" * 1025, "é" * 513, ["a"] * (MAX_STOP_STRINGS + 1), [b"a"], {"a"}, [1]],
    "stop_token_ids": [None, 3, "12", [-1], [True], [1.0], ["1"], [2**31], [10**100], {1}],
    "seed": [-1, True, 1.0, "1", MAX_SEED + 1, 10**100, NAN],
    "logprobs": [-1, 21, True, 1.0, "1", 10**100],
    "ignore_eos": [None, 0, 1, "yes", np.int8(1), np.array([True])],
    "echo": [None, 0, 1, "yes"],
    "speculate": [
        np.array(["ngram", "a"]),
        "",
        "NGRAM",
        "draft",
        False,
        True,
        0,
        3,
        b"ngram",
        ["ngram"],
        {"ngram"},
        UNPRINTABLE,
    ],
}
GOOD_ENGINE: dict[str, list[Any]] = {
    "activations": ["int8", "int16"],
    "weights": [None, "q8", "q4"],
    "kv_dtype": ["f16", "f32", "int8", "k=int8,v=f16", "k=f16,v=f32"],
    "context": [None, 2, 4096, MAX_TOKENS],
    "threads": [None, 1, 256],
    "token_budget": [1, 512, 1 << 20],
    "mixed_budget": [1, 512, 1 << 20],
    "kv_memory": ["auto", 1, 1 << 30, MAX_SIZE_BYTES],
    "prefix_cache": [True, False],
    "max_running": [1, 64, 4096],
    "max_waiting": [1, 1024, 1 << 20],
    "packed_cache": [None, "folder", "/a/folder of mine"],
    "store": [None, "folder", "/a/folder of mine"],
    "store_quota": [1, 2_000_000_000, MAX_SIZE_BYTES],
    "store_policy": ["end", "reuse"],
    "store_key": [None, "file"],
    "backend": ["native", "reference"],
}
BAD_ENGINE: dict[str, list[Any]] = {
    "activations": ["", "int4", "INT8", None, 8, b"int8", ["int8"]],
    "weights": ["", "q4_0", "Q8", 8, ["q8"], True],
    "kv_dtype": ["", "q8", "fp16", None, 16, ["f16"], "k=f16", "k=f16,v=q8", "k=f16,v=f16,", "v=f16,k=f16"],
    "context": [-1, 0, 1, *NOT_INTEGERS[1:]],
    "threads": [-1, 0, 257, *NOT_INTEGERS[1:]],
    "token_budget": [-1, 0, (1 << 20) + 1, *NOT_INTEGERS],
    "mixed_budget": [-1, 0, (1 << 20) + 1, *NOT_INTEGERS],
    "kv_memory": [
        *BAD_SIZES,
        -1,
        0,
        MAX_SIZE_BYTES + 1,
        Integer(0),
        None,
        True,
        1.0,
        2e9,
        b"1GB",
        ["1GB"],
        NAN,
        UNPRINTABLE,
    ],
    "prefix_cache": [None, 0, 1, "yes"],
    "max_running": [-1, 0, 4097, *NOT_INTEGERS],
    "max_waiting": [-1, 0, (1 << 20) + 1, *NOT_INTEGERS],
    "packed_cache": ["", 1, True, b"folder", ["folder"], "a\0b"],
    "store": ["", 1, True, b"folder", ["folder"], "a\0b"],
    "store_quota": [*BAD_SIZES, 0, -1, None, "auto", MAX_SIZE_BYTES + 1],
    "store_policy": ["", "never", None, 1, ["end"]],
    "store_key": ["", 1, True, b"file", ["file"], "a\0b"],
    "backend": ["", "torch", "Native", None, 1, {"native"}],
}

Config = Callable[..., SamplingParams | EngineConfig]


Case = tuple[Config, str, Any]
"""A config, one of its fields, and a value for it."""


def cases(values: dict[type, dict[str, list[Any]]]) -> list[Case]:
    return [
        (config, field, value)
        for config, fields in values.items()
        for field, choices in fields.items()
        for value in choices
    ]


def name_of(case: Case) -> str:
    return f"{case[1]} {reprlib.repr(case[2])}" if case[2] is not UNPRINTABLE else f"{case[1]} unprintable"


@pytest.mark.parametrize(
    ("config", "good", "bad"), [(SamplingParams, GOOD_SAMPLING, BAD_SAMPLING), (EngineConfig, GOOD_ENGINE, BAD_ENGINE)]
)
def test_no_field_is_forgotten_here(
    config: type[SamplingParams | EngineConfig], good: dict[str, list[Any]], bad: dict[str, list[Any]]
) -> None:
    names = {field.name for field in dataclasses.fields(config)}
    assert names == good.keys() == bad.keys()


@looped("case", cases({SamplingParams: GOOD_SAMPLING, EngineConfig: GOOD_ENGINE}), name_of)
def test_values_up_to_the_edges_are_kept(case: Case) -> None:
    config, field, value = case
    kept = getattr(config(**{field: value}), field)
    if field == "stop":
        value = (value,) if isinstance(value, str) else tuple(value)
    if field == "stop_token_ids":
        value = tuple(value)
    if field == "logit_bias":
        value = tuple(sorted(dict(value or ()).items()))
    assert kept == value
    assert type(kept) is type(value)


@pytest.mark.parametrize(
    ("field", "value", "plain"),
    [
        *((name, np.int64(3), 3) for name in ("n", "max_tokens", "min_tokens", "top_k", "seed", "logprobs")),
        ("max_tokens", np.uint8(200), 200),
        ("max_tokens", np.array(7), 7),
        ("max_tokens", Integer(3), 3),
        *((name, np.float32(0.5), 0.5) for name in ("temperature", "top_p", "min_p", "repetition_penalty")),
        *((name, np.float16(-0.5), -0.5) for name in ("presence_penalty", "frequency_penalty")),
        ("temperature", np.int8(1), 1),
        ("temperature", Fraction(1, 4), 0.25),
        *((name, np.bool_(True), True) for name in ("ignore_eos", "echo")),
        ("stop_token_ids", [np.int32(5), 6], (5, 6)),
        ("stop", np.str_("a"), ("a",)),
        ("stop", [np.str_("a")], ("a",)),
        ("speculate", np.str_("ngram"), "ngram"),
    ],
)
def test_scalars_of_numpy_are_kept_as_python_s_own(field: str, value: Any, plain: Any) -> None:
    kept = getattr(SamplingParams(**{field: value}), field)
    assert kept == plain
    assert type(kept) is type(plain)
    for item in kept if isinstance(kept, tuple) else ():
        assert type(item) in (int, str)


@pytest.mark.parametrize(
    ("field", "value", "plain"),
    [
        *(
            (name, np.int64(9), 9)
            for name in ("context", "threads", "token_budget", "mixed_budget", "max_running", "max_waiting")
        ),
        ("kv_memory", np.int64(1 << 30), 1 << 30),
        ("kv_memory", np.str_("1KiB"), 1024),
        ("kv_memory", np.str_("auto"), "auto"),
        ("prefix_cache", np.bool_(False), False),
        ("kv_dtype", "k=int8,v=int8", "int8"),
        ("kv_dtype", np.str_("int8"), "int8"),
        ("weights", np.str_("q8"), "q8"),
    ],
)
def test_an_engine_takes_scalars_of_numpy_too(field: str, value: Any, plain: Any) -> None:
    kept = getattr(EngineConfig(**{field: value}), field)
    assert kept == plain
    assert type(kept) is type(plain)


@looped("case", cases({SamplingParams: BAD_SAMPLING, EngineConfig: BAD_ENGINE}), name_of)
def test_other_values_are_refused_by_name(case: Case) -> None:
    config, field, value = case
    with pytest.raises(InvalidInput) as caught:
        config(**{field: value})
    error = caught.value
    assert isinstance(error, ValueError)
    assert isinstance(error, KvikError)
    assert field.removesuffix("s") in error.message
    assert error.hint
    assert str(error) == f"{error.message}\nhint: {error.hint}"
    assert "\n" not in error.message
    assert len(str(error)) < 400, "a huge value is not printed whole"


@pytest.mark.parametrize(("text", "num_bytes"), SIZES.items())
def test_sizes_are_read_once(text: str, num_bytes: int) -> None:
    config = EngineConfig(kv_memory=text)
    assert config.kv_memory == parse_bytes("--size", text) == num_bytes
    assert type(config.kv_memory) is int
    assert dataclasses.replace(config, threads=1).kv_memory == num_bytes


def test_a_bad_size_is_called_by_the_name_it_was_given() -> None:
    with pytest.raises(InvalidInput, match="--size is '2 apples'") as caught:
        parse_bytes("--size", "2 apples")
    assert "2GiB" in caught.value.hint


def test_min_tokens_above_max_tokens_names_both() -> None:
    with pytest.raises(InvalidInput, match=r"min_tokens is 9, more than max_tokens, 8"):
        SamplingParams(max_tokens=8, min_tokens=9)
    assert SamplingParams(max_tokens=9, min_tokens=9).min_tokens == 9


@pytest.mark.parametrize("n", [1, 2, 3, 127, MAX_COMPLETIONS])
def test_all_completions_together_are_bounded(n: int) -> None:
    max_tokens = (2**31 - 1) // n
    assert SamplingParams(n=n, max_tokens=max_tokens).max_tokens == max_tokens
    if n > 1:
        with pytest.raises(InvalidInput, match=rf"n is {n} and max_tokens {max_tokens + 1:,}: together") as caught:
            SamplingParams(n=n, max_tokens=max_tokens + 1)
        assert f"{max_tokens:,}" in caught.value.hint


def test_a_wrong_way_to_speculate_is_told_the_right_ones() -> None:
    with pytest.raises(InvalidInput, match="speculate is 'beam'") as caught:
        SamplingParams(speculate="beam")  # type: ignore[arg-type]
    assert caught.value.hint == "give one of ngram or None"


@pytest.mark.parametrize("config", [SamplingParams, EngineConfig])
def test_configs_are_frozen_and_named(config: Config) -> None:
    made = config()
    name = dataclasses.fields(made)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, name, 1)
    with pytest.raises(TypeError):
        config(1)
    with pytest.raises(TypeError):
        config(no_such_field=1)
    assert made == config()
    assert hash(made) == hash(config())


def test_the_caller_s_list_is_not_kept() -> None:
    stop = ["a"]
    params = SamplingParams(stop=stop)
    stop.append("")
    assert params.stop == ("a",)


def test_replace_checks_again() -> None:
    with pytest.raises(InvalidInput, match="top_p"):
        dataclasses.replace(SamplingParams(), top_p=0.0)


def test_biases_are_pairs_that_do_not_change_with_what_was_given() -> None:
    given = {7: 1, 3: -2.5}
    params = SamplingParams(logit_bias=given)
    given[9] = 1
    assert params.biases == ((3, -2.5), (7, 1.0))
    assert dataclasses.replace(params, seed=1).biases == params.biases
    assert hash(params) == hash(SamplingParams(logit_bias={3: -2.5, 7: 1.0}))
