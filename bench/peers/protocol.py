"""What a peer's worker and the driver say to each other: a line of JSON for a line of JSON. Only the standard library.

A worker is started as `python WORKER MODEL THREADS`, says what it is, and then answers each request:

* first_token: seconds from a prompt that is new to its first token
* repeated: the same prompt twice; seconds to the first token of the second
* tokens: the `count` greedy tokens behind a prompt
* decode: prompts of equal length and `count` more tokens for each: seconds for all of these

As `python WORKER MODEL THREADS first` it prints a line when it has the first token of a short prompt, and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

SHORT_PROMPT = [1000 + index for index in range(10)]


class CannotDo(Exception):
    """The peer has no way to do it; the text says why."""


class Worker(ABC):
    """One engine with a loaded model."""

    @abstractmethod
    def describe(self) -> str:
        """Its version, and what it makes of the file."""

    @abstractmethod
    def first_token(self, prompt: list[int]) -> float:
        """Seconds to the first token."""

    @abstractmethod
    def decode(self, prompts: list[list[int]], count: int) -> float:
        """Seconds in which all sequences together got `count` tokens each behind their first one."""

    @abstractmethod
    def tokens(self, prompt: list[int], count: int) -> list[int]:
        """So many greedy tokens behind the prompt."""

    def repeated(self, prompt: list[int]) -> float:
        """Seconds to the first token of a prompt that was just answered."""
        self.first_token(prompt)
        return self.first_token(prompt)


def peak_bytes() -> int:
    """The most memory that this process had."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def serve(make: Any) -> None:
    """Answer requests from stdin until it is closed; whatever the peer itself prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    model, threads, *mode = sys.argv[1:]
    worker: Worker = make(model, int(threads))
    if mode:
        worker.first_token(SHORT_PROMPT)
        answers.write("first token\n")
        return
    answers.write(json.dumps({"is": worker.describe()}) + "\n")
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            if request["do"] == "tokens":
                answer = {"tokens": worker.tokens(request["prompt"], request["count"])}
            else:
                answer = {"seconds": _answer(worker, request), "peak_bytes": peak_bytes()}
        except CannotDo as reason:
            answer = {"cannot": str(reason)}
        except Exception as error:  # noqa: BLE001  # a peer may raise anything, and the table shows it
            answer = {"cannot": f"{type(error).__name__}: {error}"[:300]}
        answers.write(json.dumps(answer) + "\n")
        with contextlib.suppress(BrokenPipeError):
            answers.flush()


def _answer(worker: Worker, request: dict[str, Any]) -> float:
    match request["do"]:
        case "first_token":
            return worker.first_token(request["prompt"])
        case "repeated":
            return worker.repeated(request["prompt"])
        case "decode":
            return worker.decode(request["prompts"], request["count"])
    raise CannotDo(f"no request is called {request['do']!r}")


def seconds_between(times: list[float], count: int) -> float:
    """From the first of `count` + 1 tokens to the last; a peer that wrote fewer stopped early."""
    if len(times) != count + 1:
        raise CannotDo(f"it wrote {len(times)} tokens in place of {count + 1}")
    return times[-1] - times[0]


now = time.perf_counter
