"""What a plan says: caches of every kind of layers, what-ifs, what fits, speed, advice."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvik import InvalidInput, plan
from kvik.config import KVDType
from kvik.planner.advice import advice
from kvik.planner.catalogue import find_device, find_model, model_entries, shape_of
from kvik.planner.fit import MAX_USERS, Load, fit
from kvik.planner.memory import kv_memory
from kvik.planner.plan import plan_shape
from kvik.planner.shape import ModelShape
from kvik.planner.speed import attention_operations
from kvik.planner.weights import FORMATS
from looped import looped
from tiers import examples

SHAPES = [shape_of(entry) for entry in model_entries().values()]
shapes = looped("shape", SHAPES, lambda shape: shape.name)


def shape_named(name: str) -> ModelShape:
    shape = find_model(name)
    assert shape is not None
    return shape


# Keys and values.


def test_llama_3_70b_is_a_third_of_a_megabyte_a_token_not_two_and_a_half() -> None:
    planned = plan("llama-3-70b", context=4096, users=10)
    assert planned.kv.token_bytes == 327_680
    assert planned.kv.sequence_bytes == 1_342_177_280
    assert planned.kv.num_bytes == 13_421_772_800
    quoted = next(sentence for sentence in advice(planned) if "often-quoted" in sentence)
    assert "2.5 MB per token (10.5 GB at 4k) is the 64-head figure" in quoted
    assert "8 KV heads make it 0.33 MB (1.34 GB)" in quoted


@shapes
def test_every_what_if_of_every_model(shape: ModelShape) -> None:
    context = min(4096, shape.max_context)
    planned = plan_shape(shape, context=context, users=3)
    by_name = {row.attention: row for row in planned.what_ifs}
    assert [row.attention for row in planned.what_ifs if row.as_it_is] == [shape.attention]
    assert by_name[shape.attention].num_bytes == planned.kv.num_bytes
    assert {"MHA", "MQA"} <= set(by_name) or shape.num_heads == 1
    assert ("GQA-8" in by_name) == (shape.num_heads % 8 == 0 and shape.num_heads > 8)
    assert by_name["MHA"].of_mha == 1
    for row in planned.what_ifs:
        if not row.as_it_is:
            assert row.token_bytes * shape.num_heads == by_name["MHA"].token_bytes * row.num_kv_heads
            assert row.of_mha == pytest.approx(row.num_kv_heads / shape.num_heads)


def test_a_window_bounds_what_is_kept() -> None:
    shape = shape_named("gemma-3-27b")
    for context in (100, 1024, 1025, 131_072):
        full, sliding = kv_memory(shape, "f16", context).layers
        assert (full.sequence_tokens, sliding.sequence_tokens) == (context, min(context, 1024))
    assert kv_memory(shape, "f16", 1023).token_bytes_at_context == 507_904
    assert kv_memory(shape, "f16", 1024).token_bytes_at_context == 81_920  # the ten full layers alone
    assert shape.token_bytes("f16") == 507_904


def test_layers_without_keys_cost_nothing_per_token() -> None:
    kv = kv_memory(shape_named("qwen3-next-80b-a3b"), "f16", 4096)
    assert [(layer.kind, layer.num_layers, layer.token_bytes) for layer in kv.layers] == [
        ("full", 12, 24_576), ("state", 36, 0),
    ]  # fmt: skip


def test_a_latent_is_one_vector_and_one_rotary_key_for_all_heads() -> None:
    shape = shape_named("deepseek-v3")
    assert shape.token_bytes("f16") == 61 * (512 + 64) * 2
    assert shape.token_bytes("int8") == 61 * (512 + 64 + 2 * 4)


@shapes
@looped("dtype", get_args(KVDType))
def test_a_cache_grows_with_context_and_users_and_shrinks_by_what_is_shared(shape: ModelShape, dtype: KVDType) -> None:
    contexts = [1, 33, 500, 1000, shape.max_context]
    one, *others = [kv_memory(shape, dtype, context, users=5).num_bytes for context in contexts]
    assert all(before <= after for before, after in zip([one, *others], others, strict=False))
    alone = kv_memory(shape, dtype, 1000)
    unshared = kv_memory(shape, dtype, 1000, users=5).num_bytes
    shared = kv_memory(shape, dtype, 1000, users=5, prefix=999).num_bytes
    assert alone.num_bytes < unshared
    assert (shared < unshared) == any(layer.sequence_tokens == 1000 for layer in alone.layers if layer.token_bytes)


# What fits.


@settings(max_examples=examples(150))
@given(
    shape=st.sampled_from(SHAPES),
    users=st.integers(1, 64),
    gigabytes=st.floats(0.01, 2000),
    dtype=st.sampled_from(get_args(KVDType)),
    form=st.sampled_from(sorted(FORMATS)),
    data=st.data(),
)
def test_what_is_said_to_fit_fits_and_no_more_does(
    shape: ModelShape, users: int, gigabytes: float, dtype: KVDType, form: str, data: st.DataObject
) -> None:
    context = data.draw(st.integers(1, shape.max_context))
    load = Load(shape, context, users, 0, dtype, FORMATS[form])
    found = fit(load, "somewhere", int(gigabytes * 1e9))

    def fits(**changes: int) -> bool:
        return dataclasses.replace(load, **changes).num_bytes <= found.memory_bytes  # type: ignore[arg-type]

    assert found.fits == fits()
    assert found.most_users is not None
    assert found.largest_context is not None
    assert found.spare_bytes == found.memory_bytes - load.num_bytes
    if found.most_users:
        assert fits(users=found.most_users)
    assert found.most_users == MAX_USERS or not fits(users=found.most_users + 1)
    if found.largest_context:
        assert fits(context=found.largest_context)
    assert found.largest_context == shape.max_context or not fits(context=found.largest_context + 1)
    assert found.fits == (found.most_users >= users) == (found.largest_context >= context)
    if found.fits:
        assert found.change is None
    elif found.change is not None:
        assert found.change.num_bytes <= found.memory_bytes


def test_the_cheapest_change_comes_first() -> None:
    """Smaller keys and values where that is enough, then smaller weights, then fewer users, then more devices."""
    many = plan("llama-3-8b", context=8192, users=70, device="h100").fit
    assert many is not None
    assert many.change is not None
    assert many.change.what == "int8 keys and values"
    large = plan("llama-3-70b", context=4096, users=1, device="h100").fit
    assert large is not None
    assert large.change is not None
    assert large.change.what == "q8_0 weights"
    crowd = plan("llama-3-8b", context=8192, users=5000, kv="int8", weights="q4_0", device="h100").fit
    assert crowd is not None
    assert crowd.change is not None
    assert crowd.change.what == f"{crowd.most_users:,} users at once, the others wait"
    huge = plan("kimi-k2", context=4096, kv="int8", weights="q4_0", device="h100").fit
    assert huge is not None
    assert huge.change is not None
    assert huge.change.what.endswith("such devices, each with a part")
    number = int(huge.change.what.split()[0])
    assert number == -(-huge.needed_bytes // 80 // 10**9)


# Speed.


def test_a_roofline_by_hand() -> None:
    """One user of Llama 3 8B in bf16 behind 8,192 tokens on an H100: weights and cache through the bandwidth."""
    planned = plan("llama-3-8b", context=8192, device="h100")
    assert planned.speeds is not None
    decode, prefill = planned.speeds
    read = 2 * 8_030_000_000 + 8192 * 131_072
    assert decode.read_bytes == read
    assert decode.seconds == pytest.approx(read / (3.35e12 * 0.7))
    assert decode.binds == "bandwidth"
    attention = 4 * 32 * 32 * 128
    assert decode.operations == 2 * 8_030_000_000 + attention * 8192
    assert prefill.operations == 8192 * 2 * 8_030_000_000 + attention * 8192 * 8193 // 2
    assert prefill.seconds == pytest.approx(prefill.operations / (989e12 * 0.5))
    assert prefill.binds == "arithmetic"


def test_a_crowd_makes_arithmetic_bind_and_shares_the_weights() -> None:
    one, crowd = (plan("llama-2-7b", context=64, users=users, device="a100").speeds for users in (1, 4000))
    assert one is not None
    assert crowd is not None
    assert (one[0].binds, crowd[0].binds) == ("bandwidth", "arithmetic")
    assert crowd[0].tokens_per_s > 100 * one[0].tokens_per_s  # type: ignore[operator]


def test_a_shared_prefix_is_read_once() -> None:
    own, shared = (plan("llama-3-8b", context=8192, users=8, prefix=prefix, device="h100") for prefix in (0, 8000))
    assert own.speeds is not None
    assert shared.speeds is not None
    assert own.speeds[0].read_bytes - shared.speeds[0].read_bytes == 7 * 8000 * 131_072


def test_a_mixture_reads_the_experts_that_were_chosen() -> None:
    one, many = (plan("mixtral-8x7b", context=32, users=users, device="h200").speeds for users in (1, 64))
    assert one is not None
    assert many is not None
    assert one[0].read_bytes == 2 * 12_900_000_000 + 32 * 131_072
    assert many[0].read_bytes == 2 * 46_700_000_000 + 64 * 32 * 131_072, "at most all of them"
    assert plan("gpt-oss-20b", context=32, device="h200").speeds is None
    assert any("active parameters" in sentence for sentence in advice(plan("gpt-oss-20b", context=32)))


def test_a_device_without_arithmetic_tells_of_decode_alone() -> None:
    planned = plan("llama-3-8b", context=512, device="m1-max")
    assert planned.speeds is not None
    decode, prefill = planned.speeds
    assert decode.seconds == pytest.approx(decode.read_bytes / (409.6e9 * 0.7))
    assert (decode.binds, prefill.seconds, prefill.tokens_per_s) == (None, None, None)


def test_attention_of_a_window_stops_growing() -> None:
    shape = shape_named("mistral-7b-v0.1")
    assert attention_operations(shape, 4096) == attention_operations(shape, 20_000) == 4 * 32 * 32 * 128 * 4096


def test_a_device_of_unknown_memory_has_no_fit() -> None:
    assert find_device("graviton3").memory_bytes is None
    assert plan("llama-3-8b", context=512, device="graviton3").fit is None
    assert plan("llama-3-8b", context=512, device="graviton3", memory="64GiB").fit is not None


# Advice.


@shapes
def test_advice_has_no_sentence_without_a_figure(shape: ModelShape) -> None:
    for planned in (
        plan_shape(shape, context=1024, users=4, prefix=512, device="h100"),
        plan_shape(shape, context=shape.max_context, kv="int8"),
    ):
        sentences = advice(planned)
        doubts = ("A mixture of experts", "The number of weights")
        assert all(any(letter.isdigit() for letter in one) for one in sentences if not one.startswith(doubts))
        assert all(one.endswith(".") for one in sentences)
        for topic in ("KV type:", "Prefix:", "context"):
            assert any(topic in one for one in sentences), topic


def test_what_a_shared_prefix_saves() -> None:
    planned = plan("llama-3-8b", context=8192, users=20, prefix=1000)
    assert planned.unshared_kv_bytes - planned.kv.num_bytes == pytest.approx(
        19 * 31 * 32 * 131_072, abs=8 * 32 * 131_072
    )
    (sentence,) = [one for one in advice(planned) if one.startswith("Prefix:")]
    assert "31 whole blocks" in sentence
    assert f"{19 * 31 * 32:,} prompt tokens not computed" in sentence


def test_where_the_next_doubling_goes() -> None:
    (sentence,) = [one for one in advice(plan("gemma-3-27b", context=32_768)) if "Doubling" in one]
    assert "another 2.68 GB in 10 full layers" in sentence
    assert "52 window 1,024 layers need nothing" in sentence


def test_replicas_are_plans_of_their_users_added_up() -> None:
    options: dict[str, Any] = {"context": 4096, "prefix": 512, "device": "h100"}
    whole = plan("llama-3-8b", users=10, replicas=4, **options)
    parts = [plan("llama-3-8b", users=users, **options) for users in (3, 3, 2, 2)]
    replicas = whole.replicas
    assert replicas is not None
    assert (replicas.num_replicas, replicas.users_each, replicas.each_bytes) == (4, 3, parts[0].needed_bytes)
    assert replicas.num_bytes == sum(part.needed_bytes for part in parts)
    assert replicas.prefix_copies_bytes == sum(part.kv.num_bytes for part in parts) - whole.kv.num_bytes
    decodes = [part.speeds[0] for part in parts if part.speeds]
    seconds = [phase.seconds for phase in decodes if phase.seconds]
    assert len(seconds) == 4
    # In turns on one machine: all users have had a token when each replica has had its step.
    assert replicas.same_machine_tokens_per_s == pytest.approx(10 / sum(seconds))
    assert replicas.own_machines_tokens_per_s == pytest.approx(sum(phase.tokens_per_s or 0 for phase in decodes))
    assert plan("llama-3-8b", users=10, **options).replicas is None
    unknown = plan("llama-3-8b", users=10, context=4096, replicas=2).replicas  # on no device
    assert unknown is not None
    assert (unknown.same_machine_tokens_per_s, unknown.own_machines_tokens_per_s) == (None, None)


# What is refused.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"context": 0}, "context is 0"),
        ({"context": -5}, "context is -5"),
        ({"context": 8193}, "context is 8,193; llama-3-8b was made for 8,192 tokens"),
        ({"context": 2.5}, "context is 2.5"),
        ({"context": True}, "context is True"),
        ({"context": np.bool_(True)}, "context is np.True_"),
        ({"context": np.int64(8193)}, "context is 8,193; llama-3-8b was made for 8,192 tokens"),
        ({"context": 10**400}, "context is 1000"),
        ({"users": 0}, "users is 0"),
        ({"users": 1 << 30}, "users is 1,073,741,824"),
        ({"prefix": -1}, "prefix is -1"),
        ({"context": 100, "prefix": 100}, "prefix is 100; a sequence has 100 tokens"),
        ({"replicas": 0}, "replicas is 0"),
        ({"users": 4, "replicas": 5}, "replicas is 5; 4 users are divided among them"),
        ({"users": 1000, "replicas": 65}, "replicas is 65"),
        ({"kv": "f8"}, "kv is 'f8'"),
        ({"weights": "q99"}, "weights is 'q99'"),
        ({"memory": -1}, "memory is -1"),
        ({"memory": "lots"}, "memory is 'lots'"),
        ({"memory": "9999999TB"}, "memory is '9999999TB'"),
        ({"device": "gtx"}, "gtx is no device"),
    ],
)
def test_a_bad_value_is_refused_by_name(options: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        plan("llama-3-8b", **options)  # type: ignore[arg-type]
    assert said in caught.value.message
    assert caught.value.hint
    assert len(str(caught.value)) < 600


def test_scalars_of_numpy_are_numbers() -> None:
    planned = plan("llama-3-8b", context=np.int64(4096), users=np.uint8(2), prefix=np.int16(32))  # type: ignore[arg-type]
    assert planned == plan("llama-3-8b", context=4096, users=2, prefix=32)
    assert [type(one) for one in (planned.context, planned.users, planned.prefix)] == [int, int, int]
