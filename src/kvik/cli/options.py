"""Options that several commands share: each group is a dataclass, and a command takes it as one parameter."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from kvik.cli.terminal import note, tell_warnings
from kvik.config import ActivationDType, SamplingParams, Speculation, StorePolicy, WeightFormat, is_shared
from kvik.errors import InvalidInput
from kvik.hub import store
from kvik.hub.progress import terminal_progress
from kvik.machine import user_folder

if TYPE_CHECKING:
    from kvik.engine.llm import LLM

STOP_HELP = r"End before this text; \n, \t, \r, \\, \xNN and \uNNNN are characters. May be repeated."
PACKED_HELP = "Keep packed weights in this folder, for a faster next start; alone: kvik's cache folder."
KV_DTYPE_HELP = "Keys and values in the cache: f16, f32, int8, k4v4 (4.5 bits), or a pair like k=int8,v=v4."
ESCAPE = re.compile(r"\\(?:(?P<letter>[ntr\\])|x(?P<byte>[0-9a-fA-F]{2})|u(?P<code>[0-9a-fA-F]{4})|.?)", re.DOTALL)
LETTERS = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}

# Panels of --help.
PROMPT, SAMPLING, ENGINE, SERVER = "Prompt and output", "Sampling", "Model and engine", "Of a server"
STORE = "Cache that outlives the process"

MAX_KV_HEADS = 1 << 16


def value(
    panel: str, metavar: str, help_text: str, *names: str, show_default: bool | str = False, **others: Any
) -> Any:
    """An option that takes a value."""
    return typer.Option(
        *names, help=help_text, metavar=metavar, show_default=show_default, rich_help_panel=panel, **others
    )


def flag(panel: str, name: str, help_text: str) -> Any:
    """An option that is there or not."""
    return typer.Option(name, help=help_text, metavar="", rich_help_panel=panel)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptOptions:
    """What becomes of the prompt's text before the model sees it."""

    raw: Annotated[bool, flag(PROMPT, "--raw", "Continue the text as it is, without a chat template.")] = False
    system: Annotated[str | None, value(PROMPT, "TEXT", "The chat's system message.")] = None

    def check(self) -> None:
        """Raise `InvalidInput` for options that contradict each other."""
        if self.system is None:
            return
        check_text("--system", self.system)
        if self.raw:
            raise InvalidInput("--system is a message of the chat template, --raw uses none", hint="leave out one")

    def token_ids(self, llm: LLM, prompt: str, **template: Any) -> list[int]:
        """The prompt as the model sees it; `template` is what `LLM.render_chat` takes besides messages."""
        if self.raw:
            return llm.encode(prompt)
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return llm.render_chat([*system, {"role": "user", "content": prompt}], **template)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen, as in `SamplingParams`."""

    temperature: Annotated[float, value(SAMPLING, "T", "Above 0 samples at random; 0 takes the likeliest token.")] = 0.0
    top_k: Annotated[int, value(SAMPLING, "K", "Sample from the K likeliest tokens; 0: from all.")] = 0
    top_p: Annotated[
        float, value(SAMPLING, "P", "Sample from the likeliest tokens with probability P together; 1: from all.")
    ] = 1.0
    min_p: Annotated[float, value(SAMPLING, "P", "Drop tokens less likely than P times the likeliest.")] = 0.0
    repetition_penalty: Annotated[
        float, value(SAMPLING, "X", "Above 1, tokens of prompt and answer become less likely.")
    ] = 1.0
    presence_penalty: Annotated[float, value(SAMPLING, "X", "Above 0, tokens of the answer become less likely.")] = 0.0
    frequency_penalty: Annotated[float, value(SAMPLING, "X", "The same, for each time that a token was used.")] = 0.0
    min_tokens: Annotated[int, value(SAMPLING, "N", "Do not end before N tokens.")] = 0
    stop: Annotated[list[str] | None, value(SAMPLING, "TEXT", STOP_HELP)] = None
    stop_token_id: Annotated[list[int] | None, value(SAMPLING, "ID", "End with this token; may be repeated.")] = None
    seed: Annotated[int | None, value(SAMPLING, "N", "Make sampling repeatable.")] = None
    speculate: Annotated[
        Speculation | None,
        value(SAMPLING, "ngram", "Guess tokens from what followed the same tokens before; the text stays the same."),
    ] = None

    def params(self, **others: Any) -> SamplingParams:
        """The checked parameters; `others` are those that a command has options of its own for."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        stop, stop_token_ids = values.pop("stop") or (), values.pop("stop_token_id") or ()
        texts = tuple(unescape("--stop", check_text("--stop", text)) for text in stop)
        return SamplingParams(stop=texts, stop_token_ids=tuple(stop_token_ids), **values, **others)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Which model, and how it is run whatever else varies, as in `EngineConfig`."""

    model: Annotated[
        str,
        value(
            ENGINE,
            "NAME",
            "smollm2, a .gguf path, a checkpoint folder or a Hub id.",
            "-m",
            "--model",
            show_default=True,
            envvar="KVIK_MODEL",
        ),
    ] = "smollm2"
    activations: Annotated[
        ActivationDType, value(ENGINE, "int8|int16", "int16 is slower and as accurate as float32.", show_default=True)
    ] = "int8"
    weights: Annotated[
        WeightFormat | None, value(ENGINE, "q8|q4", "Quantise a checkpoint folder's weights as they are loaded.")
    ] = None
    packed_cache: Annotated[str | None, value(ENGINE, "DIR", PACKED_HELP)] = None
    context: Annotated[
        int | None, value(ENGINE, "N", "Most tokens of prompt and answer; default: the model's own limit.")
    ] = None
    kv_memory: Annotated[
        str, value(ENGINE, "SIZE", "Memory for keys and values, like 512MiB or 2GiB.", show_default=True)
    ] = "auto"

    def load(self, **others: Any) -> LLM:
        """The model, ready to write; `others` are arguments of `LLM` that have no option here."""
        from kvik.engine.llm import LLM
        from kvik.models.loader import check_config_of

        tell_warnings()
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        with terminal_progress() as report:
            path = store.resolve(values.pop("model"), check_config=check_config_of, progress=report)
        llm = LLM(path.absolute(), **values, **others)
        if llm.model.quantization is not None:
            note(str(llm.model.quantization))
        return llm


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions(ModelOptions):
    """Those, and which keys and values are kept, by how many threads."""

    kv_dtype: Annotated[str, value(ENGINE, "TYPE", KV_DTYPE_HELP, show_default=True)] = "f16"
    threads: Annotated[int | None, value(ENGINE, "N", "Default: one for each processor.")] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOptions:
    """Where blocks outlive the process, as in `EngineConfig`."""

    store: Annotated[
        str | None,
        value(
            STORE,
            "[DIR|URL]",
            "Keep computed blocks for the next time, in kvik's cache folder or this one: --store=DIR, or a path that"
            " begins with / . or ~; or share them through redis://HOST.",
        ),
    ] = None
    store_quota: Annotated[
        str | None, value(STORE, "SIZE", "Most bytes of stored files; default: 2GB.", show_default="2GB")
    ] = None
    store_policy: Annotated[
        StorePolicy | None,
        value(
            STORE,
            "end|reuse",
            "Store what each request computed, or only blocks that are used a second time.",
            show_default="end",
        ),
    ] = None
    store_key: Annotated[
        str | None,
        value(STORE, "FILE", "A file with a secret that seals stored blocks, so that they cannot be forged."),
    ] = None

    def settings(self) -> dict[str, Any]:
        """The fields of an `EngineConfig`. Raises `InvalidInput` for what has no meaning without a store."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        given = {name: each for name, each in values.items() if each is not None}
        if given and self.store is None:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise InvalidInput(f"{names} without --store", hint="add --store, or leave it out")
        if self.store and (Path(self.store).expanduser() / "config.json").is_file():
            raise InvalidInput(
                f"--store is {self.store}, a model", hint="name the model first; --store=DIR is a folder for blocks"
            )
        return given


