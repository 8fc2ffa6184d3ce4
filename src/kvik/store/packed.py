"""Files of packed weights: what stands around the weights, and the folder that they lie in; see docs/model-files.md."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from struct import Struct
from typing import Any

from kvik.store import disk
from kvik.store.base import Fault
from kvik.store.entry import BadEntry
from kvik.store.sweep import STALE_S

log = logging.getLogger(__name__)

MAGIC = b"KVIKPACK"
FILE_VERSION = 2
PAGE_BYTES = 4096
DATA_START = PAGE_BYTES
MAX_PACKED_HEADER_BYTES = 1 << 24
MAX_PACKED_MATRICES = 1 << 16
SUFFIX = ".packed"

_FIXED = Struct("<8sIIQQ")  # magic, version of the file, version of the packed layout, bytes of JSON, bytes of the file
_DIGEST_BYTES = 16
_BEGINNING_BYTES = _FIXED.size + _DIGEST_BYTES


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """One matrix of a file: what was packed, and a checksum for each region of the packed bytes."""

    name: str
    kind: str  # the GGUF type
    rows: int
    columns: int
    checksums: Sequence[int]


@dataclass(frozen=True, slots=True)
class PackedHeader:
    """What a file says of itself."""

    key: str  # names the weights that were packed, in hex
    model: str  # where they were read from, for people
    notes: Mapping[str, Any] | None  # what the loader wants to know again
    matrices: Sequence[PackedMatrix]  # in the order of their data


@dataclass(frozen=True, slots=True)
class PackedView:
    """A file as `kvik cache` shows it."""

    path: Path
    model: str  # nobody vouches for it
    layout_version: int
    num_bytes: int
    used_s: float


def name_of(key: str, layout_version: int) -> str:
    """The name of the file of such weights."""
    return f"{layout_version}-{key}{SUFFIX}"


def encode_header(header: PackedHeader, layout_version: int, data_bytes: int) -> tuple[bytes, bytes]:
    """What stands before and behind `data_bytes` of data, which begin at `DATA_START`.

    The matrices' checksums are known when all are written, so they stand behind.
    """
    matrices = [[each.name, each.kind, each.rows, each.columns, list(each.checksums)] for each in header.matrices]
    fields = {"key": header.key, "model": header.model, "notes": header.notes, "matrices": matrices}
    text = json.dumps(fields, separators=(",", ":")).encode()
    fixed = _FIXED.pack(MAGIC, FILE_VERSION, layout_version, len(text), DATA_START + data_bytes + len(text))
    return fixed + _digest(fixed, text), text


def read_header(file: int, layout_version: int) -> tuple[PackedHeader, int, int]:
    """A file's header, where its data ends and how long the file is. Raises `OSError`, `BadEntry`."""
    num_bytes = os.fstat(file).st_size
    fixed = os.pread(file, _BEGINNING_BYTES, 0)
    if len(fixed) < _BEGINNING_BYTES:
        raise BadEntry(Fault.SIZE)
    magic, version, of_layout, json_bytes, file_bytes = _FIXED.unpack_from(fixed)
    if magic != MAGIC:
        raise BadEntry(Fault.MAGIC)
    if (version, of_layout) != (FILE_VERSION, layout_version):
        raise BadEntry(Fault.VERSION)
    if file_bytes != num_bytes or json_bytes > MAX_PACKED_HEADER_BYTES or DATA_START + json_bytes > num_bytes:
        raise BadEntry(Fault.SIZE)
    data_end = num_bytes - json_bytes
    text = os.pread(file, json_bytes, data_end)
    if _digest(fixed[: _FIXED.size], text) != fixed[_FIXED.size :]:
        raise BadEntry(Fault.TAG)
    try:
        return _header(json.loads(text)), data_end, num_bytes
    except (ValueError, RecursionError):
        raise BadEntry(Fault.FIELDS) from None


def packed_files(folder: Path) -> list[PackedView]:
    """The files of a folder, of any version."""
    found = []
    for entry in disk.files_in(str(folder)):
        version = entry.name.partition("-")[0]
        if entry.name.startswith(disk.PARTIAL) or not entry.name.endswith(SUFFIX) or not _is_number(version):
            continue
        with suppress(FileNotFoundError):
            status = entry.stat(follow_symlinks=False)
            model = _model_in(entry.path, int(version))
            found.append(PackedView(Path(entry.path), model, int(version), status.st_size, status.st_mtime))
    return sorted(found, key=lambda view: view.path)


def sweep_packed(folder: Path, layout_version: int) -> None:
    """Remove files of older layouts, which nobody reads any more, and those that a killed process left."""
    for view in packed_files(folder):
        if view.layout_version < layout_version:
            log.info("%s: of an older kvik's layout, removed", view.path)
            disk.remove(str(view.path))
    for entry in disk.files_in(str(folder)):
        if entry.name.startswith(disk.PARTIAL):
            with suppress(FileNotFoundError):
                if entry.stat(follow_symlinks=False).st_mtime < time.time() - STALE_S:
                    disk.remove(entry.path)


def _model_in(path: str, layout_version: int) -> str:
    try:
        file = disk.open_regular(path)
    except (OSError, BadEntry):
        return "unknown"
    try:
        return read_header(file, layout_version)[0].model
    except (OSError, BadEntry):
        return "unknown"
    finally:
        os.close(file)


def _header(fields: Any) -> PackedHeader:
    """Raises `ValueError`: a digest is against accidents, anybody can make one."""
    if not isinstance(fields, dict) or fields.keys() != {"key", "model", "notes", "matrices"}:
        raise ValueError
    key, model, notes, matrices = (fields[name] for name in ("key", "model", "notes", "matrices"))
    if not (isinstance(key, str) and isinstance(model, str) and isinstance(matrices, list)):
        raise ValueError
    if not (notes is None or isinstance(notes, dict)) or len(matrices) > MAX_PACKED_MATRICES:
        raise ValueError
    return PackedHeader(key, model, notes, [_matrix(each) for each in matrices])


def _matrix(fields: Any) -> PackedMatrix:
    if not isinstance(fields, list) or len(fields) != 5:
        raise ValueError
    name, kind, rows, columns, checksums = fields
    if not (isinstance(name, str) and isinstance(kind, str) and isinstance(checksums, list)):
        raise ValueError
    if not all(type(number) is int for number in (rows, columns, *checksums)):
        raise ValueError
    return PackedMatrix(name, kind, rows, columns, checksums)


def _digest(fixed: bytes, text: bytes) -> bytes:
    return blake2b(fixed + text, digest_size=_DIGEST_BYTES).digest()


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10
