"""What `--json` prints: stable names, seconds `_s`, bytes `_bytes`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvik.cli.options import EngineOptions
from kvik.cli.terminal import write
from kvik.files.output import whole_file

if TYPE_CHECKING:
    from kvik.config import SamplingParams
    from kvik.engine.llm import LLM
    from kvik.engine.output import Completion, Stats, TokenLogprobs


def request_report(
    engine: EngineOptions,
    llm: LLM,
    options: Mapping[str, Any],
    prompt: str,
    prompt_ids: list[int],
    params: SamplingParams,
) -> dict[str, Any]:
    """What was asked: of which model, run how, with which prompt and parameters."""
    return {
        "model": {"name": engine.model, "path": str(llm.model.path)},
        "engine": asdict(llm.config) | {"context": llm.model.context},
        "prompt": {"text": prompt, "token_ids": prompt_ids, **options},
        "params": asdict(params),
    }


def completion_report(completion: Completion) -> dict[str, Any]:
    """What came back."""
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "seed": completion.seed,
        "logprobs": None if completion.logprobs is None else [_logprobs_report(one) for one in completion.logprobs],
        "stats": stats_report(completion.stats),
    }


def stats_report(stats: Stats) -> dict[str, Any]:
    """All figures of an answer, those that follow from others included."""
    derived = [name for name, member in vars(type(stats)).items() if isinstance(member, property)]
    return asdict(stats) | {name: getattr(stats, name) for name in derived}


def write_report(report: dict[str, Any]) -> None:
    """Print it in one line: ASCII, so that no terminal or pipe can spoil it."""
    write(json.dumps(report, allow_nan=False) + "\n")


def save_text(path: Path, text: str) -> None:
    """All of the file or nothing: a half-written one replaces no other. Raises `InvalidInput`."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _logprobs_report(logprobs: TokenLogprobs) -> dict[str, Any]:
    top = [{"token_id": token_id, "logprob": logprob} for token_id, logprob in logprobs.top.items()]
    return {"token_id": logprobs.token_id, "logprob": logprobs.logprob, "top": top}
