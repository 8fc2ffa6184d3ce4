"""llama-cpp-python as a worker: its `generate`, which keeps what the last prompt and the next have in common."""

from __future__ import annotations

import itertools

import llama_cpp

from protocol import CannotDo, Worker, now, seconds_between, serve

CONTEXT = 8192


class LlamaCppPythonWorker(Worker):
    """The defaults, but for context and threads."""

    def __init__(self, model: str, threads: int) -> None:
        self.llm = llama_cpp.Llama(model, n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False)

    def describe(self) -> str:
        return f"llama-cpp-python {llama_cpp.__version__}: the file's weights, f16 keys and values, no flash attention"

    def first_token(self, prompt: list[int]) -> float:
        started_s = now()
        next(self.llm.generate(prompt, temp=0.0))
        return now() - started_s

    def tokens(self, prompt: list[int], count: int) -> list[int]:
        return list(itertools.islice(self.llm.generate(prompt, temp=0.0), count))

    def decode(self, prompts: list[list[int]], count: int) -> float:
        if len(prompts) > 1:
            raise CannotDo("not through its Llama class, which takes one sequence at a time")
        times: list[float] = []
        for _ in self.llm.generate(prompts[0], temp=0.0):
            times.append(now())
            if len(times) > count:
                break
        return seconds_between(times, count)


if __name__ == "__main__":
    serve(LlamaCppPythonWorker)
