"""Who looks at the live page, and the messages that they get: at most ten a second, none while nothing happens."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvik.server.live.explained import ExplainedPages
from kvik.server.live.history import SAMPLE_S, History, counters_of
from kvik.server.live.watcher import Change, ModelWatch, Row, Told, now_s
from kvik.server.sse import event

if TYPE_CHECKING:
    from kvik.server.served import ServedModel

INTERVAL_S = 0.1
"""Between two messages, at least."""

MAX_SHARE = 0.007
"""Of a core's time, that making messages takes; where they are large, fewer are made. The observers take the rest."""

SMOOTHING, MAX_STEP = 8, 4
"""Messages over which their cost is averaged, and how many times the average one of them counts at most."""

MAX_WATCHERS = 64


def smoothed(mean_s: float, cost_s: float) -> float:
    """The mean cost with another message; one that met a garbage collection must not hold up the next for long."""
    return mean_s + (min(cost_s, MAX_STEP * max(mean_s, INTERVAL_S * MAX_SHARE)) - mean_s) / SMOOTHING


@dataclass(frozen=True, slots=True)
class Viewer:
    """What somebody may see: the requests that are his own or, without their text, all of them."""

    tenant: str | None
    sees_all: bool
    sees_text: bool  # of what is his own


class Watcher:
    """Somebody who looks: at most one message waits for him, and if he is late, the whole state takes its place."""

    def __init__(self, viewer: Viewer) -> None:
        self.viewer = viewer
        self._message: bytes | None = None
        self._is_late = True
        self._is_over = False
        self._news = asyncio.Event()
        self._news.set()

    def send(self, data: bytes) -> None:
        """Have a message wait for him."""
        self._is_late = self._is_late or self._message is not None
        self._message = None if self._is_late else data
        self._news.set()

    def end(self) -> None:
        """Nothing more will come."""
        self._is_over = True
        self._news.set()

    async def read(self, live: Live) -> bytes | None:
        """The next message; None when it is over."""
        await self._news.wait()
        self._news.clear()
        if self._is_over:
            return None
        data, self._message = self._message, None
        if self._is_late or data is None:
            self._is_late = False
            return live.state(self.viewer)
        return data


