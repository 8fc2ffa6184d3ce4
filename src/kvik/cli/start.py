"""What `kvik` alone says: what to type next."""

from __future__ import annotations

from kvik import __version__
from kvik.cli.terminal import columns
from kvik.hub import store
from kvik.units import amount

NEXT = (
    ('kvik run "Why is the sky blue?"', "an answer{fetched}"),
    ("kvik run", "a chat, each turn of which keeps its cache"),
    ("kvik serve", "OpenAI's and Anthropic's APIs, and a page to watch the cache"),
    ("kvik race", "what the cache saves on this machine"),
    ("kvik plan llama-3-8b", "what a model needs and what fits, before it is loaded"),
    ("kvik doctor", "what kvik found on this machine, and what is slow and why"),
    ("kvik --help", "all commands"),
)


def start_lines() -> list[str]:
    """The version and the first commands; of a model that is not here, what the first one fetches."""
    model = store.SMOLLM2
    is_here = (store.models_folder() / model.file_name).exists()
    fetched = "" if is_here else f"; {model.name} is fetched first, {amount(model.file_bytes)}"
    rows = [(command, told.format(fetched=fetched)) for command, told in NEXT]
    first = f"kvik {__version__}: an LLM inference engine whose heart is the KV cache. Type next:"
    return [first, "", *(f"  {line}" for line in columns(rows, left=2)), ""]
