"""`kvik serve` as a command, and other people's clients of it, which have a venv of their own (`make test-clients`)."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from server_process import wait_until
from tool_model import write_tool_model

# Without them there is nothing to try; the summary says that these tests were left out.
collect_ignore_glob = [] if find_spec("lm_eval") is not None else ["test_*.py"]

ROWS = [
    {"question": "The capital of France is", "choices": ["Paris", "Berlin", "a potato"], "answer": 0},
    {"question": "Two plus two is", "choices": ["five", "four"], "answer": 1},
    {"question": "The opposite of hot is", "choices": ["cold", "blue", "warm"], "answer": 0},
    {"question": "Water freezes at zero degrees", "choices": ["Celsius", "Fahrenheit"], "answer": 0},
]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
{more}
"""
CHOICE = """\
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"""
WRITE = """\
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n", "."], max_gen_toks: 12, temperature: 0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"""
ROLLING = """\
output_type: loglikelihood_rolling
doc_to_target: "{{question}} {{choices[answer]}}"
metric_list: [{metric: bits_per_byte}]"""


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory, default_model_path: Path) -> Iterator[str]:
    """Where a server of the default model, and of a random one that calls tools, is; it must end as it should."""
    folder = tmp_path_factory.mktemp("server")
    tools = write_tool_model(folder / "model")
    said = folder / "log"
    command = ["serve", f"smollm2={default_model_path}", f"tools={tools}", "--port", "0", "--kv-memory", "256MiB"]
    with said.open("w") as log, subprocess.Popen([sys.executable, "-m", "kvik", *command], stderr=log) as process:
        wait_until(lambda: process.poll() is not None or "Try: curl" in said.read_text())
        found = re.search(r"kvik serves at (\S+)", said.read_text())
        assert found is not None, said.read_text()
        try:
            yield found[1]
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert "Traceback" not in said.read_text()


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with tasks for lm-eval, of each kind of request that it sends."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    for name, more in (("kvik_choice", CHOICE), ("kvik_write", WRITE), ("kvik_rolling", ROLLING)):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, rows=rows, more=more))
    return tmp_path
