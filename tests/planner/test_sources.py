"""Where shapes come from: config.json files that nobody vouches for, headers, folders, Hub ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_files import tiny_llama
from kvik.errors import DownloadError, ModelError, ModelNotFound
from kvik.hub import hugging_face as hub
from kvik.hub import store
from kvik.planner.catalogue import find_model
from kvik.planner.config_json import read_config
from kvik.planner.shape import ModelShape
from kvik.planner.sources import find_shape

LLAMA_3_8B: dict[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "vocab_size": 128256,
    "tie_word_embeddings": False,
}  # fmt: skip


def config(folder: Path, without: str = "", **changes: object) -> Path:
    path = folder / "config.json"
    fields = {key: value for key, value in (LLAMA_3_8B | changes).items() if key != without}
    path.write_text(json.dumps(fields), encoding="utf-8")
    return path


def same_memory(one: ModelShape, name: str) -> bool:
    other = find_model(name)
    assert other is not None
    return (one.groups, one.num_heads, one.head_dim) == (other.groups, other.num_heads, other.head_dim)


def without_places(shape: ModelShape) -> list[tuple[object, ...]]:
    """The groups without the indices of their layers, which the catalogue does not know."""
    return sorted((one.kind, one.num_layers, one.num_kv_heads, one.vector_bytes, one.window) for one in shape.groups)


def test_a_config_gives_the_catalogues_shape(tmp_path: Path) -> None:
    shape = find_shape(str(config(tmp_path)))
    assert same_memory(shape, "llama-3-8b")
    assert shape.num_params == pytest.approx(8.03e9, rel=1e-3)
    assert shape.num_params is not None
    assert shape.active_params == shape.num_params - 128_256 * 4096  # rows of the embedding are looked up
    assert find_shape(str(tmp_path)).groups == shape.groups


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral-7b-v0.1", {"model_type": "mistral", "sliding_window": 4096}),
        ("mistral-7b-v0.3", {"model_type": "mistral", "sliding_window": None}),
        (
            "qwen2.5-7b",
            {
                "num_hidden_layers": 28, "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4,
                "sliding_window": 131072, "use_sliding_window": False,
            },
        ),
        (
            "gemma-2-27b",
            {
                "model_type": "gemma2", "num_hidden_layers": 46, "hidden_size": 4608, "num_attention_heads": 32,
                "num_key_value_heads": 16, "head_dim": 128, "sliding_window": 4096,
            },
        ),
        (
            "gemma-3-27b",
            {
                "model_type": "gemma3", "text_config": {
                    "model_type": "gemma3_text", "num_hidden_layers": 62, "hidden_size": 5376,
                    "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "sliding_window": 1024,
                    "sliding_window_pattern": 6,
                },
            },
        ),
        (
            "falcon-7b",
            {
                "model_type": "falcon", "hidden_size": 4544, "num_attention_heads": 71, "multi_query": True,
                "num_key_value_heads": None,
            },
        ),
        (
            "deepseek-v3",
            {
                "model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168, "num_attention_heads": 128,
                "num_key_value_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
                "n_routed_experts": 256,
            },
        ),
        (
            "qwen3-next-80b-a3b",
            {
                "num_hidden_layers": 48, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 2,
                "head_dim": 256,
                "layer_types": ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(48)],
            },
        ),
    ],
)  # fmt: skip
def test_families_say_it_in_their_own_ways(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    shape = find_shape(str(config(tmp_path, **changes)))
    known = find_model(name)
    assert known is not None
    assert without_places(shape) == without_places(known)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (
        known.num_heads,
        known.num_kv_heads,
        known.head_dim,
    )


def test_gpt2_has_other_words(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    fields = {
        "model_type": "gpt2",
        "n_layer": 12,
        "n_embd": 768,
        "n_head": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
    }
    path.write_text(json.dumps(fields), encoding="utf-8")
    shape = find_shape(str(path))
    assert same_memory(shape, "gpt2")
    assert shape.num_params is None, "its weights are not counted by a rule made for others"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; it must be a whole number from 1 to 16,384"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers is a number"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'"),
        ({"hidden_size": 4096.0}, "hidden_size is 4096.0"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_key_value_heads": 33}, "num_key_value_heads is 33"),
        ({"num_key_value_heads": 5}, "32 query heads do not divide among 5 KV heads"),
        ({"num_key_value_heads": [8]}, "num_key_value_heads is [8]"),
        ({"num_attention_heads": 33, "num_key_value_heads": 11}, "does not divide among 33 heads"),
        ({"head_dim": -128}, "head_dim is -128"),
        ({"head_dim": 1 << 20}, "head_dim is 1048576"),
        ({"sliding_window": -1}, "sliding_window is -1"),
        ({"layer_types": ["full_attention"]}, "layer_types must be a list of 32 names"),
        ({"layer_types": ["magic"] * 32}, "layer_types has 'magic' in it"),
        ({"layer_types": [{}] * 32}, "layer_types has {} in it"),
        ({"layer_types": ["sliding_attention"] * 32}, "has no sliding_window"),
        ({"kv_lora_rank": 512}, "has no qk_rope_head_dim"),
        ({"max_position_embeddings": {}}, "max_position_embeddings is {}"),
        ({"vocab_size": None}, "has no vocab_size"),
    ],
)
def test_a_config_of_nonsense_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError) as caught:
        find_shape(str(config(tmp_path, **changes)))
    assert said in caught.value.message
    assert str(tmp_path) in caught.value.message
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b"7", b'{"num_hidden_layers": NaN}']
)
def test_what_is_no_config_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError):
        find_shape(str(tmp_path))


awkward = st.sampled_from(
    [
        None,
        True,
        False,
        0,
        -1,
        1,
        7,
        2**31,
        2**63,
        10**30,
        0.5,
        float("nan"),
        float("inf"),
        "",
        "8",
        [],
        [1],
        {},
        {"a": 1},
    ]
)


@given(
    changes=st.dictionaries(
        st.sampled_from([*LLAMA_3_8B, "head_dim", "sliding_window", "layer_types"]), awkward | st.integers()
    )
)
def test_any_config_gives_a_shape_or_a_model_error(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("config")
    try:
        shape = read_config(config(folder, **changes), "x")
    except ModelError as error:
        assert str(folder) in error.message  # noqa: PT017  # either outcome is right
    else:
        assert shape.token_bytes("f16") > 0
        assert shape.num_heads % shape.num_kv_heads == 0


def test_a_header_without_weights_in_memory(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "tiny.gguf", num_layers=3)
    for name in (str(path), str(tmp_path)):
        shape = find_shape(name)
        assert (shape.origin, shape.num_layers, shape.runs) == ("gguf", 3, True)


@pytest.mark.parametrize(
    ("name", "error", "hint"),
    [
        ("lama-3-8b", ModelNotFound, "did you mean llama-3-8b"),
        ("", ModelNotFound, "--list models"),
        ("./nothing.gguf", ModelNotFound, "give a .gguf file"),
        ("\0", ModelNotFound, "--list models"),
        ("x" * 5000, ModelNotFound, "--list models"),
        ("\x1b[2J", ModelNotFound, "--list models"),
    ],
)
def test_an_unknown_name_is_refused_with_near_ones(name: str, error: type[ModelError], hint: str) -> None:
    with pytest.raises(error) as caught:
        find_shape(name)
    assert hint in caught.value.hint
    assert len(caught.value.message) < 300
    assert caught.value.message.isprintable()


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no config\.json and no \.gguf file"):
        find_shape(str(tmp_path))


def test_smollm2_without_its_file_is_the_catalogues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVIK_HOME", str(tmp_path))
    assert not store.models_folder().exists()
    shape = find_shape("smollm2")
    assert (shape.origin, shape.name) == ("catalogue", "smollm2-135m")


def test_a_hub_id_reads_the_cached_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "config_file", lambda name: config(tmp_path))
    shape = find_shape("some/model")
    assert (shape.name, shape.origin, shape.num_layers) == ("some/model", "config.json", 32)


def test_an_unreachable_hub_names_what_the_catalogue_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: hub.HubName) -> Path:
        raise DownloadError(f"{name}: out of reach", hint="check the network")

    monkeypatch.setattr(hub, "config_file", fail)
    with pytest.raises(DownloadError) as caught:
        find_shape("meta-llama/Llama-3.1-8B")
    assert caught.value.hint == "check the network, or use what the catalogue knows: `kvik plan llama-3.1-8b`"


@pytest.mark.parametrize("name", [".", "./", "..", "../", "~", "~/"])
def test_a_folder_named_by_dots_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ModelNotFound, match=r"has no config\.json"):
        find_shape(name)
    config(Path(name).expanduser())
    assert same_memory(find_shape(name), "llama-3-8b")
