"""kvik as a worker, like its peers: the public API for one prompt, the engine's steps for a batch."""

from __future__ import annotations

import kvik
from kvik import LLM, SamplingParams
from protocol import Worker, now, seconds_between, serve


class KvikWorker(Worker):
    """The defaults, but for the threads."""

    def __init__(self, model: str, threads: int) -> None:
        self.llm = LLM(model, threads=threads)

    def describe(self) -> str:
        return f"kvik {kvik.__version__}: the file's weights, int8 activations, f16 keys and values, prefix cache"

    def first_token(self, prompt: list[int]) -> float:
        started_s = now()
        next(iter(self.llm.stream(prompt, SamplingParams(max_tokens=1, ignore_eos=True))))
        return now() - started_s

    def tokens(self, prompt: list[int], count: int) -> list[int]:
        return self.llm.generate([prompt], SamplingParams(max_tokens=count, ignore_eos=True))[0].token_ids

    def decode(self, prompts: list[list[int]], count: int) -> float:
        params = SamplingParams(max_tokens=count + 1, ignore_eos=True)
        if len(prompts) == 1:
            return seconds_between([now() for _ in self.llm.stream(prompts[0], params)], count)
        # The first tokens of all prompts, so that their keys and values are in the cache; then all of them together.
        engine = self.llm.engine
        self.llm.generate(prompts, SamplingParams(max_tokens=1, ignore_eos=True))
        sequences = [engine.new_sequence(engine.new_request(prompt, params)) for prompt in prompts]
        for sequence in sequences:
            engine.add(sequence)
        while any(sequence.num_completion_tokens == 0 for sequence in sequences):
            engine.step()
        already = sum(sequence.num_completion_tokens - 1 for sequence in sequences)
        started_s = now()
        while engine.scheduler.has_work:
            engine.step()
        # A few may have begun to write while others' prompts were computed: their tokens' share of the time is added.
        total = count * len(prompts)
        return (now() - started_s) * total / (total - already)


if __name__ == "__main__":
    serve(KvikWorker)