class Live:
    """All who look at one server. While nobody does, the counters are sampled and nothing else is done."""

    def __init__(
        self,
        models: Callable[[], Iterable[ServedModel]],
        owns: Callable[[str | None, str | None], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._models = models  # which are there when somebody looks
        self._owns = owns  # whether what is cached under a salt is a tenant's
        self._watches: list[ModelWatch] = []
        self._histories: list[History] = []
        self._watchers: dict[Watcher, None] = {}
        self._changing = asyncio.Lock()  # while observers are added or removed
        self._is_watching = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_due = False  # a message is
        self.racing = asyncio.Lock()  # one race at a time, and what is like it
        self.explained = ExplainedPages(clock)
        self._cost_s = 0.0  # of a message, on average
        self._next_s = 0.0  # by the loop's clock, the earliest time of the next message

    @property
    def num_watchers(self) -> int:
        """Who look."""
        return len(self._watchers)

    async def join(self, viewer: Viewer) -> Watcher:
        """Somebody more who looks; the first one has the observers added."""
        watcher = Watcher(viewer)
        self._watchers[watcher] = None
        await self._settle()
        return watcher

    async def leave(self, watcher: Watcher) -> None:
        """One who looks no more; the last one has the observers removed."""
        self._watchers.pop(watcher, None)
        await self._settle()

    def close(self) -> None:
        """End all streams."""
        for watcher in self._watchers:
            watcher.end()

    async def _settle(self) -> None:
        """Watch where somebody looks, and only there; what is begun is done, also for one who leaves meanwhile."""
        await asyncio.shield(asyncio.ensure_future(self._settle_now()))

    async def _settle_now(self) -> None:
        async with self._changing:
            if self._is_watching == bool(self._watchers):
                return
            self._know_models()
            self._is_watching = not self._is_watching
            self._loop = asyncio.get_running_loop()
            for watch in self._watches:
                watch.on_news = self._on_news
                await asyncio.to_thread(watch.begin if self._is_watching else watch.end)

    def _know_models(self) -> None:
        if not self._watches:
            self._watches = [ModelWatch(served) for served in self._models()]
            self._histories = [History() for _ in self._watches]

    def _on_news(self) -> None:
        """From an engine's thread."""
        if not self._is_due and self._loop is not None and not self._loop.is_closed():
            self._is_due = True
            self._loop.call_soon_threadsafe(self._publish_soon)

    def _publish_soon(self) -> None:
        assert self._loop is not None
        self._loop.call_at(max(self._loop.time(), self._next_s), self._publish)

    def _publish(self) -> None:
        self._is_due = False
        if not self._is_watching or self._changing.locked():
            return
        assert self._loop is not None
        now_s, before_s = self._loop.time(), time.thread_time()
        self._take()
        self._cost_s = smoothed(self._cost_s, time.thread_time() - before_s)
        self._next_s = now_s + max(INTERVAL_S, self._cost_s / MAX_SHARE)

    def _take(self) -> None:
        changes = [(watch, watch.take()) for watch in self._watches]
        messages: dict[Viewer, bytes] = {}
        for watcher in self._watchers:
            viewer = watcher.viewer
            if viewer not in messages:
                told = [self._change(watch, change, viewer) for watch, change in changes]
                messages[viewer] = event({"now_s": now_s(), "models": told}, "change")
            watcher.send(messages[viewer])

    async def record(self) -> None:
        """For ever, once the models are there: sample the counters, and tell those who look that the server lives."""
        self._know_models()
        while True:
            for watch, history in zip(self._watches, self._histories, strict=True):
                history.add(now_s(), counters_of(watch.served))
            if self._is_watching and not self._changing.locked():
                for watch in self._watches:
                    watch.look_if_idle()
                if not self._is_due:
                    self._is_due = True
                    self._publish_soon()
            await asyncio.sleep(SAMPLE_S)

    def state(self, viewer: Viewer) -> bytes:
        """Everything, as far as it was told to the others."""
        models = []
        for watch, history in zip(self._watches, self._histories, strict=True):
            counters, hits = counters_of(watch.served), watch.served.hits.counts.copy()
            rows = [self._seen(known, known.whole(), viewer) for known in watch.told.values()]
            models.append(
                {
                    **watch.description(),
                    "states": [base64.b64encode(states).decode() for states in watch.states],
                    "requests": [row for row in rows if row is not None],
                    "hits": [list(hits), list(hits.values())],
                    "counters": counters,
                    "history": {"names": ["at_s", *counters], "rows": history.told()},
                }
            )
        return event({"now_s": now_s(), "sees_text": viewer.sees_text, "models": models}, "state")

    def _change(self, watch: ModelWatch, change: Change, viewer: Viewer) -> dict[str, Any]:
        rows = [self._seen(known, row, viewer) for known, row in change.rows]
        return {
            "id": watch.served.id,
            "counters": counters_of(watch.served),
            "blocks": [[list(states), list(states.values())] for states in change.blocks],
            "requests": [row for row in rows if row is not None],
            "hits": [list(change.hits), list(change.hits.values())],
            "gone": change.gone,
            "evicted": change.evicted,
            "copied": change.copied,
        }

    def _seen(self, known: Told, row: Row, viewer: Viewer) -> Row | None:
        """A request's row as somebody may see it; None where he may not."""
        is_own = self._is_own(known, viewer.tenant)
        if not is_own and not viewer.sees_all:
            return None
        hidden = () if is_own and viewer.sees_text else ("prompt", "written")
        return {name: value for name, value in row.items() if name not in hidden} | {"is_own": is_own}

    def _is_own(self, known: Told, tenant: str | None) -> bool:
        return (known.tenant is not None and known.tenant == tenant) or self._owns(tenant, known.salt)

    def prompt_of(self, request_id: str, tenant: str | None) -> tuple[ServedModel, bytes] | None:
        """The model and the prompt's token ids, an int32 each, of a request of the tenant's, where it is kept."""
        for watch in self._watches:
            for known in reversed(watch.told.values()):
                if known.prompt and known.row["request_id"] == request_id and self._is_own(known, tenant):
                    return watch.served, known.prompt
        return None
