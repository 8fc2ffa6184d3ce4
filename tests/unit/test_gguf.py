"""The GGUF reader against the `gguf` library's own, and against files that are wrong in every way that is checked."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGMLQuantizationType,
    GGUFReader,
    GGUFValueType,
)
from gguf.gguf_writer import GGUFValue
from gguf.quants import dequantize as library_dequantize

from gguf_files import READ_ONLY_TYPES, WEIGHT_TYPES, random_blocks, tiny_llama, write_gguf
from kvik.errors import ModelError, ModelNotFound
from kvik.files.gguf import GGUFFile, dequantize, parse_gguf, read_gguf
from kvik.files.gguf_types import BLOCKS, DEFAULT_ALIGNMENT, MAGIC, TensorType, ValueType
from kvik.files.texts import Texts

F32, Q4_0, Q4_K = GGMLQuantizationType.F32, GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_K
UINT8, UINT32, UINT64 = GGUFValueType.UINT8, GGUFValueType.UINT32, GGUFValueType.UINT64
BOOL, STRING, ARRAY = GGUFValueType.BOOL, GGUFValueType.STRING, GGUFValueType.ARRAY

EVERY_KIND_OF_VALUE: dict[str, Any] = {
    "general.architecture": "llama",
    "empty": GGUFValue("", STRING),
    "text": "blåbærgrød 🫐\nand a second line",
    "uint8": GGUFValue(255, UINT8),
    "int8": GGUFValue(-128, GGUFValueType.INT8),
    "uint16": GGUFValue(65535, GGUFValueType.UINT16),
    "int16": GGUFValue(-32768, GGUFValueType.INT16),
    "uint32": GGUFValue(2**32 - 1, UINT32),
    "int32": GGUFValue(-(2**31), GGUFValueType.INT32),
    "uint64": GGUFValue(2**64 - 1, UINT64),
    "int64": GGUFValue(-(2**63), GGUFValueType.INT64),
    "float32": GGUFValue(0.1, GGUFValueType.FLOAT32),
    "float64": GGUFValue(0.1, GGUFValueType.FLOAT64),
    "yes": True,
    "no": False,
    "bools": [True, False, True],
    "texts": ["a", "", "Ġthe", "🫐"],
    "bytes": GGUFValue([1, 2, 255], ARRAY, UINT8),
    "ints": [1, -2, 3],
    "long_ints": GGUFValue([2**64 - 1, 0], ARRAY, UINT64),
    "floats": [0.5, -1e30, 0.1],
    "doubles": GGUFValue([0.1, 1e300], ARRAY, GGUFValueType.FLOAT64),
}


def assert_equals_library(path: Path) -> GGUFFile:
    """Prove that our walk of the file finds what GGUFReader finds: each value and its type, each tensor's bytes."""
    ours, theirs = read_gguf(path), GGUFReader(path)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert dict(ours.metadata) == fields
    for key, value in fields.items():
        found: Any = ours.metadata[key]
        found = list(found) if isinstance(found, Texts) else found
        assert type(found) is type(value), key
        if isinstance(value, list):
            assert isinstance(found, list)
            assert [type(item) for item in value] == [type(item) for item in found], key
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.name == tensor.name
        assert int(mine.type) == int(tensor.tensor_type)
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert (mine.num_bytes, mine.offset) == (tensor.n_bytes, tensor.data_offset)
        assert mine.data.shape == (mine.num_bytes,)
        assert np.array_equal(mine.data, tensor.data.reshape(-1).view(np.uint8))
    return ours


def test_the_tables_of_types_are_the_librarys() -> None:
    assert {kind.name: int(kind) for kind in ValueType} == {kind.name: int(kind) for kind in GGUFValueType}
    assert {kind.name: int(kind) for kind in TensorType} == {kind.name: int(kind) for kind in GGML_QUANT_SIZES}
    assert {int(kind): sizes for kind, sizes in BLOCKS.items()} == GGML_QUANT_SIZES
    assert (int.from_bytes(MAGIC, "little"), DEFAULT_ALIGNMENT) == (GGUF_MAGIC, GGUF_DEFAULT_ALIGNMENT)


