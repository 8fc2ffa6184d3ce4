"""`kvik serve` as a process of its own, and a model that writes tool calls for it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tool_templates
from checkpoints import tiny_config, tiny_tensors, write_safetensors

PATIENCE_S = 120.0


@contextmanager
def serving(*arguments: str) -> Iterator[str]:
    """The URL of a server on a free port, which ends with the block."""
    path = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "kvik", "serve", *arguments, "--port", "0", "--drain", "1"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stdout=log, stderr=log)
        try:
            yield _url(process, log.fileno())
        finally:
            process.terminate()
            process.wait(PATIENCE_S)


def _url(process: subprocess.Popen[bytes], log: int) -> str:
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        said = os.pread(log, 1 << 16, 0).decode()
        if found := re.search(r"serves at (http://\S+)/v1", said):
            return found[1]
        assert process.poll() is None, said
        assert time.monotonic() < deadline_s, said
        time.sleep(0.05)


def tools_checkpoint(folder: Path) -> Path:
    """Random weights under a template like those of Qwen, which lists tools and writes calls."""
    template, tokenizer = tool_templates.make(folder, tool_templates.SUPPORTED["qwen2.5"])
    (folder / "chat_template.jinja").write_text(template.source)
    config = tiny_config(vocab_size=tokenizer.vocab_size, max_position_embeddings=4096)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", tiny_tensors(config, seed=3))
    return folder
