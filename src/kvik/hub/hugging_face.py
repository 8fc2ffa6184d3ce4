"""Models on the Hugging Face Hub, brought and kept by huggingface_hub.

Its settings hold (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE), and so does its cache layout: no private copy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from kvik.errors import DownloadError, InvalidInput, ModelError, ModelNotFound
from kvik.files.split import Part
from kvik.hub.fetch import MARGIN_BYTES, disk_error, require_space
from kvik.hub.folder import (
    ADAPTER,
    CONFIG,
    INDEX,
    TOKENIZER,
    WHOLE,
    adapter_error,
    is_inside,
    is_whole,
    no_weights,
    read_index,
    small_files,
)
from kvik.hub.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub import CachedFileInfo, CachedRepoInfo, CachedRevisionInfo, HFCacheInfo

HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^:\s]+))?(:(?P<file>[^:]+))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")


CHECKPOINT = "safetensors"
"""In the place of a file's name: all files of the repository's checkpoint."""

ConfigCheck: TypeAlias = Callable[[Path], None]
"""Raises `ModelError` for a folder whose config.json is of no model that can be run."""


def accept(folder: Path) -> None:
    """Take any config."""


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository on the Hub, at a revision (None: its default), and what of it is wanted.

    A .gguf file by its name, or `CHECKPOINT`; None: its only .gguf file, or where it has none its checkpoint.
    """

    repo: str
    revision: str | None
    file: str | None

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "") + (f":{self.file}" if self.file else "")


def is_safe_gguf(file: str) -> bool:
    """Whether a file of a repository may be a model and stays inside its folder."""
    return is_inside(file) and file.lower().endswith(".gguf")


def pull_from_hub(name: HubName, *, force: bool, progress: Progress, check_config: ConfigCheck) -> Path:
    """Download the file or the checkpoint, or give the cached copy where the Hub is out of reach.

    `check_config` judges a checkpoint's folder, which has its config and no more, before anything large is brought.
    """
    from huggingface_hub import HfApi, errors

    cached = {} if force else cached_models_of(name)
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
        chosen = choose(name, sizes_bytes)
        pull = _Pull(name, sizes_bytes, force=force, progress=progress, check_config=check_config)
        if chosen == CHECKPOINT:
            return pull.checkpoint()
        if chosen not in cached:
            pull.require_space([chosen])
        return pull.download(chosen, name.revision, f"{name.repo}: downloading {chosen}")