def every_type_of_tensor() -> dict[str, tuple[npt.NDArray[Any], GGMLQuantizationType]]:
    rng = np.random.default_rng(5)
    raw = {
        kind: rng.integers(0, 256, (3, num_bytes), dtype=np.uint8) for kind, (_, num_bytes) in GGML_QUANT_SIZES.items()
    }
    known = {kind: random_blocks(kind, 3, 512, rng) for kind in WEIGHT_TYPES}
    return {kind.name: (blocks, kind) for kind, blocks in (raw | known).items()}


class TestAgainstTheLibrary:
    @pytest.mark.parametrize("alignment", [8, 32, 4096])
    def test_every_kind_of_value_and_tensor(self, tmp_path: Path, alignment: int) -> None:
        metadata = EVERY_KIND_OF_VALUE | {"general.alignment": alignment}
        file = assert_equals_library(write_gguf(tmp_path / "all.gguf", metadata, every_type_of_tensor()))
        assert all(tensor.offset % alignment == 0 for tensor in file.tensors.values())

    def test_version_2(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "v2.gguf", EVERY_KIND_OF_VALUE, every_type_of_tensor())
        content = bytearray(path.read_bytes())
        content[4:8] = struct.pack("<I", 2)
        path.write_bytes(content)
        assert_equals_library(path)

    def test_dimensions(self, tmp_path: Path) -> None:
        shapes = [(7,), (1, 7), (7, 1), (2, 3, 7), (2, 1, 3, 7)]
        tensors = {str(shape): (np.ones(shape, dtype=np.float32), F32) for shape in shapes}
        file = assert_equals_library(write_gguf(tmp_path / "shapes.gguf", {}, tensors))
        assert [tensor.shape for tensor in file.tensors.values()] == shapes

    def test_tiny_llama(self, tmp_path: Path) -> None:
        assert_equals_library(tiny_llama(tmp_path / "tiny.gguf", tied=False))

    def test_default_model(self, default_model_path: Path) -> None:
        """The real thing; its header is to be read in less than 0.15 s."""
        assert_equals_library(default_model_path)
        seconds = []
        for _ in range(3):
            start = time.process_time()
            read_gguf(default_model_path)
            seconds.append(time.process_time() - start)
        assert min(seconds) < 0.15

    @pytest.mark.parametrize("kind", WEIGHT_TYPES, ids=lambda kind: kind.name)
    def test_dequantize(self, tmp_path: Path, kind: GGMLQuantizationType) -> None:
        blocks = random_blocks(kind, 6, 512, np.random.default_rng(7))
        path = write_gguf(tmp_path / "one.gguf", {}, {"w": (blocks.reshape(2, 3, -1), kind)})
        values = dequantize(read_gguf(path).tensors["w"])
        assert values.shape == (2, 3, 512)
        assert values.dtype == np.float32
        assert np.isfinite(values).all()
        assert np.array_equal(values.reshape(6, 512), library_dequantize(blocks, kind))

    def test_dequantize_refuses_integers(self, tmp_path: Path) -> None:
        raw = np.zeros((2, 8), dtype=np.uint8)
        path = write_gguf(tmp_path / "ints.gguf", {}, {"ids": (raw, GGMLQuantizationType.I32)})
        with pytest.raises(ModelError, match="'ids' is I32"):
            dequantize(read_gguf(path).tensors["ids"])


# Hostile files are put together here by hand, since a writer would refuse.


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return u64(len(raw)) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + u32(kind) + value


def array(kind: int, count: int, items: bytes) -> bytes:
    return u32(kind) + u64(count) + items


def entry(
    name: str | bytes = "w",
    dimensions: tuple[int, ...] = (8,),
    kind: int = F32,
    offset: int = 0,
    n_dims: int | None = None,
) -> bytes:
    n_dims = len(dimensions) if n_dims is None else n_dims
    return text(name) + u32(n_dims) + b"".join(map(u64, dimensions)) + u32(kind) + u64(offset)


def build(
    pairs: tuple[bytes, ...] = (),
    entries: tuple[bytes, ...] = (),
    *,
    data: bytes = bytes(256),
    num_keys: int | None = None,
    num_tensors: int | None = None,
    version: int = 3,
) -> bytes:
    num_keys = len(pairs) if num_keys is None else num_keys
    num_tensors = len(entries) if num_tensors is None else num_tensors
    header = b"GGUF" + u32(version) + u64(num_tensors) + u64(num_keys) + b"".join(pairs) + b"".join(entries)
    return header + bytes(-len(header) % 32) + data


