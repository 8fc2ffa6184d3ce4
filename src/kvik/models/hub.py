"""Models on the Hugging Face Hub, brought and kept by huggingface_hub.

Its settings hold (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE), and so does its cache layout: no private copy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvik.errors import DownloadError, InvalidInput, ModelError, ModelNotFound
from kvik.models.fetch import MARGIN_BYTES, disk_error, require_space
from kvik.models.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub import CachedFileInfo, CachedRepoInfo, CachedRevisionInfo, HFCacheInfo

HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^:\s]+))?(:(?P<file>[^:]+))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository on the Hub, at a revision (None: its default), and the file wanted (None: its only .gguf)."""

    repo: str
    revision: str | None
    file: str | None

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "") + (f":{self.file}" if self.file else "")


def is_inside(relative: str) -> bool:
    """Whether a relative name stays below the folder it is for, and can be shown."""
    return relative.isprintable() and "\\" not in relative and not {"..", ".", ""} & set(relative.split("/"))


def is_safe_gguf(file: str) -> bool:
    """Whether a file of a repository may be a model and stays inside its folder."""
    return is_inside(file) and file.lower().endswith(".gguf")


def pull_from_hub(name: HubName, *, force: bool, progress: Progress) -> Path:
    """Download the file, or give the cached copy where the Hub is out of reach."""
    from huggingface_hub import HfApi, errors, hf_hub_download
    from huggingface_hub.constants import HF_HUB_CACHE

    cached = {} if force else cached_files(name)
    if name.file is not None and name.file in cached and COMMIT.fullmatch(name.revision or ""):
        return cached[name.file]  # a file at a commit cannot have changed
    with _hub_errors(name):
        try:
            info = HfApi().model_info(name.repo, revision=name.revision, files_metadata=True)
        except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:  # type: ignore[attr-defined]
            if not cached or (isinstance(error, errors.HfHubHTTPError) and error.response.status_code < 500):
                raise
            if not isinstance(error, errors.OfflineModeIsEnabled):
                progress(f"{name}: the Hub is out of reach, using the cached copy", 0, 0)
            return cached[choose(name, cached)]
        sizes_bytes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        file = choose(name, sizes_bytes)
        if file not in cached:
            cache = Path(HF_HUB_CACHE)
            cache.mkdir(parents=True, exist_ok=True)
            require_space(str(name), cache, sizes_bytes[file] + MARGIN_BYTES, variable="HF_HOME")
        bar = _bar_class(f"{name.repo}: downloading {file}", progress)
        path = hf_hub_download(name.repo, file, revision=name.revision, force_download=force, tqdm_class=bar)
    return Path(path)


def config_file(name: HubName) -> Path:
    """The repository's config.json: the cached copy, else downloaded."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    with _hub_errors(name):
        cached = try_to_load_from_cache(name.repo, "config.json", revision=name.revision)
        if isinstance(cached, str):
            return Path(cached)
        HfApi().model_info(name.repo, revision=name.revision)  # fails at once where a download would try on and on
        return Path(hf_hub_download(name.repo, "config.json", revision=name.revision))


def choose(name: HubName, files: Iterable[str]) -> str:
    """The file that the name stands for; kvik never picks one of several by itself."""
    ggufs = sorted(file for file in files if is_safe_gguf(file))
    wanted = [file for file in ggufs if name.file in (None, file)]
    if len(wanted) == 1:
        return wanted[0]
    if not ggufs:
        raise ModelError(f"{name} has no .gguf file", hint="kvik runs .gguf files; look for a repository that has them")
    what = f"has no file {name.file}" if name.file else f"has {len(ggufs)} .gguf files"
    repo = f"{name.repo}@{name.revision}" if name.revision else name.repo
    listed = ", ".join(ggufs[:40]) + (f" and {len(ggufs) - 40} more" if len(ggufs) > 40 else "")
    raise ModelNotFound(
        f"{repo} {what}: choose from {listed}", hint=f"name one, for example `kvik run -m {repo}:{ggufs[0]}`"
    )


def cached_files(name: HubName) -> dict[str, Path]:
    """The .gguf files of a Hub id that are in the Hugging Face cache, by their names in the repository."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with _hub_errors(name):
        try:
            # no pattern: only the snapshot's folder is asked for, whole or not
            snapshot = snapshot_download(name.repo, revision=name.revision, local_files_only=True, allow_patterns=[])
        except LocalEntryNotFoundError:
            return {}
    found = {path.relative_to(snapshot).as_posix(): path for path in Path(snapshot).rglob("*") if path.is_file()}
    return {file: path for file, path in found.items() if is_safe_gguf(file) and name.file in (None, file)}


