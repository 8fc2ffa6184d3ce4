"""The live page before a server that a test plays: the events and answers that it gets."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable
from typing import Any

from playwright.sync_api import Page

ADDRESS = "http://127.0.0.1:9"
PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

Answers = dict[str, tuple[int, Any]]
Play = Callable[..., Page]

# The events are fed by `send`; before that each of `refusals` is answered once.
PLAYED = """
window.refusals = REFUSALS;
window.joined = 0;
const others = fetch;
window.fetch = async (path, options) => {
  if (path !== "/v1/events") return others(path, options);
  const refused = refusals.shift();
  if (refused) return new Response('{"error": {"message": "not now"}}', refused);
  joined += 1;
  const stream = new ReadableStream({ start: (controller) => (window.feed = controller) });
  return new Response(stream);
};
window.send = (name, data) => {
  const told = JSON.stringify({ now_s: performance.now() / 1000 + 1000, ...data });
  feed.enqueue(new TextEncoder().encode(`event: ${name}\\ndata: ${told}\\n\\n`));
};
"""

COUNTERS = dict.fromkeys(
    (
        *("held_blocks", "reusable_blocks", "free_blocks", "generated_tokens", "computed_tokens", "cached_tokens"),
        *("queried_tokens", "found_tokens", "committed_bytes", "evicted_blocks", "copied_blocks", "running", "waiting"),
    ),
    0,
)

PLAN = {
    "max_context": 4096,
    "kv_dtypes": ["f16", "int8"],
    "kv_dtype": "f16",
    "context": 1024,
    "users": 4,
    "attention": "GQA",
    "bytes": {"token": 1, "sequence": 1, "kv": 1, "weights": 1, "others": 1, "needed": 3, "memory": 4},
    "fits": True,
    "most_users": 4,
    "largest_context": 4096,
    "doubled": None,
    "advice": [],
}


def state(num_blocks: int = 64, requests: list[dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
    """A model with that many blocks, which are free but for those that requests hold."""
    states = bytearray(num_blocks)
    for row in requests or ():
        for block in row["blocks"][0]:
            states[block] += 2
    model = {
        "id": "played",
        "is_chat": True,
        "context": 4096,
        "block_size": 32,
        "token_bytes": 1024,
        "kv_dtype": "int8",
        "num_bytes": num_blocks << 15,
        "weight_bytes": 1 << 20,
        "groups": [{"kind": "full", "layers": 2, "block_bytes": 1 << 15, "num_blocks": num_blocks}],
        "states": [base64.b64encode(states).decode()],
        "requests": requests or [],
        "hits": [[], []],
        "counters": COUNTERS | {"free_blocks": num_blocks},
        "history": {"names": ["at_s", *COUNTERS], "rows": []},
    }
    return {"sees_text": True, "models": [model | changes]}


def request(key: int, phase: str = "decode", blocks: list[int] | None = None, **changes: Any) -> dict[str, Any]:
    """A row of one that is as far as its phase says, submitted a second after the one before."""
    times = {"queued": 1, "prefill": 2, "decode": 4, "done": 4}[phase]
    names = ("submitted_s", "begun_s", "first_token_s", "last_token_s")
    return {
        "key": key,
        "request_id": f"req-{key:024x}",
        "choice": 0,
        "prompt": f"Question {key}: why?",
        "written": "",
        "phase": phase,
        "num_prompt_tokens": 64,
        "num_cached_tokens": 32,
        "num_computed_tokens": 32,
        "num_written_tokens": 2 if times == 4 else 0,
        "miss_reason": None,
        "finish_reason": "stop" if phase == "done" else None,
        "is_own": True,
        "blocks": [blocks or []],
        **{name: 900 + key + at / 10 if at < times else None for at, name in enumerate(names)},
        **changes,
    }


def change(**changes: Any) -> dict[str, Any]:
    """A message in which nothing has changed but what is named."""
    nothing: dict[str, Any] = {"id": "played", "counters": COUNTERS, "blocks": [[[], []]], "requests": []}
    return {"models": [nothing | {"hits": [[], []], "gone": [], "evicted": [], "copied": []} | changes]}


def feed(page: Page, name: str, data: dict[str, Any]) -> None:
    """Have the page get a message, once it listens."""
    page.wait_for_function("window.joined > 0")
    page.evaluate("([name, data]) => send(name, data)", [name, data])
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
