"""The models that a server has, by all of their names."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator
from functools import cached_property, partial
from typing import Any
from weakref import WeakKeyDictionary

from kvik.engine.async_llm import AsyncLLM
from kvik.engine.llm import LLM
from kvik.engine.sequence import Sequence
from kvik.errors import InvalidInput, ToolsNotSupported
from kvik.server.errors import ApiError
from kvik.server.watch.engine_log import log_ends
from kvik.server.watch.hits import BlockHits
from kvik.server.watch.meter import EngineMeter
from kvik.text.thoughts import ThoughtFormat, detect_thoughts
from kvik.text.tool_detection import detect_tool_format
from kvik.text.tool_format import ToolFormat


class ServedModel:
    """One model and its engine."""

    def __init__(self, model_id: str, llm: LLM, aliases: Iterable[str] = ()) -> None:
        self.id = model_id
        self.aliases = tuple(alias for alias in dict.fromkeys(aliases) if alias != model_id)
        self.llm = llm
        self.meter = EngineMeter(llm.engine)
        self.hits = BlockHits(llm.engine)
        llm.engine.add_observer(partial(log_ends, model_id))
        self.async_llm = AsyncLLM(llm)
        self.tenants: WeakKeyDictionary[Sequence, str | None] = WeakKeyDictionary()  # whose request each one writes
        self.created = int(time.time())

    @property
    def is_healthy(self) -> bool:
        """Whether its engine serves requests."""
        return self.async_llm.is_alive

    @cached_property
    def fingerprint(self) -> str:
        """What the weights, their format and the numbers' formats are, as OpenAI's `system_fingerprint`."""
        config = self.llm.config
        text = f"{self.llm.model.path.name} {config.activations} {config.kv_dtype} {config.weights}"
        return "kvik-" + hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    @cached_property
    def max_token_bytes(self) -> int:
        """Bytes of the longest token."""
        tokenizer = self.llm.model.tokenizer
        return max(len(tokenizer.token_bytes(at, skip_special=False)) for at in range(tokenizer.vocab_size))

    def check_queue(self) -> None:
        """Raise `ApiError` 429 where a request would be refused after all the work of preparing it."""
        scheduler = self.llm.engine.scheduler
        if scheduler.is_full:
            raise ApiError(
                429,
                f"{len(scheduler.waiting):,} requests wait, the server takes {scheduler.max_waiting:,}"
                " (hint: try again when some are done)",
                code="rate_limit_exceeded",
            )

    @cached_property
    def tool_format(self) -> ToolFormat:
        """How the model writes calls of tools; it takes its time. Raises `ToolsNotSupported`."""
        template = self.llm.model.chat_template
        if template is None:
            raise ToolsNotSupported(f"{self.id} has no chat template", hint="leave tools out")
        thoughts = self.thoughts
        return detect_tool_format(template, self.llm.model.tokenizer, () if thoughts is None else thoughts.marked_ids)

    @cached_property
    def thoughts(self) -> ThoughtFormat | None:
        """How the model writes what it thinks before it answers; it takes its time. None where it does not."""
        template = self.llm.model.chat_template
        return None if template is None else detect_thoughts(template, self.llm.model.tokenizer)

    def card(self) -> dict[str, Any]:
        """What `/v1/models` says of it."""
        return {
            "id": self.id,
            "object": "model",
            "created": self.created,
            "owned_by": "kvik",
            "aliases": list(self.aliases),
            "max_model_len": self.llm.model.context,
            "chat": self.llm.is_chat_model,
        }


class Models:
    """All models of a server, in the order of the command line; the first serves requests that name none."""

    def __init__(self, served: Iterable[ServedModel] = ()) -> None:
        self._served = list(served)
        self._by_name = {model.id: model for model in self._served}
        if len(self._by_name) < len(self._served):
            raise InvalidInput(
                f"two models have one name, of {', '.join(model.id for model in self._served)}",
                hint="name each by ALIAS=MODEL",
            )
        for model in self._served:
            for alias in model.aliases:
                self._by_name.setdefault(alias, model)

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._served)

    def __len__(self) -> int:
        return len(self._served)

    def get(self, name: str | None) -> ServedModel:
        """The model of this name, which may be an alias. Raises `ApiError` 404."""
        if name is None:
            return self._served[0]
        model = self._by_name.get(name)
        if model is None:
            names = ", ".join(self._by_name)
            raise ApiError(
                404,
                f"there is no model {name[:100]!r} (hint: take one of: {names})",
                code="model_not_found",
                param="model",
            )
        return model

    @property
    def names(self) -> list[str]:
        """All names and aliases."""
        return list(self._by_name)