def parse(content: bytes) -> GGUFFile:
    return parse_gguf(np.frombuffer(content, dtype=np.uint8), Path("models/some.gguf"))


def assert_refused(content: bytes, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        parse(content)
    error = caught.value
    assert error.message.startswith("models/some.gguf: ")
    assert "\n" not in error.message
    assert len(error.message) < 400
    assert len(error.hint) > 10
    for word in words:
        assert word in str(error)


NOT_GGUF = {
    "git_lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        ("Git LFS pointer", "git lfs pull"),
    ),
    "zip": (b"PK\x03\x04" + bytes(60), ("zip archive", "PyTorch", "save_pretrained")),
    "pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9", ("Python pickle", "never unpickles")),
    "gzip": (b"\x1f\x8b\x08" + bytes(20), ("gzip", "unpack")),
    "ggml": (b"tjgg" + bytes(40), ("GGML file", "convert")),
    "html": (b"\n <!DOCTYPE html><html>", ("web page", "download the file itself")),
    "json": (b'{"error": "Invalid credentials"}', ("JSON", ".gguf")),
    "safetensors": (u64(60) + b'{"w": {}}' + bytes(60), ("safetensors", "give the folder")),
    "text": (b"hello", ("b'hell'", "not b'GGUF'")),
    "short": (b"GG", ("b'GG'", "not b'GGUF'")),
    "empty": (b"", ("the file is empty", "download")),
}

BAD_START = {
    "version_0": (build(version=0), ("version 0", "2 and 3")),
    "version_1": (build(version=1), ("version 1", "2 and 3", "convert")),
    "version_4": (build(version=4), ("version 4", "2 and 3")),
    "big_endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), ("big-endian", "convert")),
    "tensor_count": (build(num_tensors=9), ("9 tensors", "room for 8")),
    "tensor_count_2^64": (build(num_tensors=2**64 - 1), ("18,446,744,073,709,551,615 tensors", "room for")),
    "kv_count": (build(num_keys=21), ("21 metadata keys", "room for 20")),
    "kv_count_2^64": (build(num_keys=2**64 - 1), ("18,446,744,073,709,551,615 metadata keys",)),
    "too_many_tensors": (build(num_tensors=2**18 + 1, data=bytes(2**24)), ("262,145 tensors", "up to 262,144")),
    "too_many_keys": (build(num_keys=2**16 + 1, data=bytes(2**20)), ("65,537 metadata keys", "up to 65,536")),
}

