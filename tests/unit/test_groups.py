"""Groups of layers: what they remember in bytes, layers that share, and what the engine cannot keep, and why."""

from __future__ import annotations

import dataclasses

import pytest

from kvik.cache import GroupSpec, KVCacheSpec, PoolSize, VectorFormat
from kvik.errors import InvalidInput
from kvik.models.spec import DecoderSpec, LayerSpec
from kvik.ops.native import NativeOps
from kvik.ops.reference import ReferenceOps

pytestmark = pytest.mark.tiny

F16 = VectorFormat(64, "f16")


def test_a_vector_has_its_scale() -> None:
    assert [VectorFormat(64, dtype).num_bytes for dtype in ("f32", "f16", "int8")] == [256, 128, 68]
    assert VectorFormat(576, "int8", num_rotary=64).num_bytes == 512 + 4 + 64 + 4
    assert VectorFormat(576, "int8", num_rotary=64).is_storable
    assert not VectorFormat(576, "int8").is_storable


def test_keys_and_values_of_different_types() -> None:
    spec = KVCacheSpec.uniform(3, 2, 64, "k=int8,v=f16")
    assert spec.dtype == "k=int8,v=f16"
    assert spec.token_bytes == 3 * 2 * (68 + 128)
    assert spec.with_dtype("k=f16,v=f16").dtype == "f16"
    with pytest.raises(InvalidInput, match="a head_dim up to 512, the model has 640"):
        KVCacheSpec.uniform(1, 1, 640, "k=f16,v=int8")


def test_layers_with_other_heads_are_a_group_of_their_own() -> None:
    """Gemma 4: wide heads where all tokens are seen, narrow ones in windows; the last layers read what others keep."""
    layers = [LayerSpec(None, window=512), LayerSpec(None, head_dim=512, num_kv_heads=1)] * 2
    layers += [LayerSpec(None, window=512, kv_from=2), LayerSpec(None, head_dim=512, num_kv_heads=1, kv_from=3)]
    spec = decoder(*layers).kv_spec("f16")
    full, windowed = spec.groups
    assert (full.kind, full.layers, full.key.num_items, full.num_kv_heads) == ("full", (1, 3), 512, 1)
    assert (windowed.kind, windowed.layers, windowed.window, windowed.key.num_items) == ("window", (0, 2), 512, 256)
    assert spec.layer_groups == (1, 0, 1, 0, 1, 0)
    assert spec.token_bytes == 2 * 2 * 512 * 2 + 2 * 2 * 2 * 256 * 2
    assert spec.num_layers == 6


def test_a_layer_that_shares_has_the_arrays_of_the_other() -> None:
    spec = decoder(LayerSpec(None), LayerSpec(None), LayerSpec(None, kv_from=0)).kv_spec("f16")
    for ops in (NativeOps(threads=1), ReferenceOps()):
        first, second, third = ops.allocate_kv(spec, 8)
        assert third is first
        assert second is not first


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        (
            [LayerSpec(None), LayerSpec(None, window=8, kv_from=0)],
            "layer 1 reads keys and values of layer 0, which has",
        ),
        ([LayerSpec(None, kv_from=1), LayerSpec(None)], "layer 0 reads keys and values of layer 1, which comes later"),
        ([LayerSpec(None, num_kv_heads=3)], "4 query heads do not divide among 3 KV heads"),
        ([LayerSpec(None, head_dim=12)], "head_dim 12 is no multiple of 8"),
    ],
)
def test_what_no_decoder_can_share(layers: list[LayerSpec], problem: str) -> None:
    found = decoder(*layers).problem()
    assert found is not None
    assert problem in found


def test_a_chunk_begins_anew_and_a_window_slides() -> None:
    window = GroupSpec("window", (0,), 1, F16, F16, window=8)
    chunk = dataclasses.replace(window, kind="chunk")
    assert [window.first_token(count) for count in (0, 7, 8, 9, 20)] == [0, 0, 1, 2, 13]
    assert [chunk.first_token(count) for count in (0, 7, 8, 9, 20)] == [0, 0, 8, 8, 16]
    assert [window.num_tokens(count) for count in (5, 50)] == [5, 8]


def test_latents_and_states_are_described() -> None:
    latent = GroupSpec("latent", (0, 1), 1, VectorFormat(576, "f16", 64), VectorFormat(512, "f16"))
    state = GroupSpec("state", (2,), 16, VectorFormat(128 * 128, "f32"))
    spec = KVCacheSpec((latent, state))
    assert spec.token_bytes == 2 * 576 * 2, "a latent's value is a part of its key"
    assert spec.held_bytes(33) == 2 * 32 * 2 * 576 * 2 + 16 * 128 * 128 * 4
    assert spec.pool_size_for(8, num_sequences=3, step_tokens=1) == PoolSize(8, (8, 3))
    assert spec.pool_bytes(PoolSize(8, (8, 3))) == 8 * 32 * 2 * 576 * 2 + 3 * 16 * 128 * 128 * 4
    assert (latent.name, state.name) == ("latent", "state")


@pytest.mark.parametrize(
    ("group", "problem"),
    [
        (GroupSpec("latent", (0,), 1, VectorFormat(72, "f16", 8), VectorFormat(64, "f16")), "latent attention"),
        (GroupSpec("state", (0,), 1, VectorFormat(64, "f32")), "recurrent states"),
        (GroupSpec("chunk", (0,), 1, F16, F16, window=8), "attention in chunks"),
        (GroupSpec("full", (0,), 1, F16, VectorFormat(32, "f16")), "keys have 64 dimensions, values 32"),
        (GroupSpec("full", (0,), 1, VectorFormat(4, "f16"), VectorFormat(4, "f16")), "head_dim 4 is no multiple of 8"),
    ],
)
def test_what_the_engine_cannot_keep_it_refuses_with_the_reason(group: GroupSpec, problem: str) -> None:
    spec = KVCacheSpec((group,))
    assert spec.problem is not None
    assert problem in spec.problem
    for ops in (NativeOps(threads=1), ReferenceOps()):
        with pytest.raises(InvalidInput, match="cannot keep"):
            ops.allocate_kv(spec, 8)


def decoder(*layers: LayerSpec) -> DecoderSpec:
    return DecoderSpec(
        architecture="llama", hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=256,
        vocab_size=50, context_length=400, layers=layers, tied_head=True, norm_eps=1e-5,
    )  # fmt: skip