class _Pull:
    """Downloads from one repository, whose files have these sizes."""

    def __init__(
        self,
        name: HubName,
        sizes_bytes: Mapping[str, int],
        *,
        force: bool,
        progress: Progress,
        check_config: ConfigCheck,
    ) -> None:
        self.name = name
        self.sizes_bytes = sizes_bytes
        self.force = force
        self.progress = progress
        self.check_config = check_config

    def checkpoint(self) -> Path:
        """Bring all files of the checkpoint, of one commit, and return their folder. Nothing else is brought."""
        # The first by the revision's name, which the cache remembers; the others by the commit that it stood for.
        folder = self.download(CONFIG, self.name.revision, f"{self.name.repo}: downloading {CONFIG}").parent
        self.check_config(folder)
        weights = [WHOLE]
        if INDEX in self.sizes_bytes:
            weights = sorted(read_index(self.download(INDEX, folder.name, f"{self.name.repo}: downloading {INDEX}")))
        files = [*small_files(self.sizes_bytes), *weights]
        for file in weights:
            if file not in self.sizes_bytes:
                raise ModelError(
                    f"{self.name}: {INDEX} names {file}, which the repository does not have",
                    hint="the repository is not whole; take another",
                )
        wanted = [
            file for file in files if file not in (CONFIG, INDEX) and (self.force or not (folder / file).exists())
        ]
        self.require_space(wanted)
        done_bytes, all_bytes = 0, sum(self.sizes_bytes[file] for file in wanted)
        for file in wanted:
            self.download(
                file, folder.name, f"{self.name.repo}: downloading {len(wanted)} files", done_bytes, all_bytes
            )
            done_bytes += self.sizes_bytes[file]
        return folder

    def download(
        self, file: str, revision: str | None, what: str, done_bytes: int = 0, all_bytes: int | None = None
    ) -> Path:
        """Bring one file; `done_bytes` of `all_bytes` were brought before it."""
        from huggingface_hub import hf_hub_download

        def report(what: str, file_bytes: int, file_total_bytes: int) -> None:
            self.progress(what, done_bytes + file_bytes, file_total_bytes if all_bytes is None else all_bytes)

        bar = _bar_class(what, report)
        path = hf_hub_download(self.name.repo, file, revision=revision, force_download=self.force, tqdm_class=bar)
        return Path(path)

    def require_space(self, files: Collection[str]) -> None:
        """Raise `DownloadError` unless the cache's disk has room for these files."""
        from huggingface_hub.constants import HF_HUB_CACHE

        cache = Path(HF_HUB_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        needed_bytes = sum(self.sizes_bytes[file] for file in files)
        if files:
            require_space(str(self.name), cache, needed_bytes + MARGIN_BYTES, variable="HF_HOME")


def config_file(name: HubName) -> Path:
    """The repository's config.json: the cached copy, else downloaded."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    with _hub_errors(name):
        cached = try_to_load_from_cache(name.repo, "config.json", revision=name.revision)
        if isinstance(cached, str):
            return Path(cached)
        HfApi().model_info(name.repo, revision=name.revision)  # fails at once where a download would try on and on
        return Path(hf_hub_download(name.repo, "config.json", revision=name.revision))


def choose(name: HubName, files: Collection[str]) -> str:
    """The file among these that the name stands for, or `CHECKPOINT`; kvik never picks one of several by itself."""
    ggufs = sorted(file for file in files if is_safe_gguf(file))
    has_checkpoint = CHECKPOINT in files or (
        CONFIG in files and TOKENIZER in files and bool({WHOLE, INDEX} & set(files))
    )
    if has_checkpoint and (name.file == CHECKPOINT or (name.file is None and not ggufs)):
        return CHECKPOINT
    wanted = [file for file in ggufs if name.file in (None, file)]
    whole = [file for file in wanted if Part.of(file) is None]
    if wanted and not whole and (name.file is not None or not has_checkpoint):
        raise _split_error(name, wanted[0])
    if len(wanted) == 1:
        return wanted[0]
    repo = f"{name.repo}@{name.revision}" if name.revision else name.repo
    if not ggufs and has_checkpoint:
        raise ModelNotFound(
            f"{repo} has no .gguf file, but a checkpoint", hint=f"`kvik run -m {repo}` runs the checkpoint"
        )
    if name.file == CHECKPOINT or not ggufs:
        raise _no_model(name, files)
    what = f"has no file {name.file}" if name.file else f"has {len(ggufs)} .gguf files"
    example = next((file for file in ggufs if Part.of(file) is None), CHECKPOINT if has_checkpoint else ggufs[0])
    listed = ", ".join(ggufs[:40]) + (f" and {len(ggufs) - 40} more" if len(ggufs) > 40 else "")
    if has_checkpoint:
        listed += f", or {CHECKPOINT} for its checkpoint"
    raise ModelNotFound(
        f"{repo} {what}: choose from {listed}", hint=f"name one, for example `kvik run -m {repo}:{example}`"
    )


def _split_error(name: HubName, file: str) -> ModelError:
    part = Part.of(file)
    assert part is not None
    download = f"hf download {name.repo} --include '{part.base}-*'"
    return part.error(
        str(replace(name, file=file)),
        hint=f"download all parts (`{download}`), merge them with {part.merge_command}, and give that file",
    )


def _no_model(name: HubName, files: Collection[str]) -> ModelError:
    """Of a repository that has no .gguf file, and no whole checkpoint either."""
    if ADAPTER in files:
        return adapter_error(str(name))
    if not {WHOLE, INDEX} & set(files):
        return no_weights(str(name), [file for file in files if is_inside(file)])
    missing = CONFIG if CONFIG not in files else TOKENIZER
    return ModelError(
        f"{name} has weights, but no {missing}",
        hint="look for a repository of this model that has one, as transformers' `save_pretrained` writes it",
    )


def cached_models_of(name: HubName) -> dict[str, Path]:
    """What the Hugging Face cache has of a Hub id: .gguf files by their names, a whole checkpoint as `CHECKPOINT`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with _hub_errors(name):
        try:
            # no pattern: only the snapshot's folder is asked for, whole or not
            snapshot = Path(
                snapshot_download(name.repo, revision=name.revision, local_files_only=True, allow_patterns=[])
            )
        except LocalEntryNotFoundError:
            return {}
        found = {path.relative_to(snapshot).as_posix(): path for path in snapshot.rglob("*") if path.is_file()}
        models = {file: path for file, path in found.items() if is_safe_gguf(file)}
        if is_whole(snapshot):
            models[CHECKPOINT] = snapshot
    return {file: path for file, path in models.items() if name.file in (None, file)}


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


def cached_models() -> Iterator[tuple[str, int, Path]]:
    """Every .gguf file and every whole checkpoint in the Hugging Face cache: the Hub id that names it, bytes, path."""
    for _, repo, revision in _hub_revisions():
        at = None if "main" in revision.refs else min(revision.refs, default=revision.commit_hash)
        files = _files(revision)
        ggufs = {file: info for file, info in files.items() if is_safe_gguf(file)}
        for file, info in ggufs.items():
            yield str(HubName(repo.repo_id, at, file)), info.size_on_disk, info.file_path
        if is_whole(revision.snapshot_path):
            size_bytes = sum(info.size_on_disk for file, info in files.items() if file not in ggufs)
            yield str(HubName(repo.repo_id, at, CHECKPOINT)), size_bytes, revision.snapshot_path


def remove_cached(name: HubName) -> int:
    """Delete a whole cached revision (the Hub's default one is `main`), as huggingface_hub deletes it."""
    for cache, repo, revision in _hub_revisions():
        if repo.repo_id != name.repo or (name.revision or "main") not in {revision.commit_hash, *revision.refs}:
            continue
        files = set(_files(revision))
        others = {file for file in files if is_safe_gguf(file)} if name.file == CHECKPOINT else files - {name.file}
        if name.file is not None and (others or not files):
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

    shown_bytes = 0  # two bars may count one download (bytes received, bytes on disk): show the one that is ahead

    class Reporter(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            self.total_bytes, self.done_bytes = int(options.get("total") or 0), int(options.get("initial") or 0)
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]
            self.update(0)

        def update(self, n: float | None = 1) -> None:
            nonlocal shown_bytes
            self.done_bytes += int(n or 0)
            shown_bytes = min(max(shown_bytes, self.done_bytes), self.total_bytes or self.done_bytes)
            progress(what, shown_bytes, self.total_bytes)

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
