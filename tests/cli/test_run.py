"""`kvik run` with one prompt: what goes where, in which form, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import CTRL_C, Kvik, Terminal
from gguf_files import tiny_llama
from kvik import LLM, SamplingParams
from kvik.cli.template import TemplateOptions
from kvik.cli.terminal import INTERRUPTED
from kvik.config import MIXED_BUDGET, TOKEN_BUDGET
from template_families import FAMILIES, TOOLS

GREY, END = "\x1b[90m", "\x1b[0m"


def report(kvik: Kvik, *arguments: str, stdin: bytes | str = b"") -> dict[str, Any]:
    result = kvik("run", "--json", *arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    values = json.loads(result.stdout)
    assert isinstance(values, dict)
    return values


def refusal(kvik: Kvik, *arguments: str, stdin: bytes | str = b"") -> str:
    """The error line, which comes with a hint, exit code 2 and nothing on stdout."""
    result = kvik(*arguments, stdin=stdin)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    first, second = result.stderr.splitlines()
    assert second.startswith("hint: ")
    return first


def test_the_answer_is_that_of_the_api(kvik: Kvik, tiny: Path) -> None:
    result = kvik("run", "hello", "--max-tokens", "40")
    expected = LLM(str(tiny)).chat([{"role": "user", "content": "hello"}], SamplingParams(max_tokens=40)).text
    assert result.exit_code == 0
    assert result.stdout == expected.removesuffix("\n") + "\n"
    assert result.stderr == ""


def test_raw_continues_the_text(kvik: Kvik, tiny: Path) -> None:
    result = kvik("run", "--raw", "hello", "--max-tokens", "40", "--no-cache", "--seed", "1", "--temperature", "1")
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=1)
    assert result.stdout == LLM(str(tiny)).generate("hello", params)[0].text.removesuffix("\n") + "\n"


def test_stats_are_shown_when_asked_for(kvik: Kvik) -> None:
    result = kvik("run", "hello", "--max-tokens", "5", "--ignore-eos", "--stats", "--no-cache")
    assert result.stderr.startswith("prompt ")
    assert result.stderr.endswith(" · cut at 5 tokens\n")
    assert " · no cache: " in result.stderr


def test_json_is_complete(kvik: Kvik, tiny: Path) -> None:
    values = report(kvik, "hello", "--max-tokens", "7", "--ignore-eos", "--logprobs", "2", "--system", "be brief")
    assert list(values) == [
        "model",
        "engine",
        "prompt",
        "params",
        "use_cache",
        "text",
        "token_ids",
        "finish_reason",
        "seed",
        "logprobs",
        "stats",
    ]
    assert values["model"] == {"name": str(tiny), "path": str(tiny)}
    assert set(values["engine"]) == {
        "activations",
        "weights",
        "kv_dtype",
        "context",
        "threads",
        "token_budget",
        "mixed_budget",
        "backend",
        "kv_memory",
        "prefix_cache",
        "max_running",
        "max_waiting",
        "store",
        "store_quota",
        "store_policy",
        "store_key",
        "packed_cache",
    }
    assert values["engine"]["context"] == 1 << 17
    assert set(values["prompt"]) == {"text", "token_ids", "raw", "system", "tools", "template_vars"}
    assert values["prompt"]["text"] == "hello"
    assert set(values["params"]) == {
        "max_tokens",
        "min_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "stop",
        "stop_token_ids",
        "seed",
        "logprobs",
        "ignore_eos",
        "n",
        "echo",
        "speculate",
    }
    assert set(values["stats"]) == {
        "num_prompt_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_completion_tokens",
        "time_to_first_token_s",
        "decode_s",
        "kv_bytes",
        "weight_bytes",
        "num_drafted_tokens",
        "num_accepted_tokens",
        "num_preemptions",
        "miss_reason",
        "num_stored_tokens",
        "load_s",
        "saved_s",
        "time_per_output_token_s",
        "tokens_per_s",
        "total_s",
    }
    assert values["finish_reason"] == "length"
    assert len(values["token_ids"]) == len(values["logprobs"]) == values["stats"]["num_completion_tokens"] == 7
    for token_id, entry in zip(values["token_ids"], values["logprobs"], strict=True):
        assert set(entry) == {"token_id", "logprob", "top"}
        assert entry["token_id"] == entry["top"][0]["token_id"] == token_id
        assert len(entry["top"]) == 2
    assert len(values["prompt"]["token_ids"]) == values["stats"]["num_prompt_tokens"]
    assert values["stats"]["kv_bytes"] > 0


def test_json_repeats_with_the_seed_that_it_tells(kvik: Kvik) -> None:
    first = report(kvik, "hello", "--max-tokens", "20", "--temperature", "1")
    again = report(kvik, "hello", "--max-tokens", "20", "--temperature", "1", "--seed", str(first["seed"]))
    assert again["token_ids"] == first["token_ids"]
    assert first["logprobs"] is None


def test_every_sampling_option_arrives(kvik: Kvik) -> None:
    options = {
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.25,
        "seed": 11,
        "logprobs": 0,
        "speculate": "ngram",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    arguments += ["--stop", "one", "--stop", "two", "--stop-token-id", "5", "--stop-token-id", "6", "--ignore-eos"]
    engine = ["--activations", "int16", "--kv-dtype", "f32", "--context", "300", "--threads", "1", "--no-cache"]
    engine += ["--kv-memory", "512MiB"]
    values = report(kvik, "hello", *arguments, *engine)
    others = {
        "stop": ["one", "two"],
        "stop_token_ids": [5, 6],
        "ignore_eos": True,
        "n": 1,
        "echo": False,
        "logit_bias": [],
    }
    assert values["params"] == options | others
    config = {"activations": "int16", "kv_dtype": "f32", "context": 300, "threads": 1, "kv_memory": 512 << 20}
    config |= {"token_budget": TOKEN_BUDGET, "mixed_budget": MIXED_BUDGET, "backend": "native", "prefix_cache": True}
    config |= {"max_running": 64, "max_waiting": 1024}
    config |= {"store": None, "store_quota": 2 * 10**9, "store_policy": "end", "store_key": None, "packed_cache": None}
    config["weights"] = None
    assert values["engine"] == config
    assert values["use_cache"] is False


@pytest.mark.parametrize(
    ("arguments", "stdin", "prompt"),
    [
        (["hello"], "", "hello"),
        (["hello"], "the rest of a shell's loop\n", "hello"),
        (["sum it up", "-"], "one\ntwo\n", "sum it up\n\none\ntwo"),
        ([], "one\ntwo\n", "one\ntwo"),
        (["-"], "one\ntwo\n", "one\ntwo"),
        ([], "one\r\n", "one"),
        ([], "one\n\n", "one\n"),
        ([], "caf\u00e9", "caf\u00e9"),
    ],
)
def test_a_pipe_is_the_prompt_or_a_part_of_it(kvik: Kvik, arguments: list[str], stdin: str, prompt: str) -> None:
    assert report(kvik, *arguments, "--max-tokens", "1", stdin=stdin)["prompt"]["text"] == prompt


@pytest.mark.parametrize("command", [["run"], ["race", "--lengths", "none"], ["explain", "--trace", "t.json"]])
def test_a_prompt_leaves_stdin_to_the_shell_s_loop(tiny: Path, tmp_path: Path, command: list[str]) -> None:
    script = 'while read -r line; do "$@" "$line" >/dev/null 2>&1 || exit 3; echo "$line"; done'
    options = [command[0], "-m", str(tiny), "--max-tokens", "1", *command[1:]]
    path = os.pathsep.join(filter(None, sys.path))
    result = subprocess.run(
        ["sh", "-c", script, "sh", sys.executable, "-m", "kvik", *options],
        env=os.environ | {"PYTHONPATH": path},
        cwd=tmp_path,
        input="one\ntwo\nthree\n",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (result.returncode, result.stdout) == (0, "one\ntwo\nthree\n")


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        (["sum it up", "-"], " \n", "InvalidInput: stdin is empty"),
        (["-"], "", "InvalidInput: the prompt is empty"),
        (["-", "-"], "one", "InvalidInput: - is given twice"),
    ],
)
def test_a_dash_without_text_to_read_is_refused(kvik: Kvik, arguments: list[str], stdin: str, said: str) -> None:
    assert refusal(kvik, "run", *arguments, stdin=stdin) == said


def test_a_stdin_that_cannot_be_read_is_refused(tiny: Path, tmp_path: Path) -> None:
    with (tmp_path / "only for writing").open("w") as file:
        result = subprocess.run(
            [sys.executable, "-m", "kvik", "run", "-m", str(tiny)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=file,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert result.returncode == 2
    assert result.stderr.splitlines()[0] == "InvalidInput: stdin cannot be read: Bad file descriptor"
    assert result.stderr.splitlines()[1].startswith("hint: ")


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        (r"\n", "\n"),
        (r"\n\n###", "\n\n###"),
        (r"a\tb\r", "a\tb\r"),
        (r"\\n", r"\n"),
        (r"\x41\xe9", "Aé"),
        (r"\u00e9\u4f60", "é你"),
        ("\n", "\n"),
    ],
)
def test_escapes_in_a_stop_text_mean_their_characters(kvik: Kvik, typed: str, text: str) -> None:
    values = report(kvik, "hello", "--max-tokens", "1", "--stop", typed)
    assert values["params"]["stop"] == [text]


@pytest.mark.parametrize("typed", [r"\q", r"a\ "[:-1], r"\x4", r"\xzz", r"\u12", r"\ud800", r"\N{DIGIT ONE}", r"\0"])
def test_other_escapes_in_a_stop_text_are_refused(kvik: Kvik, typed: str) -> None:
    result = kvik("run", "hello", "--stop", typed)
    assert result.exit_code == 2
    first, second = result.stderr.splitlines()
    assert first.startswith("InvalidInput: --stop has ")
    assert r"\n, \t, \r, \\, \xNN or \uNNNN" in second


def test_a_closed_stdin_is_no_prompt(kvik: Kvik, monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    command = f'exec "{sys.executable}" -m kvik run --max-tokens 1 "$@" <&-'
    path = os.pathsep.join(filter(None, sys.path))
    for arguments, code in ((["hello"], 0), ([], 2)):
        result = subprocess.run(
            ["sh", "-c", command, "sh", *arguments],
            env=os.environ | {"PYTHONPATH": path, "KVIK_MODEL": str(tiny)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == code, result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [[""], [" \n"], []])
def test_an_empty_prompt_is_refused(kvik: Kvik, arguments: list[str]) -> None:
    assert refusal(kvik, "run", *arguments) == "InvalidInput: the prompt is empty"


def test_stdin_that_is_not_utf8_is_refused(kvik: Kvik) -> None:
    line = refusal(kvik, "run", stdin=b"caf\xe9")
    assert line == "InvalidInput: stdin is not UTF-8: byte 0xe9 at offset 3"


@pytest.mark.parametrize("option", [[], ["hi", "--system"], ["hi", "--stop"]])
def test_arguments_that_are_not_utf8_are_refused(kvik: Kvik, option: list[str]) -> None:
    name = option[1] if option else "the prompt"
    assert refusal(kvik, "run", *option, "a\udcff") == f"InvalidInput: {name} is not UTF-8: byte 0xff at offset 1"


def test_a_stdin_without_end_is_refused(kvik: Kvik, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvik.cli.prompt.MAX_STDIN_BYTES", 1000)
    assert refusal(kvik, "run", stdin=b"x" * 1001) == "InvalidInput: stdin has more than 1,000 bytes"


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(kvik: Kvik) -> None:
    line = refusal(kvik, "run", "--raw", "--context", "64", stdin="q" * 1234)
    assert line == "PromptTooLong: the prompt has 1,234 tokens, the context holds 64 with the answer"


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("--max-tokens", "0", "max_tokens"),
        ("--min-tokens", "-1", "min_tokens"),
        ("--min-tokens", "300", "min_tokens"),
        ("--temperature", "-0.1", "temperature"),
        ("--temperature", "nan", "temperature"),
        ("--top-k", "-1", "top_k"),
        ("--top-p", "0", "top_p"),
        ("--min-p", "1.5", "min_p"),
        ("--repetition-penalty", "0", "repetition_penalty"),
        ("--presence-penalty", "inf", "presence_penalty"),
        ("--frequency-penalty", "-101", "frequency_penalty"),
        ("--stop", "", "stop"),
        ("--stop-token-id", "-1", "stop_token_ids"),
        ("--seed", "-1", "seed"),
        ("--context", "1", "context"),
        ("--context", "1000000", "context"),
        ("--threads", "0", "threads"),
    ],
)
def test_values_out_of_range_are_refused_by_name(kvik: Kvik, option: str, value: str, name: str) -> None:
    line = refusal(kvik, "run", "hello", option, value)
    assert line.startswith("InvalidInput: ")
    assert name in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["hello", "--logprobs", "3"], "--logprobs"),
        (["hello", "--json", "--logprobs", "21"], "logprobs is 21"),
        (["hello", "--raw", "--system", "x"], "--system"),
    ],
)
def test_options_that_do_not_go_together_are_refused(kvik: Kvik, arguments: list[str], said: str) -> None:
    assert said in refusal(kvik, "run", *arguments)


@pytest.mark.parametrize("name", ["smallm2", "./none.gguf"])
def test_an_unknown_model_is_refused(kvik: Kvik, name: str) -> None:
    result = kvik("run", "-m", name, "hello")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("ModelNotFound: ")
    assert name in result.stderr
    assert "smollm2" in result.stderr.splitlines()[1]


def test_a_model_for_plain_completion_needs_raw(kvik: Kvik, base: Path) -> None:
    result = kvik("run", "-m", str(base), "hello")
    assert result.exit_code == 2
    assert "--raw" in result.stderr
    assert kvik("run", "-m", str(base), "--raw", "hello", "--max-tokens", "3").exit_code == 0


def test_ctrl_c_keeps_what_was_written(kvik: Kvik, interrupt_at: Callable[[int], None]) -> None:
    whole = report(kvik, "hello", "--max-tokens", "50", "--ignore-eos")
    interrupt_at(12)
    result = kvik("run", "hello", "--max-tokens", "50", "--ignore-eos", "--json")
    values = json.loads(result.stdout)
    assert result.exit_code == INTERRUPTED
    assert values["finish_reason"] == "abort"
    assert values["token_ids"] == whole["token_ids"][:12]


def test_ctrl_c_ends_the_line_and_tells(kvik: Kvik, interrupt_at: Callable[[int], None]) -> None:
    interrupt_at(3)
    result = kvik("run", "hello", "--ignore-eos", "--stats")
    assert result.exit_code == INTERRUPTED
    assert result.stdout.endswith("\n")
    assert result.stderr.endswith(" · interrupted after 3 tokens\n")


def test_a_reader_that_leaves_ends_it_quietly(tiny: Path) -> None:
    path = os.pathsep.join(filter(None, sys.path))
    process = subprocess.Popen(
        [sys.executable, "-m", "kvik", "run", "hello", "--ignore-eos", "--max-tokens", "100000"],
        env=os.environ | {"PYTHONPATH": path, "KVIK_MODEL": str(tiny)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 1


def test_a_terminal_shows_the_figures_in_grey(tiny: Path) -> None:
    with Terminal("run", "-m", str(tiny), "hello", "--max-tokens", "5", "--ignore-eos", NO_COLOR="") as terminal:
        # There is no end of stdin on a terminal, and the prompt is given: nothing is read.
        output, code = terminal.finish()
    line = output.splitlines()[-1]
    assert code == 0
    assert line.startswith(f"{GREY}prompt ")
    assert line.endswith(END)


@pytest.mark.parametrize(("no_color", "term"), [("1", "xterm"), ("", "dumb")])
def test_no_colours_where_they_are_not_wanted(tiny: Path, no_color: str, term: str) -> None:
    with Terminal("run", "-m", str(tiny), "hello", "--max-tokens", "5", NO_COLOR=no_color, TERM=term) as terminal:
        output, code = terminal.finish()
    assert code == 0
    assert "prompt " in output
    assert "\x1b" not in output


def test_ctrl_c_on_a_terminal(tiny: Path) -> None:
    with Terminal("run", "-m", str(tiny), "hello", "--ignore-eos", "--max-tokens", "100000") as terminal:
        terminal.read_until("\ufffd")
        terminal.type(CTRL_C)
        terminal.read_until(" · interrupted after ")
        assert terminal.finish()[1] == -signal.SIGINT


@pytest.mark.parametrize("option", ["--raw", "--json"])
def test_no_prompt_and_nobody_to_chat_with_is_refused(tiny: Path, option: str) -> None:
    with Terminal("run", "-m", str(tiny), option) as terminal:
        output, code = terminal.finish()
    assert code == 2
    assert output.startswith(f"InvalidInput: {option} needs a prompt\nhint: ")


def test_a_model_cannot_steer_the_terminal(tmp_path: Path) -> None:
    """A model that writes nothing but escape characters."""
    model = tiny_llama(tmp_path / "escape.gguf", vocab_size=320)
    with Terminal("run", "-m", str(model), "--raw", "\x1b" * 50, "--max-tokens", "5", "--ignore-eos") as terminal:
        output, code = terminal.finish()
    assert code == 0
    assert "\x1b" not in output


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template knows tools and thinking."""
    metadata = {"tokenizer.chat_template": FAMILIES["smollm3"]}
    path = tmp_path_factory.mktemp("run") / "tools.gguf"
    return tiny_llama(path, context_length=4096, tied=False, extra_metadata=metadata)


