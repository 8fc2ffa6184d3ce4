"""transformers as a worker: `generate` of a model whose GGUF weights it makes bfloat16 or float32."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers

from protocol import Worker, now, seconds_between, serve

DTYPE = getattr(torch, os.environ.get("PEER_DTYPE", "float32"))


class Clock(transformers.generation.streamers.BaseStreamer):  # type: ignore[misc]
    """Notes when tokens come; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(now())

    def end(self) -> None:
        pass


class TransformersWorker(Worker):
    """Its default cache and attention."""

    def __init__(self, model: str, threads: int) -> None:
        torch.set_num_threads(threads)
        path = Path(model)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=DTYPE
        )

    def describe(self) -> str:
        attention = self.model.config._attn_implementation
        return (
            f"transformers {transformers.__version__}, torch {torch.__version__}: weights, keys and values as"
            f" {str(DTYPE).removeprefix('torch.')}, attention {attention}, nothing kept between calls"
        )

    def first_token(self, prompt: list[int]) -> float:
        started_s = now()
        return self._times([prompt], 1)[0] - started_s

    def tokens(self, prompt: list[int], count: int) -> list[int]:
        found: list[int] = self._generate([prompt], count)[0, len(prompt) :].tolist()
        return found

    def decode(self, prompts: list[list[int]], count: int) -> float:
        return seconds_between(self._times(prompts, count + 1), count)

    def _times(self, prompts: list[list[int]], count: int) -> list[float]:
        clock = Clock()
        self._generate(prompts, count, clock)
        return clock.times[1:]

    def _generate(self, prompts: list[list[int]], count: int, clock: Clock | None = None) -> Any:
        ids = torch.tensor(prompts)
        return self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            streamer=clock,
            pad_token_id=0,
        )


if __name__ == "__main__":
    serve(TransformersWorker)
