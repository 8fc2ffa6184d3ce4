"""Where a prompt comes from: the command line, and stdin for whoever asks for it.

A prompt on the command line leaves stdin alone: in a shell's loop it is the loop's.
"""

from __future__ import annotations

import sys

from kvik.cli.options import check_text, check_utf8
from kvik.cli.terminal import is_terminal
from kvik.errors import InvalidInput

STDIN = "-"
MAX_STDIN_BYTES = 64 << 20


def check_prompt(text: str) -> str:
    """The prompt itself; raises `InvalidInput` for one without text."""
    if not check_text("the prompt", text).strip():
        raise InvalidInput("the prompt is empty", hint='give it some text, for example "Why is the sky blue?"')
    return text


def read_prompt(argument: str) -> str:
    """The prompt given, or stdin's text for `-`."""
    return check_prompt(read_stdin() if argument == STDIN else argument)


def read_prompt_or_chat(argument: str | None, *, with_stdin: bool) -> str | None:
    """The prompt, with stdin's text below it where that is wanted; `None` where there is somebody to chat with."""
    if argument is None:
        return None if is_terminal(sys.stdin) else check_prompt(read_stdin())
    if not with_stdin:
        return read_prompt(argument)
    if argument == STDIN:
        raise InvalidInput("- is given twice", hint="stdin is read once; leave out one")
    check_prompt(argument)
    piped = read_stdin()
    if not piped.strip():
        raise InvalidInput("stdin is empty", hint="leave out -, or see why nothing came through the pipe")
    return f"{argument}\n\n{piped}"


def read_stdin() -> str:
    """All of stdin, without a newline at its end. Raises `InvalidInput`."""
    try:
        # A closed stdin is None.
        data = b"" if sys.stdin is None else sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
    except OSError as error:
        raise InvalidInput(
            f"stdin cannot be read: {error.strerror}", hint="give it a file or a pipe, or the prompt as an argument"
        ) from None
    if len(data) > MAX_STDIN_BYTES:
        raise InvalidInput(
            f"stdin has more than {MAX_STDIN_BYTES:,} bytes", hint="no context holds that much; give a part of it"
        )
    return check_utf8("stdin", data).removesuffix("\n").removesuffix("\r")