BAD_METADATA = {
    "key_length": (build((u64(2**63) + b"k",)), ("metadata key 0", "9,223,372,036,854,775,808 bytes", "up to 65,535")),
    "key_too_long": (build((pair("k" * 65_536, UINT8, b"\0"),)), ("65,536 bytes", "up to 65,535")),
    "key_not_utf8": (build((pair(b"k\xff", UINT8, b"\0"),)), ("metadata key 0", "not UTF-8", "at 33")),
    "key_twice": (build((pair("a.b", UINT8, b"\0"), pair("a.b", UINT8, b"\0"))), ("'a.b'", "twice")),
    "value_type": (build((pair("a.b", 13, b"\0"),)), ("'a.b'", "unknown value type 13")),
    "bool_2": (build((pair("a.b", BOOL, b"\2"),)), ("'a.b'", "bool of 2", "0 or 1")),
    "bools": (build((pair("a.b", ARRAY, array(BOOL, 3, b"\1\0\xff")),)), ("'a.b'", "bool of 255", "0 or 1")),
    "string_length": (build((pair("a.b", STRING, u64(10_000) + b"x"),)), ("truncated", "'a.b'", "10,000 bytes")),
    "string_2^64": (build((pair("a.b", STRING, u64(2**64 - 1)),)), ("'a.b'", "18,446,744,073,709,551,615 bytes")),
    "string_not_utf8": (build((pair("a.b", STRING, text(b"ok\xe2\x82")),)), ("'a.b'", "not UTF-8")),
    "item_type": (build((pair("a.b", ARRAY, array(99, 1, b"\0")),)), ("'a.b'", "unknown value type 99")),
    "nested": (build((pair("a.b", ARRAY, array(ARRAY, 1, array(UINT8, 1, b"\0"))),)), ("array of arrays", "convert")),
    "array_count": (
        build((pair("a.b", ARRAY, array(UINT32, 2**62, b"")),)),
        ("'a.b'", "4,611,686,018,427,387,904 items"),
    ),
    "texts_count": (build((pair("a.b", ARRAY, array(STRING, 1000, b"")),)), ("1,000 items in metadata key 'a.b'",)),
    "texts_length": (
        build((pair("a.b", ARRAY, array(STRING, 2, text("x") + u64(999))),)),
        ("truncated", "item 1 of metadata key 'a.b'", "999 bytes"),
    ),
    "texts_not_utf8": (
        build((pair("a.b", ARRAY, array(STRING, 2, text("x") + text(b"\xc0"))),)),
        ("item 1 of metadata key 'a.b'", "not UTF-8"),
    ),
    "too_many_items": (
        build((pair("a.b", ARRAY, array(UINT8, 2**22 + 1, bytes(2**22 + 1))),)),
        ("'a.b'", "4,194,305", "up to 4,194,304"),
    ),
    "too_many_items_in_all": (
        build(tuple(pair(key, ARRAY, array(UINT8, 2**21 + 1, bytes(2**21 + 1))) for key in ("a", "b"))),
        ("'b'", "2,097,153", "up to 2,097,151"),
    ),
    "long_key_is_cut": (build((pair("k" * 60_000 + "\n", 99, b""),)), ("kkk...kkk", "unknown value type 99")),
    "alignment_type": (build((pair("general.alignment", UINT64, u64(32)),)), ("general.alignment", "UINT64", "UINT32")),
    "alignment_0": (build((pair("general.alignment", UINT32, u32(0)),)), ("general.alignment is 0", "power of two")),
    "alignment_1": (build((pair("general.alignment", UINT32, u32(1)),)), ("general.alignment is 1", "from 8")),
    "alignment_24": (build((pair("general.alignment", UINT32, u32(24)),)), ("general.alignment is 24", "power of two")),
    "alignment_2^21": (build((pair("general.alignment", UINT32, u32(2**21)),)), ("2,097,152", "to 1,048,576")),
}

BAD_TENSORS = {
    "name_too_long": (build((), (entry("n" * 1025),)), ("the name of tensor 0", "1,025 bytes", "up to 1,024")),
    "name_not_utf8": (build((), (entry(b"\xff"),)), ("the name of tensor 0", "not UTF-8")),
    "name_twice": (build((), (entry("w"), entry("w", offset=32))), ("tensor 'w'", "twice")),
    "n_dims_0": (build((), (entry(dimensions=()),)), ("'w'", "0 dimensions", "1 to 4")),
    "n_dims_5": (build((), (entry(dimensions=(1, 1, 1, 1, 1)),)), ("'w'", "5 dimensions", "1 to 4")),
    "n_dims_2^32": (build((), (entry(n_dims=2**32 - 1),)), ("'w'", "4,294,967,295 dimensions")),
    "dimension_0": (build((), (entry(dimensions=(8, 0)),)), ("'w'", "[8, 0]", "from 1")),
    "dimension_2^63": (build((), (entry(dimensions=(2**63,)),)), ("'w'", "[9223372036854775808]", "2^63 - 1")),
    "product_wraps": (build((), (entry(dimensions=(2**32, 2**32)),)), ("truncated", "'w'", "73,786,976,294,838,206,")),
    "product_wraps_to_8": (build((), (entry(dimensions=(2**61, 2**61, 2**61, 8)),)), ("truncated", "'w'")),
    "type_unknown": (build((), (entry(kind=4),)), ("'w'", "unknown type 4", "gguf")),
    "type_2^32": (build((), (entry(kind=2**32 - 1),)), ("'w'", "unknown type 4,294,967,295")),
    "columns": (build((), (entry(dimensions=(48, 2), kind=Q4_0),)), ("'w'", "48 columns", "multiple of 32")),
    "columns_k": (build((), (entry(dimensions=(128, 2), kind=Q4_K),)), ("'w'", "128 columns", "multiple of 256")),
    "offset_misaligned": (build((), (entry(offset=8),)), ("'w'", "offset 8", "multiple of 32")),
    "offset_for_its_alignment": (
        build((pair("general.alignment", UINT32, u32(64)),), (entry(offset=32),)),
        ("'w'", "offset 32", "multiple of 64"),
    ),
    "offset_2^64": (build((), (entry(offset=2**64 - 32),)), ("truncated", "'w'", "18,446,744,073,709,551,")),
    "data_missing": (build((), (entry(),), data=bytes(31)), ("truncated", "needs 96 bytes", "has 95", "download")),
    "no_data": (build((), (entry(),), data=b""), ("truncated", "needs 96 bytes", "the file has 64")),
    "overlap": (build((), (entry("a", (16,)), entry("b", offset=32))), ("'b' begins at 128", "overlaps", "'a'", "160")),
    "overlap_in_any_order": (build((), (entry("a", offset=32), entry("b", (16,)))), ("'a' begins", "overlaps", "'b'")),
    "same_place": (build((), (entry("a"), entry("b"))), ("overlaps",)),
}