def store_folder() -> Path:
    """Where blocks are stored unless the caller says otherwise."""
    return user_folder() / "store"


def packed_folder() -> Path:
    """Where packed weights are kept unless the caller says otherwise."""
    return user_folder() / "packed"


FOLDERS: Mapping[str, Callable[[], Path]] = {"--store": store_folder, "--packed-cache": packed_folder}
"""What these options mean where they stand alone."""


class FolderCommand(TyperCommand):
    """A command whose `--store` and `--packed-cache` may stand alone: then they are in kvik's own cache folder.

    A word behind one is its folder where it is written as a path, and else a prompt or a model; `--store=DIR` is any.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The command line with the folder put in."""
        takes_value = {name for each in self.params if not getattr(each, "is_flag", True) for name in each.opts}
        words, found = list(args), []
        while words and words[0] != "--":
            word = words.pop(0)
            if (default := FOLDERS.get(word)) is not None:
                folder = words.pop(0) if words and _is_folder(words[0]) else str(default())
                word = f"{word}={folder}"
            found.append(word)
            if word in takes_value and words:
                found.append(words.pop(0))
        return super().parse_args(ctx, found + words)


def _is_folder(word: str) -> bool:
    """Whether a word is written as a path or as a server's address, and names no file."""
    return (
        is_shared(word)
        or (word.startswith(("/", "./", "../", "~")) and not Path(word).expanduser().is_file())
        or word in (".", "..")
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Which server is asked in place of a model in this process."""

    url: Annotated[
        str | None, value(SERVER, "URL", "Ask this OpenAI-compatible server, like http://127.0.0.1:8000.")
    ] = None
    api_key: Annotated[
        str | None, value(SERVER, "KEY", "The server's key.", envvar=["KVIK_API_KEY", "OPENAI_API_KEY"])
    ] = None
    timeout: Annotated[float, value(SERVER, "S", "Give up after S seconds without a byte.", show_default=True)] = 300.0

    def check(self, given: dict[str, str]) -> None:
        """Raise `InvalidInput` for a server that cannot be asked, or options of one where there is none."""
        from importlib.util import find_spec

        if self.url is None:
            others = [given[name] for name in ("api_key", "timeout") if name in given]
            if others:
                raise InvalidInput(f"{', '.join(others)} without --url", hint="add --url, or leave it out")
            return
        missing = [name for name in ("h11", "msgspec") if find_spec(name) is None]
        if missing:
            raise InvalidInput(
                f"--url needs {' and '.join(missing)}, which this Python lacks", hint="pip install 'kvik[server]'"
            )
        if not 0 < self.timeout <= 86_400:
            raise InvalidInput(f"--timeout is {self.timeout:g}", hint="give seconds above 0, 86400 at most")


def given_options(context: typer.Context) -> dict[str, str]:
    """The options on the command line, without those from the environment: how each is spelled, by its parameter."""
    given = {}
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            given[parameter.name or ""] = max(parameter.opts, key=len)
    return given


def refuse_options(given: dict[str, str], allowed: Collection[str], mode: str, hint: str) -> None:
    """Raise `InvalidInput` for options that the command does not use in this mode."""
    others = [option for name, option in given.items() if name not in allowed]
    if others:
        verb = "has" if len(others) == 1 else "have"
        raise InvalidInput(f"{', '.join(others)} {verb} no meaning {mode}", hint=hint)


def spell_out(command: Callable[..., None]) -> Callable[..., None]:
    """Make each field of the command's dataclass parameters an option of its own on the command line."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if is_dataclass(hint) and isinstance(hint, type)}
    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name not in groups:
            parameters.append(parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        group = groups[parameter.name]
        group_hints = get_type_hints(group, include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=group_hints[field.name]
            )
            for field in fields(group)
        ]

    @wraps(command)
    def spelled_out(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    # What typer reads.
    spelled_out.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spelled_out.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return spelled_out


def check_utf8(name: str, data: bytes) -> str:
    """The text of `data`; raises `InvalidInput` naming the first byte that is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"{name} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start:,}",
            hint="convert it, for example with `iconv -f latin1 -t utf-8`",
        ) from None


def check_text(name: str, text: str) -> str:
    """The text itself; raises `InvalidInput` where the bytes that it came from were not UTF-8."""
    return check_utf8(name, text.encode("utf-8", "surrogateescape"))


def unescape(name: str, text: str) -> str:
    r"""The text with its escapes replaced: \n, \t, \r, \\, \xNN, \uNNNN. Raises `InvalidInput` for others."""

    def character(found: re.Match[str]) -> str:
        if found["letter"]:
            return LETTERS[found["letter"]]
        digits = found["byte"] or found["code"]
        if not digits or 0xD800 <= int(digits, 16) < 0xE000:  # half of a pair is no character
            end = 6 if found[0] == r"\u" or found["code"] else 4
            shown = text[found.start() : found.start() + end]
            raise InvalidInput(
                f"{name} has {shown} in it, which is not an escape",
                hint=r"write \n, \t, \r, \\, \xNN or \uNNNN; a backslash itself is \\",
            )
        return chr(int(digits, 16))

    return ESCAPE.sub(character, text)


def check_output_path(option: str, path: Path) -> None:
    """Raise `InvalidInput` before any work where the file could not be written in the end."""
    where = path.absolute()
    try:
        where.stat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InvalidInput(f"{option} is {path}: {error.strerror}", hint="give the name of another file") from None
    if where.is_dir():
        raise InvalidInput(f"{option} is {path}, a folder", hint="give the name of a file")
    if not where.parent.is_dir():
        raise InvalidInput(f"{option} is {path}: there is no folder {where.parent}", hint="make it, or give another")
    if not (os.access(where.parent, os.W_OK) and (not where.exists() or os.access(where, os.W_OK))):
        raise InvalidInput(f"{option} is {path}, which may not be written", hint="give a file in a folder of yours")


def check_count(option: str, number: int, minimum: int, maximum: int) -> int:
    """The number itself; raises `InvalidInput` outside of the bounds."""
    if not minimum <= number <= maximum:
        raise InvalidInput(f"{option} is {number:,}", hint=f"give a whole number from {minimum:,} to {maximum:,}")
    return number


def parse_list(option: str, text: str) -> list[str]:
    """The parts of a list like `128,512`, none empty and none twice."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts) or len(set(parts)) < len(parts):
        raise InvalidInput(f"{option} is {text!r:.60}", hint="give values with commas between them, each once")
    return parts


def parse_counts(option: str, text: str, minimum: int, maximum: int) -> list[int]:
    """The numbers of a list like `128,512`."""
    numbers = []
    for part in parse_list(option, text):
        if not (part.isascii() and part.isdigit()) or len(part) > 18:
            raise InvalidInput(
                f"{option} has {part!r:.40} in it",
                hint=f"give whole numbers from {minimum:,} to {maximum:,}, like 128,512",
            )
        numbers.append(check_count(option, int(part), minimum, maximum))
    return numbers
