"""The chat of `kvik run`: each turn keeps its cache and ends with what it cost."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Protocol

from kvik.cli.options import check_text
from kvik.cli.terminal import (
    Interrupt,
    is_terminal,
    note,
    prompt_interrupt,
    say,
    show_error,
    show_problem,
    stats_line,
    write_answer,
)
from kvik.config import SamplingParams
from kvik.errors import KvikError, ModelError, PromptTooLong

if TYPE_CHECKING:
    from kvik.cli.template import TemplateInput
    from kvik.engine.llm import LLM
    from kvik.engine.session import Session

HELP = """\
/reset  forget the conversation and start a new one
/exit   leave, as Ctrl-D does
A line that ends with \\ goes on in the next.
Ctrl-C stops an answer; what was written of it stays in the conversation."""


class Conversation(Protocol):
    """What the lines that somebody types go to."""

    def take_turn(self, text: str) -> None:
        """Answer one message and show what it cost; one that cannot be taken is not kept. Raises `KvikError`."""

    def close(self) -> None:
        """Forget it."""


def chat(
    llm: LLM, params: SamplingParams, *, name: str, system: str | None, template: TemplateInput, use_cache: bool
) -> None:
    """Talk to a model in this process until the end of input."""
    from kvik.engine.session import Session

    if not llm.is_chat_model:
        raise ModelError(
            f"{llm.model.path.name} has no chat template", hint='give it text to continue: `kvik run --raw "Once upon"`'
        )
    # What the template does not know is refused before anybody types.
    llm.render_chat([{"role": "user", "content": "Hello"}], tools=template.tools, template_vars=template.template_vars)
    begin = partial(
        Session,
        llm,
        system=system,
        tools=template.tools,
        template_vars=template.template_vars,
        use_cache=use_cache,
    )
    converse(lambda: LocalConversation(begin(), params), f"{name} · context {llm.model.context:,} tokens")


def converse(begin: Callable[[], Conversation], title: str) -> None:
    """Read lines until the end of input, and give them to the conversation; /reset begins another."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # importing it gives input() its line editing

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # for `check_text` to find, instead of an exception in input()

    note(f"{title} · /help shows the commands, Ctrl-D leaves")
    conversation = begin()
    while True:
        try:
            text = check_text("the message", read_message())
            command = text.strip()
            if command == "/exit":
                break
            if command == "/help":
                note(HELP)
            elif command == "/reset":
                conversation.close()
                conversation = begin()
                note("a new conversation")
            elif command.startswith("/") and command[1:].isalpha():
                show_problem("InvalidInput", f"{command} is not a command", "/help shows the commands")
            elif command:
                conversation.take_turn(text)
        except PromptTooLong as error:
            show_error(error, hint=f"{error.hint}; /reset starts a new conversation")
        except KvikError as error:
            show_error(error)
        except KeyboardInterrupt:
            note("")
        except EOFError:
            note("")
            break


def read_message() -> str:
    """What is typed next, perhaps over several lines. Raises EOFError at the end of input."""
    lines = [_read_line("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1].removesuffix("\\")
        lines.append(_read_line("  "))
    return "\n".join(lines)


class LocalConversation:
    """A session with a model in this process."""

    def __init__(self, session: Session, params: SamplingParams) -> None:
        self.session = session
        self.params = params

    def take_turn(self, text: str) -> None:
        """Answer one message and show what it cost; a message that the model cannot take is not kept."""
        session = self.session
        with Interrupt() as interrupted:
            session.append("user", text)
            try:
                pieces = session.stream(self.params, should_stop=interrupted)
            except KvikError:
                session.messages.pop()
                raise
            completion = write_answer(pieces, lambda: session.completion)
            note(stats_line(completion.stats, completion.finish_reason, use_cache=session.use_cache))

    def close(self) -> None:
        """Give back its blocks."""
        self.session.close()


def _read_line(prompt: str) -> str:
    with prompt_interrupt():
        if is_terminal(sys.stdout):
            return input(prompt)
        say(prompt)  # stdout is the result, and goes elsewhere
        return input()
