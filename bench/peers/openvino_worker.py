"""OpenVINO GenAI as a worker: its `LLMPipeline` on the CPU, which reads the GGUF file itself."""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino_genai

from protocol import CannotDo, Worker, now, seconds_between, serve


class OpenVinoWorker(Worker):
    """The defaults, but for the threads, the prefix cache, which is on, and the room of its cache."""

    def __init__(self, model: str, threads: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        scheduler.cache_size = 2  # GB
        self.pipeline = openvino_genai.LLMPipeline(
            model, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=threads
        )

    def describe(self) -> str:
        return (
            f"openvino-genai {openvino_genai.__version__.split('-')[0]}: the file as its GGUF reader takes it,"
            " keys and values as its CPU plugin chooses, prefix cache"
        )

    def first_token(self, prompt: list[int]) -> float:
        started_s = now()
        return self._times(prompt, 1)[0] - started_s

    def tokens(self, prompt: list[int], count: int) -> list[int]:
        return [int(token) for token in self._generate([prompt], count).tokens[0]]

    def decode(self, prompts: list[list[int]], count: int) -> float:
        if len(prompts) == 1:
            return seconds_between(self._times(prompts[0], count + 1), count)
        # No streamer takes a batch. Once its prefix cache has the prompts, a run of one token and one of all differ by
        # what is asked for.
        self._generate(prompts, 1)
        started_s = now()
        self._generate(prompts, 1)
        first_s = now() - started_s
        started_s = now()
        results = self._generate(prompts, count + 1)
        whole_s = now() - started_s
        if any(len(tokens) != count + 1 for tokens in results.tokens):
            raise CannotDo(f"it wrote {[len(tokens) for tokens in results.tokens]} tokens in place of {count + 1} each")
        return whole_s - first_s

    def _times(self, prompt: list[int], count: int) -> list[float]:
        times: list[float] = []

        class Clock(openvino_genai.StreamerBase):  # type: ignore[misc]
            def write(self, token: object) -> openvino_genai.StreamingStatus:
                times.extend([now()] * (len(token) if isinstance(token, list) else 1))
                return openvino_genai.StreamingStatus.RUNNING

            def end(self) -> None:
                pass

        self._generate([prompt], count, Clock())
        return times

    def _generate(self, prompts: list[list[int]], count: int, *streamer: object) -> openvino_genai.EncodedResults:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = count
        config.ignore_eos, config.do_sample = True, False
        ids = np.array(prompts, np.int64)
        inputs = openvino_genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        return self.pipeline.generate(inputs, config, *streamer)


if __name__ == "__main__":
    serve(OpenVinoWorker)
