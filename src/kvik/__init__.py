"""kvik: an LLM inference engine whose heart is the KV cache."""

from __future__ import annotations

TYPE_CHECKING = False  # typing's own takes longer to import than all of this
if TYPE_CHECKING:
    from typing import Any

    from kvik.config import EngineConfig, SamplingParams
    from kvik.engine.async_llm import AsyncLLM
    from kvik.engine.beams import Beam
    from kvik.engine.cache_view import CacheView
    from kvik.engine.llm import LLM
    from kvik.engine.output import Completion, Embedding, Piece, Stats, TokenLogprobs
    from kvik.engine.session import AsyncSession, Session, TurnStats
    from kvik.errors import (
        CacheTooSmall,
        DownloadError,
        EngineDead,
        GrammarFailed,
        InvalidGrammar,
        InvalidInput,
        KvikError,
        ModelError,
        ModelNotFound,
        NotEnoughMemory,
        PromptTooLong,
        QueueFull,
        RequestsFailed,
        SlowReader,
        StepFailed,
        TemplateError,
        ToolsNotSupported,
    )
    from kvik.planner.plan import Plan, plan
    from kvik.text.grammar import Grammar

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "AsyncSession",
    "Beam",
    "CacheTooSmall",
    "CacheView",
    "Completion",
    "DownloadError",
    "Embedding",
    "EngineConfig",
    "EngineDead",
    "Grammar",
    "GrammarFailed",
    "InvalidGrammar",
    "InvalidInput",
    "KvikError",
    "ModelError",
    "ModelNotFound",
    "NotEnoughMemory",
    "Piece",
    "Plan",
    "PromptTooLong",
    "QueueFull",
    "RequestsFailed",
    "SamplingParams",
    "Session",
    "SlowReader",
    "Stats",
    "StepFailed",
    "TemplateError",
    "TokenLogprobs",
    "ToolsNotSupported",
    "TurnStats",
    "__version__",
    "plan",
]

_ERRORS = (
    "CacheTooSmall",
    "DownloadError",
    "EngineDead",
    "GrammarFailed",
    "InvalidGrammar",
    "InvalidInput",
    "KvikError",
    "ModelError",
    "ModelNotFound",
    "NotEnoughMemory",
    "PromptTooLong",
    "QueueFull",
    "RequestsFailed",
    "SlowReader",
    "StepFailed",
    "TemplateError",
    "ToolsNotSupported",
)
_LAZY = {
    "EngineConfig": "config",
    "SamplingParams": "config",
    "LLM": "engine.llm",
    "AsyncSession": "engine.session",
    "Session": "engine.session",
    "TurnStats": "engine.session",
    "AsyncLLM": "engine.async_llm",
    "Beam": "engine.beams",
    "CacheView": "engine.cache_view",
    "Grammar": "text.grammar",
    "Completion": "engine.output",
    "Embedding": "engine.output",
    "Piece": "engine.output",
    "Stats": "engine.output",
    "TokenLogprobs": "engine.output",
    "Plan": "planner.plan",
    "plan": "planner.plan",
    **dict.fromkeys(_ERRORS, "errors"),
}


def __getattr__(name: str) -> Any:
    # Importing on first use keeps `import kvik` quick (the engine brings NumPy and the tokenizer with it), and lets the
    # command set up Ctrl-C before anything else is imported.
    if name not in _LAZY:
        raise AttributeError(f"module 'kvik' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"kvik.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
