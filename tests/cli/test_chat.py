"""The chat of `kvik run`, on a pseudo-terminal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from command_line import CTRL_C, CTRL_D, Terminal
from gguf_files import tiny_llama
from kvik import LLM
from template_families import FAMILIES

LINE = re.compile(
    r"^prompt (?P<prompt>[\d,]+) · cached (?P<cached>[\d,]+) \(\d+ %\) · TTFT [\d,.]+ m?s · ([\d,.]+|-) tok/s"
    r" · KV [\d.]+ [kM]B(?P<rest>.*)$",
    re.MULTILINE,
)
ENDLESS = ("--ignore-eos", "--max-tokens", "100000")
SHORT = ("--ignore-eos", "--max-tokens", "12")


def chat(model: Path, *options: str, stdout: Path | None = None) -> Terminal:
    terminal = Terminal("run", "-m", str(model), *options, stdout=stdout)
    greeting = terminal.read_until("> ")
    assert "/help" in greeting
    return terminal


def say(terminal: Terminal, message: str) -> tuple[str, re.Match[str]]:
    """Type a message; give all that appears up to the next prompt, and the line of figures."""
    terminal.type(f"{message}\n")
    output = terminal.read_until("\n> ")
    figures = LINE.search(output)
    assert figures is not None, output
    return output, figures


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_each_turn_keeps_its_cache(tiny: Path) -> None:
    with chat(tiny, *SHORT) as terminal:
        _, first = say(terminal, "hello")
        _, second = say(terminal, "and again")
        _, third = say(terminal, "and once more")
        terminal.type(CTRL_D)
        assert terminal.finish()[1] == 0
    assert number(first["cached"]) == 0
    # All of the turn before is there, but for its last token and what the template puts behind it.
    assert number(second["cached"]) >= number(first["prompt"])
    assert number(third["cached"]) >= number(second["prompt"])
    assert first["rest"] == " · cut at 12 tokens"


def test_the_cache_changes_nothing_that_is_said(tiny: Path) -> None:
    said = []
    for options in ((), ("--no-cache",)):
        with chat(tiny, *SHORT, *options) as terminal:
            said.append([LINE.sub("", say(terminal, text)[0]) for text in ("hello", "and again", "more")])
    assert said[0] == said[1]


def test_ctrl_c_stops_the_answer_and_not_the_chat(tiny: Path) -> None:
    with chat(tiny, *ENDLESS) as terminal:
        prompts, cached = [], []
        for message in ("hello", "go on"):
            terminal.type(f"{message}\n")
            terminal.read_until("\ufffd")
            terminal.type(CTRL_C)
            figures = LINE.search(terminal.read_until("\n> "))
            assert figures is not None
            assert figures["rest"].startswith(" · interrupted after ")
            prompts.append(number(figures["prompt"]))
            cached.append(number(figures["cached"]))
        terminal.type("/exit\n")
        assert terminal.finish()[1] == 0
    # The half answer stays in the conversation, and its cache with it.
    assert prompts[1] > prompts[0] + 1
    assert cached[1] >= prompts[0]


def test_ctrl_c_at_the_prompt_takes_the_line_back(tiny: Path) -> None:
    with chat(tiny, *SHORT) as terminal:
        terminal.type("this is not meant")
        terminal.read_until("meant")
        terminal.type(CTRL_C)
        terminal.read_until("\n> ")
        _, figures = say(terminal, "hello")
        terminal.type("a line\\\nand a second")
        terminal.read_until("second")
        terminal.type(CTRL_C)
        terminal.read_until("\n> ")
        terminal.type(CTRL_D)
        assert terminal.finish()[1] == 0
    with chat(tiny, *SHORT) as terminal:
        assert say(terminal, "hello")[1]["prompt"] == figures["prompt"]


def test_a_message_that_no_longer_fits_is_dropped_and_the_chat_goes_on(tiny: Path) -> None:
    with chat(tiny, *SHORT, "--context", "150") as terminal:
        _, first = say(terminal, "hello")
        terminal.type(f"{'q' * 400}\n")
        output = terminal.read_until("\n> ")
        error = re.search(r"PromptTooLong: the prompt has (\d+) tokens, the context holds 150 ", output)
        assert error is not None, output
        assert int(error[1]) > 400
        assert re.search(r"^hint: .*/reset", output, re.MULTILINE)
        _, second = say(terminal, "hello")
        assert number(second["cached"]) >= number(first["prompt"])


def test_reset_starts_anew(tiny: Path) -> None:
    with chat(tiny, *SHORT, "--system", "be brief") as terminal:
        first, figures = say(terminal, "hello")
        terminal.type("/reset\n")
        assert "a new conversation" in terminal.read_until("\n> ")
        again, same = say(terminal, "hello")
    # What the first conversation had is found again, as it would be by any other one.
    assert same["prompt"] == figures["prompt"]
    assert number(same["cached"]) == number(figures["prompt"]) - 1
    assert LINE.sub("", first) == LINE.sub("", again)


def test_commands_and_messages_that_look_like_them(tiny: Path) -> None:
    with chat(tiny, *SHORT) as terminal:
        terminal.type("/help\n")
        assert "Ctrl-C" in terminal.read_until("\n> ")
        terminal.type("/quit\n")
        assert "InvalidInput: /quit is not a command\nhint: /help" in terminal.read_until("\n> ")
        terminal.type("\n")
        assert "prompt" not in terminal.read_until("> ")
        say(terminal, "/etc/passwd is what?")


def test_a_backslash_at_the_end_goes_on_in_the_next_line(tiny: Path) -> None:
    with chat(tiny, *SHORT) as terminal:
        _, two_lines = say(terminal, "one\\\ntwo")
        terminal.type("/reset\n")
        terminal.read_until("\n> ")
        _, one_line = say(terminal, "one two")
    assert number(two_lines["prompt"]) >= number(one_line["prompt"])


def test_a_message_that_is_not_utf8_is_refused(tiny: Path, tmp_path: Path) -> None:
    # With stdout elsewhere, for readline would drop the byte by itself.
    with chat(tiny, *SHORT, stdout=tmp_path / "answers.txt") as terminal:
        terminal.type_bytes(b"caf\xe9\n")
        assert "InvalidInput: the message is not UTF-8: byte 0xe9 at offset 3\nhint: " in terminal.read_until("\n> ")
        say(terminal, "hello")


def test_answers_can_go_to_a_file(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "answers.txt"
    with chat(tiny, *SHORT, stdout=file) as terminal:
        say(terminal, "hello")
        terminal.type(CTRL_D)
        terminal.finish()
    text = file.read_text()
    assert text
    assert "prompt" not in text
    assert "> " not in text


def test_a_model_for_plain_completion_does_not_chat(base: Path) -> None:
    with Terminal("run", "-m", str(base)) as terminal:
        output, code = terminal.finish()
    assert code == 2
    assert output.startswith("ModelError: base.gguf has no chat template\nhint: ")
    assert "--raw" in output


@pytest.mark.parametrize("no_color", ["", "1"])
def test_the_line_of_figures_is_grey(tiny: Path, no_color: str) -> None:
    with Terminal("run", "-m", str(tiny), *SHORT, NO_COLOR=no_color) as terminal:
        terminal.read_until("> ")
        terminal.type("hello\n")
        output = terminal.read_until("tokens")
    assert ("\x1b[90mprompt " in output) == (not no_color)


def test_variables_reach_every_turn(tmp_path: Path) -> None:
    metadata = {"tokenizer.chat_template": FAMILIES["smollm3"]}
    model = tiny_llama(tmp_path / "tools.gguf", context_length=4096, tied=False, extra_metadata=metadata)
    messages = [{"role": "user", "content": "hello"}]
    expected = len(LLM(model).render_chat(messages, template_vars={"enable_thinking": False}))
    assert expected != len(LLM(model).render_chat(messages))
    with chat(model, *SHORT, "--template-var", "enable_thinking=false") as terminal:
        assert number(say(terminal, "hello")[1]["prompt"]) == expected
        terminal.type("/reset\n")
        terminal.read_until("\n> ")
        assert number(say(terminal, "hello")[1]["prompt"]) == expected


def test_a_variable_that_the_template_does_not_know_ends_it_at_once(tiny: Path) -> None:
    with Terminal("run", "-m", str(tiny), "--template-var", "enable_thinking=false") as terminal:
        output, code = terminal.finish()
    assert code == 2
    assert "the chat template has no variable 'enable_thinking'" in output
