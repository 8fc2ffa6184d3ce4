"""The raw trace in the format of chrome://tracing and ui.perfetto.dev.

Source: "Trace Event Format" (Google, 2016): complete events "X" and metadata "M", times in microseconds.
"""

from __future__ import annotations

from typing import Any

from kvik import __version__
from kvik.explain.page_data import step_figures
from kvik.explain.run import TracedLane, TracedRun
from kvik.machine import processor_name

_STEPS, _OPS = 1, 2  # thread ids


def perfetto_trace(run: TracedRun, model_name: str) -> dict[str, Any]:
    """A process for each lane: one track of steps as the engine ran them, one of the ops of their watched repetition.

    Each op carries a hash of its last row: where both lanes have the same one, they computed the same bits.
    """
    tokenizer = run.llm.model.tokenizer
    start_s = min(traced.tracer.steps[0].started_s for traced in (run.with_cache, run.without))
    events: list[dict[str, Any]] = []
    for process, traced in enumerate((run.with_cache, run.without), start=1):
        events += _names(process, traced)
        chosen = traced.lane.sequence.completion_ids
        for index, step in enumerate(traced.tracer.steps):
            figures = step_figures(traced, index)
            text = tokenizer.token_text(chosen[index])
            likely = [
                {
                    "token_id": one.token_id,
                    "text": tokenizer.token_text(one.token_id),
                    "probability": one.probability,
                    "logit": one.logit,
                }
                for one in step.candidates
            ]
            events.append(
                {
                    "name": f"step {index}: {step.num_tokens} token{'s' * (step.num_tokens != 1)}",
                    "cat": "step",
                    "ph": "X",
                    "pid": process,
                    "tid": _STEPS,
                    "ts": 1e6 * (step.started_s - start_s),
                    "dur": 1e6 * step.seconds,
                    "args": {"step": index, "token_id": chosen[index], "text": text, **figures, "candidates": likely},
                }
            )
            events += [
                {
                    "name": f"{call.name} {call.weights}".rstrip(),
                    "cat": call.place,
                    "ph": "X",
                    "pid": process,
                    "tid": _OPS,
                    "ts": 1e6 * (call.started_s - start_s),
                    "dur": 1e6 * call.seconds,
                    "args": {"place": call.place, "shapes": call.shapes, "bits": call.bits, "step": index},
                }
                for call in step.calls
            ]
    return {
        "displayTimeUnit": "ms",
        "otherData": {
            "producer": f"kvik {__version__}",
            "model": model_name,
            "processor": processor_name(),
            "prompt": tokenizer.decode(run.prompt_ids, skip_special=False),
            "text": tokenizer.decode(run.token_ids, skip_special=False),
            "num_prompt_tokens": len(run.prompt_ids),
            "is_same": run.is_same,
        },
        "traceEvents": events,
    }


def _names(process: int, traced: TracedLane) -> list[dict[str, Any]]:
    names = {_STEPS: "steps, as they ran", _OPS: "the same steps again, op by op"}
    return [
        {"name": "process_name", "ph": "M", "pid": process, "tid": 0, "args": {"name": traced.lane.name}},
        *(
            {"name": "thread_name", "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
            for thread, name in names.items()
        ),
    ]
