"""Packed weights kept in files, so that the next start maps them instead of packing again; see docs/model-files.md."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

from kvik.config import WeightFormat
from kvik.errors import InvalidInput
from kvik.files.mapped import ASK_BYTES
from kvik.hub.progress import Progress, silent
from kvik.models.numerics import NUMERICS_VERSION, weight_files
from kvik.models.quantize import Quantization, noted_quantization
from kvik.models.weights import FileSource, Kinds, wanted_together
from kvik.ops.base import Ops, Weight
from kvik.ops.native import PACKED_ALIGNMENT, PACKED_VERSION, NativeOps, packed_data
from kvik.store import disk
from kvik.store.base import Fault
from kvik.store.entry import BadEntry
from kvik.store.fingerprints import are_settled, fingerprint_of, remembered_fingerprint, states_of
from kvik.store.packed import (
    DATA_START,
    PAGE_BYTES,
    PackedHeader,
    PackedMatrix,
    encode_header,
    name_of,
    read_header,
    sweep_packed,
)
from kvik.units import amount

log = logging.getLogger(__name__)

PIECE_BYTES = 16 << 20  # written between two looks at what the user wants
AHEAD_BYTES = 64 << 20  # that the system is asked for before they are checked


class PackedCache:
    """The packed weights of one model in a folder; make it before the model's files are opened.

    Raises `InvalidInput` for a folder of others, or a backend that does not pack.
    """

    def __init__(
        self, folder: Path, model: Path, ops: Ops, weights: WeightFormat | None, progress: Progress = silent
    ) -> None:
        if not isinstance(ops, NativeOps):
            raise InvalidInput(
                f"packed_cache keeps what the native backend packs; the backend is {ops.name!r}",
                hint="leave one of them out",
            )
        disk.make_private(folder)
        self.folder = folder
        self.model = model
        self.ops = ops
        self.weights = weights
        self.quantization: Quantization | None = None  # what quantising did to the weights that were read
        self._progress = progress
        self._files = weight_files(model)
        self._states: list[str] | None = None
        self._is_settled = False
        with suppress(OSError):  # the loader says what is wrong with the model's files
            self._states, self._is_settled = states_of(self._files), are_settled(self._files)

    def read(self, kinds: Kinds, *, on_demand: bool = False) -> dict[str, Weight] | None:
        """The matrices of these kinds, every byte checked; None where they must be packed, which the log explains.

        A file that is not as it should be is removed. With `on_demand`, memory will not hold all of them at once.
        """
        fingerprint = None if self._states is None else remembered_fingerprint(self._states, self.folder)
        if fingerprint is None:
            log.info("%s: packed for the first time, or its files have changed since", self.model)
            return None
        path = self._path_of(fingerprint)
        try:
            file = disk.open_regular(str(path))
        except FileNotFoundError:
            log.info("%s: no packed weights in %s", self.model, self.folder)
            return None
        except (OSError, BadEntry) as error:
            self._refuse(path, error)
            return None
        try:
            found = self._checked(file, path, kinds, on_demand=on_demand)
        except (OSError, BadEntry) as error:
            self._refuse(path, error)
            return None
        finally:
            os.close(file)
        if not self._is_unchanged():
            log.warning("%s: changed while it was loaded, so its packed weights are not used", self.model)
            return None
        with suppress(OSError):
            os.utime(path)  # when it was last wanted
        return found

    def write(self, matrices: Mapping[str, Weight], source: FileSource) -> None:
        """Keep the matrices of a source for the next time; where that cannot be done, the log says why."""
        if not self._is_settled:
            log.warning("%s: was changed a moment ago, so its packed weights are not kept yet", self.model)
            return
        try:
            hashing = f"{self.model.name}: hashing"
            fingerprint = fingerprint_of(self._files, self.folder, self._advance(hashing, self._model_bytes()))
            if not self._is_unchanged():
                log.warning("%s: changed while it was loaded, so its packed weights are not kept", self.model)
                return
            path = self._path_of(fingerprint)
            sweep_packed(self.folder, PACKED_VERSION)
            if not os.path.lexists(path):
                self._write(path, matrices, source, fingerprint)
        except OSError as error:
            log.warning("%s: packed weights are not kept: %s", self.folder, error.strerror)

    # Reading.

    def _checked(self, file: int, path: Path, kinds: Kinds, *, on_demand: bool) -> dict[str, Weight]:
        header, data_end, num_bytes = read_header(file, PACKED_VERSION)
        if name_of(header.key, PACKED_VERSION) != path.name:
            raise BadEntry(Fault.SCOPE)
        places = _places(self.ops, kinds, DATA_START)
        if [(each.name, each.kind, each.rows, each.columns) for each in header.matrices] != [
            (place.name, *kinds[place.name]) for place in places
        ]:
            raise BadEntry(Fault.FIELDS)
        quantization = noted_quantization(header.notes)
        if (quantization is None) != (self.weights is None):
            raise BadEntry(Fault.FIELDS)
        if places[-1].end != data_end:
            raise BadEntry(Fault.SIZE)
        mapped = self.ops.map_packed(file, num_bytes, on_demand=on_demand)
        advance = self._advance(f"{self.model.name}: checking packed weights", data_end - DATA_START)
        asked = DATA_START
        found: dict[str, Weight] = {}
        for each, place in zip(header.matrices, places, strict=True):
            weight = mapped.weight(each.kind, each.rows, each.columns, place.start)
            while asked < min(place.start + weight.num_bytes + AHEAD_BYTES, data_end):
                os.posix_fadvise(file, asked, ASK_BYTES, os.POSIX_FADV_WILLNEED)
                asked += ASK_BYTES
            if self.ops.checksums(weight) != each.checksums:
                raise BadEntry(Fault.TAG)
            found[each.name] = weight
            advance(weight.num_bytes)
        self.quantization = quantization
        return found

    def _refuse(self, path: Path, error: OSError | BadEntry) -> None:
        reason = error.fault if isinstance(error, BadEntry) else error.strerror
        log.warning("%s: %s, so the weights are packed again", path, reason)
        if isinstance(error, BadEntry):
            with suppress(OSError):
                disk.remove(str(path))

    # Writing.

    def _write(self, path: Path, matrices: Mapping[str, Weight], source: FileSource, fingerprint: bytes) -> None:
        kinds = source.kinds()
        places = _places(self.ops, kinds, DATA_START)
        data_bytes = places[-1].end - DATA_START
        free_bytes = shutil.disk_usage(self.folder).free
        if free_bytes < data_bytes:
            raise OSError(0, f"they take {amount(data_bytes)}, the disk has {amount(free_bytes)}")
        packed: list[PackedMatrix] = []
        advance = self._advance(f"{self.model.name}: keeping packed weights", data_bytes)

        def around() -> tuple[bytes, bytes]:
            quantization = source.quantization
            notes = None if quantization is None else asdict(quantization)
            header = PackedHeader(self._key(fingerprint), str(self.model.absolute()), notes, packed)
            return encode_header(header, PACKED_VERSION, data_bytes)

        def parts() -> Iterator[bytes | memoryview]:
            """In one pass: a matrix may be packed just when it is asked for."""
            at = 0
            for place in places:
                yield bytes(place.start - at)
                weight = matrices[place.name]
                packed.append(PackedMatrix(place.name, *kinds[place.name], self.ops.checksums(weight)))
                data = packed_data(weight)
                for start in range(0, len(data), PIECE_BYTES):
                    yield data[start : start + PIECE_BYTES]
                    advance(len(data[start : start + PIECE_BYTES]))
                at = place.start + len(data)
            yield bytes(places[-1].end - at)
            yield around()[1]

        disk.write_whole(str(path), parts(), lambda: around()[0])

    # Both.

    def _path_of(self, fingerprint: bytes) -> Path:
        return self.folder / name_of(self._key(fingerprint), PACKED_VERSION)

    def _key(self, fingerprint: bytes) -> str:
        # How tensors become matrices may change with the decoder, as keys and values do.
        made_of = f"{fingerprint.hex()} {self.weights} {NUMERICS_VERSION}"
        return blake2b(made_of.encode(), digest_size=16).hexdigest()

    def _is_unchanged(self) -> bool:
        try:
            return states_of(self._files) == self._states
        except OSError:
            return False

    def _model_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._files)

    def _advance(self, what: str, total_bytes: int) -> _Advance:
        return _Advance(self._progress, what, total_bytes)


class _Advance:
    """Adds up bytes for a progress."""

    def __init__(self, progress: Progress, what: str, total_bytes: int) -> None:
        self.progress = progress
        self.what = what
        self.total_bytes = total_bytes
        self.done_bytes = 0

    def __call__(self, num_bytes: int) -> None:
        self.done_bytes += num_bytes
        self.progress(self.what, self.done_bytes, self.total_bytes)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a matrix lies in the data."""

    name: str
    start: int
    num_bytes: int

    @property
    def end(self) -> int:
        return -(-(self.start + self.num_bytes) // PACKED_ALIGNMENT) * PACKED_ALIGNMENT


def _places(ops: NativeOps, kinds: Kinds, start: int) -> list[_Place]:
    """The matrices in the order of their data; those of one expert together, and from a page's beginning."""
    places: list[_Place] = []
    for names in wanted_together(kinds):
        if len(names) > 1:
            start = -(-start // PAGE_BYTES) * PAGE_BYTES
        for name in names:
            places.append(_Place(name, start, ops.packed_bytes(*kinds[name])))
            start = places[-1].end
    return places