class TestRefusals:
    @pytest.mark.parametrize(("content", "words"), NOT_GGUF.values(), ids=NOT_GGUF.keys())
    def test_not_gguf(self, content: bytes, words: tuple[str, ...]) -> None:
        assert_refused(content, *words)

    @pytest.mark.parametrize(("content", "words"), BAD_START.values(), ids=BAD_START.keys())
    def test_start(self, content: bytes, words: tuple[str, ...]) -> None:
        assert_refused(content, *words)

    @pytest.mark.parametrize(("content", "words"), BAD_METADATA.values(), ids=BAD_METADATA.keys())
    def test_metadata(self, content: bytes, words: tuple[str, ...]) -> None:
        assert_refused(content, *words)

    @pytest.mark.parametrize(("content", "words"), BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
    def test_tensors(self, content: bytes, words: tuple[str, ...]) -> None:
        assert_refused(content, *words)

    def test_the_parts_are_good_in_themselves(self) -> None:
        pairs = (
            pair("a.b", ARRAY, array(STRING, 2, text("x") + text(""))),
            pair("empty", ARRAY, array(STRING, 0, b"")),
        )
        file = parse(build(pairs, (entry("a", (16,)), entry("b", offset=64))))
        assert file.metadata == {"a.b": ["x", ""], "empty": []}
        assert [(tensor.name, tensor.num_bytes) for tensor in file.tensors.values()] == [("a", 64), ("b", 32)]

    @pytest.mark.parametrize("window_bytes", [1, 7, 8, 9, 40, 1 << 20])
    def test_texts_are_read_in_windows(self, window_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kvik.files.gguf._WINDOW_BYTES", window_bytes)
        texts = ["", "Ġthe", "x" * 100, "a\nb", "🫐", ""]
        encoded = b"".join(text(value.encode()) for value in texts)
        file = parse(build((pair("a.b", ARRAY, array(STRING, len(texts), encoded)), pair("next", UINT8, b"\x07"))))
        assert file.metadata == {"a.b": texts, "next": 7}

    def test_header_larger_than_is_believed(self) -> None:
        content = np.zeros(2**27 + 2**20, dtype=np.uint8)  # never touched, so never in memory
        start = build((pair("a.b", STRING, u64(2**27)),), data=b"")
        content[: len(start)] = np.frombuffer(start, dtype=np.uint8)
        with pytest.raises(ModelError, match="header is too large"):
            parse_gguf(content, Path("huge.gguf"))

    def test_truncated_at_every_byte(self, tmp_path: Path) -> None:
        tensors = {"a": (np.ones((2, 32), dtype=np.float32), F32), "b": (np.ones((2, 32), dtype=np.float32), Q4_0)}
        content = write_gguf(tmp_path / "whole.gguf", EVERY_KIND_OF_VALUE, tensors).read_bytes()
        tensor = parse(content).tensors["b"]
        for length in range(tensor.offset + tensor.num_bytes):
            assert_refused(content[:length])
        parse(content[: tensor.offset + tensor.num_bytes])  # the padding after the last tensor may be missing


UINT16 = GGUFValueType.UINT16


def split_metadata(number: int, count: int) -> tuple[bytes, ...]:
    """As llama.cpp's gguf-split writes it; the number counts from 0."""
    pairs = {"split.no": number, "split.count": count}
    return tuple(pair(key, UINT16, struct.pack("<H", value)) for key, value in pairs.items())


class TestSplitFiles:
    @pytest.mark.parametrize("name", ["big-00002-of-00003.gguf", "renamed.gguf"])
    @pytest.mark.parametrize("entries", [(), (entry(kind=4),)])
    def test_a_part_is_called_one_before_its_tensors_are_looked_at(self, name: str, entries: tuple[bytes, ...]) -> None:
        content = np.frombuffer(build(split_metadata(1, 3), entries), dtype=np.uint8)
        with pytest.raises(ModelError) as caught:
            parse_gguf(content, Path("models") / name)
        assert caught.value.message == f"models/{name}: part 2 of 3 of a model that was split; kvik reads whole files"
        assert "llama-gguf-split --merge" in caught.value.hint
        first = "big-00001-of-00003.gguf" if name.startswith("big") else "FIRST-PART.gguf"
        assert first in caught.value.hint

    @pytest.mark.parametrize("name", ["big-00001-of-00003.gguf", "BIG-00001-of-00003.GGUF"])
    def test_a_part_without_the_metadata_is_known_by_its_name(self, name: str) -> None:
        with pytest.raises(ModelError, match="part 1 of 3 of a model that was split") as caught:
            parse_gguf(np.frombuffer(build(), dtype=np.uint8), Path(name))
        assert "rename" in caught.value.hint

    @pytest.mark.parametrize("count", [0, 1])
    @pytest.mark.parametrize("name", ["big-00001-of-00003.gguf", "big-00001-of-00001.gguf", "whole.gguf"])
    def test_a_merged_file_is_whole_whatever_it_is_called(self, name: str, count: int) -> None:
        parse_gguf(np.frombuffer(build(split_metadata(0, count)), dtype=np.uint8), Path(name))

    def test_one_part_of_one_is_whole(self) -> None:
        parse_gguf(np.frombuffer(build(), dtype=np.uint8), Path("big-00001-of-00001.gguf"))


class TestFiles:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ModelNotFound, match=r"none\.gguf does not exist"):
            read_gguf(tmp_path / "none.gguf")

    def test_directory(self, tmp_path: Path) -> None:
        with pytest.raises(ModelNotFound, match="is not a file"):
            read_gguf(tmp_path)

    def test_path_that_no_system_has(self) -> None:
        with pytest.raises(ModelNotFound):
            read_gguf(Path("a\0b.gguf"))
        with pytest.raises(ModelError):
            read_gguf(Path("a" * 10_000))

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
    def test_pipe_does_not_block(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.gguf")
        with pytest.raises(ModelNotFound, match="is not a file"):
            read_gguf(tmp_path / "pipe.gguf")

    def test_empty(self, tmp_path: Path) -> None:
        (tmp_path / "empty.gguf").touch()
        with pytest.raises(ModelError, match="the file is empty"):
            read_gguf(tmp_path / "empty.gguf")

    def test_not_permitted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_gguf(tmp_path / "secret.gguf", {}, {})

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", refuse)  # chmod does not stop root
        with pytest.raises(ModelError, match="Permission denied") as caught:
            read_gguf(path)
        assert "permissions" in caught.value.hint

    def test_data_is_a_read_only_view(self, tmp_path: Path) -> None:
        file = read_gguf(tiny_llama(tmp_path / "tiny.gguf"))
        for tensor in file.tensors.values():
            assert not tensor.data.flags.writeable
            assert not tensor.data.flags.owndata
            with pytest.raises(ValueError, match="read-only"):
                tensor.data[0] = 0

    def test_beyond_4_gib(self, tmp_path: Path) -> None:
        """Offsets and sizes are of 64 bits, and nothing of the data is read: a sparse file of 5 GiB takes no time."""
        content = build((), (entry("a", (2**30,)), entry("b", (2**28,), offset=2**32)), data=b"")
        path = tmp_path / "sparse.gguf"
        path.write_bytes(content)
        os.truncate(path, len(content) + 5 * 2**30)
        file = read_gguf(path)
        assert file.tensors["b"].offset == len(content) + 2**32
        assert file.tensors["b"].data[-1] == 0
        os.truncate(path, len(content) + 5 * 2**30 - 1)
        with pytest.raises(ModelError, match=r"truncated: needs 5,368,709,\d+ bytes"):
            read_gguf(path)


class TestGetters:
    @pytest.fixture
    def file(self, tmp_path: Path) -> GGUFFile:
        values = {"nan": float("nan"), "infinities": [1.0, float("inf")], "long": "x" * 10_000}
        return read_gguf(write_gguf(tmp_path / "getters.gguf", EVERY_KIND_OF_VALUE | values, {}))

    def test_values(self, file: GGUFFile) -> None:
        assert file.get_int("uint8", minimum=0, maximum=255) == 255
        assert file.get_int("int64") == -(2**63)
        assert file.get_float("float64", minimum=0.0, maximum=1.0) == 0.1
        assert file.get_str("general.architecture") == "llama"
        assert file.get_bool("yes") is True
        assert file.get_list("ints", int) == [1, -2, 3]
        assert file.get_float("uint8") == 255.0
        assert file.get_list("texts", str, length=4) == ["a", "", "Ġthe", "🫐"]
        assert file.get_list("bools", bool) == [True, False, True]
        assert file.get_list("doubles", float) == [0.1, 1e300]

    def test_defaults(self, file: GGUFFile) -> None:
        assert file.get_int("none", 0, minimum=1) == 0
        assert file.get_float("none", float("inf"), maximum=1.0) == float("inf")
        assert file.get_str("none", "") == ""
        assert file.get_bool("none", False) is False
        assert file.get_list("none", int, [], length=3) == []
        assert file.get_int("uint8", 3) == 255

    def test_metadata_cannot_be_changed(self, file: GGUFFile) -> None:
        with pytest.raises(TypeError):
            file.metadata["uint8"] = 1  # type: ignore[index]
        with pytest.raises(TypeError):
            file.tensors["w"] = None  # type: ignore[index]

    @pytest.mark.parametrize(
        ("call", "words"),
        [
            (lambda file: file.get_int("none"), ["no key 'none'"]),
            (lambda file: file.get_list("none", str), ["no key 'none'"]),
            (lambda file: file.get_int("yes"), ["'yes'", "the bool True", "type int"]),
            (lambda file: file.get_bool("uint8"), ["'uint8'", "the int 255", "type bool"]),
            (lambda file: file.get_float("yes"), ["'yes'", "the bool True", "type float"]),
            (lambda file: file.get_int("float32"), ["'float32'", "type int"]),
            (lambda file: file.get_str("ints"), ["'ints'", "the list [1, -2, 3]", "type str"]),
            (lambda file: file.get_int("text", 4), ["'text'", "the str 'blåbærgrød 🫐\\n", "type int"]),
            (lambda file: file.get_int("long"), ["xxx...xxx"]),
            (lambda file: file.get_int("uint8", minimum=1, maximum=254), ["255", "from 1 up to 254"]),
            (lambda file: file.get_int("int8", minimum=0), ["-128", "from 0"]),
            (lambda file: file.get_float("float64", maximum=0.05), ["0.1", "up to 0.05"]),
            (lambda file: file.get_float("nan", minimum=0.0), ["'nan'", "the float nan", "finite"]),
            (lambda file: file.get_list("infinities", float), ["inf", "finite"]),
            (lambda file: file.get_list("uint8", int), ["the int 255", "type list"]),
            (lambda file: file.get_list("ints", str), ["[1, -2, 3]", "list of str"]),
            (lambda file: file.get_list("bools", int), ["[True, False, True]", "list of int"]),
            (lambda file: file.get_list("ints", int, length=4), ["4 items", "it has 3"]),
        ],
    )
    def test_refusals(self, file: GGUFFile, call: Any, words: list[str]) -> None:
        with pytest.raises(ModelError) as caught:
            call(file)
        assert caught.value.message.startswith(f"{file.path}: ")
        assert caught.value.hint
        for word in words:
            assert word in caught.value.message


class TestTheHelper:
    """What other tests rely on in tests/gguf_files.py."""

    def test_tiny_llama_repeats(self, tmp_path: Path) -> None:
        first, again = tiny_llama(tmp_path / "a.gguf", seed=1), tiny_llama(tmp_path / "b.gguf", seed=1)
        other = tiny_llama(tmp_path / "c.gguf", seed=2)
        assert first.read_bytes() == again.read_bytes() != other.read_bytes()

    @pytest.mark.parametrize("vocab_size", [260, 320, 1500])
    def test_vocabulary(self, tmp_path: Path, vocab_size: int) -> None:
        file = read_gguf(tiny_llama(tmp_path / "tiny.gguf", vocab_size=vocab_size))
        tokens = file.get_list("tokenizer.ggml.tokens", str, length=vocab_size)
        assert len(set(tokens)) == len(file.get_list("tokenizer.ggml.token_type", int)) == vocab_size
        assert all({first, second, first + second} <= set(tokens) for first, second in merges_of(file))

    def test_too_small_a_vocabulary(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="too few"):
            tiny_llama(tmp_path / "tiny.gguf", vocab_size=259)

    def test_weight_types(self, tmp_path: Path) -> None:
        types = {"attn_q": Q4_K, "blk.1.attn_q.weight": F32, "output": Q4_0}
        file = read_gguf(tiny_llama(tmp_path / "tiny.gguf", head_dim=64, tied=False, weight_type=types))
        found = {
            name: int(file.tensors[name].type)
            for name in ("blk.0.attn_q.weight", "blk.1.attn_q.weight", "output.weight")
        }
        assert list(found.values()) == [Q4_K, F32, Q4_0]
        assert file.tensors["token_embd.weight"].type == TensorType.Q8_0
        assert file.tensors["blk.0.attn_norm.weight"].type == TensorType.F32

    def test_odd_sizes(self, tmp_path: Path) -> None:
        path = tiny_llama(tmp_path / "odd.gguf", hidden_size=50, head_dim=6, intermediate_size=77, weight_type=F32)
        file = read_gguf(path)
        assert file.tensors["blk.0.ffn_down.weight"].shape == (50, 77)
        assert file.get_int("llama.attention.key_length") == 6

    @pytest.mark.parametrize("kind", WEIGHT_TYPES, ids=lambda kind: kind.name)
    def test_random_blocks(self, kind: GGMLQuantizationType) -> None:
        values = library_dequantize(random_blocks(kind, 16, 512, np.random.default_rng(3), std=0.1), kind)
        assert np.isfinite(values).all()
        assert np.sqrt(np.mean(np.square(values))) == pytest.approx(0.1, rel=0.05)

    def test_types_that_the_library_cannot_write(self) -> None:
        names = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
        assert [kind.name for kind in READ_ONLY_TYPES] == names


def merges_of(file: GGUFFile) -> list[list[str]]:
    return [merge.split(" ") for merge in file.get_list("tokenizer.ggml.merges", str)]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="this system does not tell what is resident")
def test_pages_of_a_tensor_can_be_dropped_and_come_back(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "tiny.gguf", hidden_size=512, vocab_size=2048)
    file = read_gguf(path)
    tensor = file.tensors["token_embd.weight"]

    def resident_bytes() -> int:
        total, inside = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if "-" in line.split()[0]:
                inside = line.endswith(str(path))
            elif inside and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
        return total

    wanted = tensor.data.sum(dtype=np.int64)
    before = resident_bytes()
    file.drop_pages(tensor)
    assert resident_bytes() <= before - tensor.num_bytes + 2 * os.sysconf("SC_PAGE_SIZE")
    assert tensor.data.sum(dtype=np.int64) == wanted


def test_a_list_of_one_value_is_taken_for_it(tmp_path: Path) -> None:
    """As converters write a number for each layer where all are alike."""
    file = read_gguf(write_gguf(tmp_path / "m.gguf", {"same": [4, 4, 4], "other": [4, 4, 5]}, {}))
    assert (file.get_int("same"), file.get_float("same"), file.get_list("same", int)) == (4, 4.0, [4, 4, 4])
    with pytest.raises(ModelError, match="other"):
        file.get_int("other")