def test_tools_and_variables_reach_the_template(kvik: Kvik, with_tools: Path, tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    options = ["--tools", str(tmp_path / "tools.json"), "--template-var", "enable_thinking=false"]
    values = report(kvik, "-m", str(with_tools), "hello", "--max-tokens", "1", *options)
    expected = LLM(with_tools).render_chat(
        [{"role": "user", "content": "hello"}], tools=TOOLS, template_vars={"enable_thinking": False}
    )
    assert values["prompt"] == {
        "text": "hello",
        "token_ids": expected,
        "raw": False,
        "system": None,
        "tools": TOOLS,
        "template_vars": {"enable_thinking": False},
    }


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("true", True), ("false", False), ("null", None), ("3", 3), ("-0.5", -0.5), ("high", "high"), ("", ""),
        ('"true"', "true"), ("[1, 2]", [1, 2]), ('{"a": [null]}', {"a": [None]}), ("a=b", "a=b"), ("NaN", "NaN"),
        ("1 Jan 2026", "1 Jan 2026"), ("True", "True"),
    ],
)  # fmt: skip
def test_a_variable_is_json_or_a_bare_word(typed: str, value: object) -> None:
    assert TemplateOptions(template_var=[f"enable_thinking={typed}"]).read(raw=False).template_vars == {
        "enable_thinking": value
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--template-var", "enable_thinking"], "--template-var is 'enable_thinking'"),
        (["--template-var", "=1"], "template_vars has ''"),
        (["--template-var", "a b=1"], "template_vars has 'a b'"),
        (["--template-var", "messages=[]"], "template_vars has 'messages'"),
        (["--template-var", "a=1", "--template-var", "a=2"], "--template-var sets 'a' twice"),
        (["--template-var", "a=[1"], "--template-var 'a' is not JSON"),
        (["--template-var", "a=1", "--raw"], "--template-var is for the chat template, --raw uses none"),
        (["--template-var", "a=1"], "the chat template has no variable 'a'"),
        (["--tools", "none.json"], "--tools is none.json: No such file or directory"),
        (["--tools", "good.json"], "the chat template takes no tools"),
        (["--tools", "good.json", "--raw"], "--tools is for the chat template, --raw uses none"),
        (["--tools", "broken.json"], "--tools is broken.json, which is not JSON"),
        (["--tools", "object.json"], "--tools is object.json, whose JSON is not a list"),
        (["--tools", "latin1.json"], "--tools is not UTF-8"),
        (["--tools", "bad.json"], "tools[0].type is 'x', not 'function'"),
        (["--tools", "."], "--tools is .: Is a directory"),
    ],
)
def test_bad_tools_and_variables_are_refused(
    kvik: Kvik, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = {"good": json.dumps(TOOLS), "broken": "[{", "object": "{}", "bad": '[{"type": "x"}]'}
    for name, text in texts.items():
        Path(f"{name}.json").write_text(text)
    Path("latin1.json").write_bytes(b'["caf\xe9"]')
    assert said in refusal(kvik, "run", "hello", *arguments)