def _hub_revisions() -> Iterator[tuple[HFCacheInfo, CachedRepoInfo, CachedRevisionInfo]]:
    """Every model revision in the Hugging Face cache."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return
    for repo in cache.repos:
        if repo.repo_type == "model":
            yield from ((cache, repo, revision) for revision in repo.revisions)


def _files(revision: CachedRevisionInfo) -> dict[str, CachedFileInfo]:
    return {info.file_path.relative_to(revision.snapshot_path).as_posix(): info for info in revision.files}


def cached_models() -> Iterator[tuple[str, CachedFileInfo]]:
    """Every .gguf file in the Hugging Face cache, under the Hub id that names it."""
    for _, repo, revision in _hub_revisions():
        at = None if "main" in revision.refs else min(revision.refs, default=revision.commit_hash)
        for file, info in _files(revision).items():
            if is_safe_gguf(file):
                yield str(HubName(repo.repo_id, at, file)), info


def remove_cached(name: HubName) -> int:
    """Delete a whole cached revision (the Hub's default one is `main`), as huggingface_hub deletes it."""
    for cache, repo, revision in _hub_revisions():
        if repo.repo_id != name.repo or (name.revision or "main") not in {revision.commit_hash, *revision.refs}:
            continue
        if name.file is not None and {name.file} != set(_files(revision)):
            raise InvalidInput(
                f"{name}: a revision is deleted as a whole, and this one holds {len(revision.files)} files",
                hint=f"`kvik models rm {replace(name, file=None)}` deletes all of them",
            )
        # the same commit may be cached under another repository's name too: keep to this one
        strategy = replace(cache, repos=frozenset({repo})).delete_revisions(revision.commit_hash)
        strategy.execute()
        return strategy.expected_freed_size
    raise ModelNotFound(f"{name} is not in the Hugging Face cache", hint="`kvik models ls` shows what is")


def _bar_class(what: str, progress: Progress) -> type[Any]:
    """A bar for huggingface_hub that draws nothing and reports to `progress`."""
    from huggingface_hub.utils.tqdm import tqdm

    most_bytes = 0  # two bars may count one download (bytes received, bytes on disk): show the one that is ahead

    class Reporter(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            self.total_bytes, self.done_bytes = int(options.get("total") or 0), int(options.get("initial") or 0)
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]
            self.update(0)

        def update(self, n: float | None = 1) -> None:
            nonlocal most_bytes
            self.done_bytes += int(n or 0)
            most_bytes = min(max(most_bytes, self.done_bytes), self.total_bytes or self.done_bytes)
            progress(what, most_bytes, self.total_bytes)

    return Reporter


@contextmanager
def _hub_errors(name: HubName) -> Iterator[None]:
    """Turn what huggingface_hub raises into one clear line and a hint."""
    from huggingface_hub import errors

    http_error = errors.HTTPError  # type: ignore[attr-defined]  # that of the HTTP library it is built on
    try:
        yield
    except (http_error, errors.EntryNotFoundError, OSError, ValueError, RuntimeError) as error:
        raise _hub_error(name, error) from error


def _hub_error(name: HubName, error: Exception) -> DownloadError | ModelNotFound:
    from huggingface_hub import errors
    from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE

    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    match error:
        case errors.GatedRepoError():
            return DownloadError(f"{name} is gated", hint="ask for access on its page on the Hub, then set HF_TOKEN")
        case errors.RepositoryNotFoundError():
            return ModelNotFound(f"{name} is not on the Hub, or is private", hint="check the spelling, or set HF_TOKEN")
        case errors.RevisionNotFoundError():
            return ModelNotFound(f"{name.repo} has no revision {name.revision}", hint="give a branch, tag or commit")
        case errors.HFValidationError():
            return ModelNotFound(f"{name} is not a valid Hub id", hint="write it as org/name")
        case errors.OfflineModeIsEnabled():
            what = f"{name} is not in the Hugging Face cache, and offline mode is on"
            return DownloadError(what, hint="unset HF_HUB_OFFLINE, or give the path of a .gguf file")
        case errors.HfHubHTTPError():
            status = error.response.status_code
            hint = "check HF_TOKEN" if status in (401, 403) else "try again later"
            return DownloadError(f"{name}: {ENDPOINT} answered with HTTP status {status}", hint=hint)
        case errors.LocalEntryNotFoundError() | errors.HTTPError():  # type: ignore[attr-defined]
            what = f"{name}: {ENDPOINT} is out of reach ({said})"
            return DownloadError(what, hint="check the network, proxy and HF_ENDPOINT settings")
        case OSError() if error.errno is not None:
            return disk_error(str(name), Path(HF_HUB_CACHE), error, variable="HF_HOME")
    return DownloadError(f"{name}: {said}", hint="try again, with `kvik models pull --force` if need be")
