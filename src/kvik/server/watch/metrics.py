"""`/metrics`: the counters of all engines and of the gate as Prometheus reads them, put together when it asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from kvik import __version__
from kvik.server.served import ServedModel
from kvik.server.state import ServerState
from kvik.server.watch.meter import Histogram

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

PREFIX = "kvik_"

Value = Callable[[ServedModel], Any]

GAUGES: tuple[tuple[str, str, Value], ...] = (
    ("num_requests_running", "Completions that are running", lambda served: len(_engine(served).scheduler.running)),
    ("num_requests_waiting", "Requests in the queue", lambda served: len(_engine(served).scheduler.waiting)),
    ("kv_cache_usage_perc", "Share of the cache's blocks that are held, from 0 to 1", lambda served: _usage(served)),
    ("store_blocks", "Stored blocks of all models in the folder", lambda served: _of_store(served, "num_kept")),
    ("store_bytes", "Bytes of the files of stored blocks", lambda served: _of_store(served, "kept_bytes")),
    ("engine_up", "1 while the engine serves requests", lambda served: int(served.is_healthy)),
    (
        "engine_step_age_seconds",
        "Seconds that the current step has taken so far",
        lambda served: served.async_llm.silent_s,
    ),
)

COUNTERS: tuple[tuple[str, str, Value], ...] = (
    (
        "prefix_cache_queries",
        "Tokens of prompts that were looked for in the prefix cache",
        lambda served: _engine(served).cache.stats.num_queried_tokens,
    ),
    (
        "prefix_cache_hits",
        "Tokens of prompts that were found in the prefix cache",
        lambda served: _engine(served).cache.stats.num_cached_tokens,
    ),
    (
        "prompt_tokens",
        "Tokens of prompts of requests that have begun",
        lambda served: served.meter.num_cached_tokens + served.meter.num_computed_tokens,
    ),
    (
        "prompt_tokens_cached",
        "Tokens of prompts that were read from the cache",
        lambda served: served.meter.num_cached_tokens,
    ),
    ("prompt_tokens_computed", "Tokens of prompts that were computed", lambda served: served.meter.num_computed_tokens),
    ("generation_tokens", "Tokens that were sampled", lambda served: served.meter.num_generated_tokens),
    ("request_aborts", "Completions that were aborted, or whose client left", lambda served: served.meter.num_aborted),
    (
        "num_preemptions",
        "Times that a completion was preempted",
        lambda served: _scheduler(served).num_preemptions,
    ),
    (
        "cache_evicted_blocks",
        "Blocks that were evicted",
        lambda served: _engine(served).cache.stats.num_evicted_blocks,
    ),
    (
        "cache_copied_blocks",
        "Blocks that were copied before a shared one was written to",
        lambda served: _engine(served).cache.stats.num_copied_blocks,
    ),
    (
        "store_hit_tokens",
        "Tokens of prompts that were read from the store",
        lambda served: _of_tier(served, "num_stored_tokens"),
    ),
    ("store_loads", "Times that stored blocks were read for a prompt", lambda served: _of_tier(served, "num_loads")),
    (
        "store_loads_declined",
        "Loads declined because computing was faster",
        lambda served: _of_tier(served, "num_declined"),
    ),
    (
        "store_blocks_dropped",
        "Blocks that were evicted before they could be stored",
        lambda served: _of_tier(served, "num_dropped_blocks"),
    ),
    ("store_blocks_read", "Blocks that were read from the store", lambda served: _of_store(served, "num_hits")),
    ("store_blocks_written", "Blocks that were stored", lambda served: _of_store(served, "num_written")),
    ("store_blocks_evicted", "Stored blocks removed for the quota", lambda served: _of_store(served, "num_evicted")),
    ("store_read_bytes", "Bytes that were read from the store", lambda served: _of_store(served, "read_bytes")),
    ("store_written_bytes", "Bytes that were stored", lambda served: _of_store(served, "written_bytes")),
    ("store_errors", "Errors of the store's disk or server", lambda served: _of_store(served, "num_errors")),
    ("spec_decode_num_draft_tokens", "Draft tokens of speculation", lambda served: served.meter.num_drafted_tokens),
    (
        "spec_decode_num_accepted_tokens",
        "Draft tokens that were accepted",
        lambda served: served.meter.num_accepted_tokens,
    ),
    ("engine_steps", "Steps of the engine", lambda served: served.meter.num_steps),
)

BY_LABEL: tuple[tuple[str, str, str, str, Callable[[ServedModel], Mapping[str, float]]], ...] = (
    (
        "counter",
        "request_success",
        "Completions that ended without an error",
        "finished_reason",
        lambda served: served.meter.finished,
    ),
    (
        "counter",
        "request_failures",
        "Completions that failed, by error",
        "reason",
        lambda served: served.meter.failed,
    ),
    (
        "counter",
        "prefix_cache_misses",
        "Prompts, by why the match in the prefix cache ended",
        "reason",
        lambda served: served.meter.misses,
    ),
    (
        "counter",
        "store_misses",
        "Stored blocks that were not used, by reason",
        "reason",
        lambda served: _store_faults(served),
    ),
    ("counter", "engine_step_seconds", "Time of the parts of all steps", "part", lambda served: served.meter.step_s),
    ("gauge", "cache_blocks", "Blocks of the cache, by state", "state", lambda served: _blocks(served)),
)

HISTOGRAMS: tuple[tuple[str, str, Callable[[ServedModel], Histogram]], ...] = (
    (
        "time_to_first_token_seconds",
        "From a request to its first token",
        lambda served: served.meter.time_to_first_token,
    ),
    ("inter_token_latency_seconds", "From a token to the next one", lambda served: served.meter.inter_token),
    ("e2e_request_latency_seconds", "From a request to its last token", lambda served: served.meter.end_to_end),
    ("request_queue_time_seconds", "From a request to its first step", lambda served: served.meter.queue),
    ("request_prefill_time_seconds", "From the first step to the first token", lambda served: served.meter.prefill),
    ("request_decode_time_seconds", "From the first token to the last one", lambda served: served.meter.decode),
)


def _engine(served: ServedModel) -> Any:
    return served.llm.engine


def _scheduler(served: ServedModel) -> Any:
    return served.llm.engine.scheduler


def _of_tier(served: ServedModel, name: str) -> int:
    tier = served.llm.engine.tier
    return 0 if tier is None else int(getattr(tier.stats, name))


def _of_store(served: ServedModel, name: str) -> int:
    tier = served.llm.engine.tier
    return 0 if tier is None else int(getattr(tier.store.stats, name) or 0)


def _store_faults(served: ServedModel) -> dict[str, int]:
    tier = served.llm.engine.tier
    return {} if tier is None else {fault.name.lower(): count for fault, count in tier.store.stats.faults.items()}


def _usage(served: ServedModel) -> float:
    pool = served.llm.engine.cache.pool
    return pool.num_held / pool.num_blocks


def _blocks(served: ServedModel) -> dict[str, int]:
    pool = served.llm.engine.cache.pool
    return {"free": pool.num_free, "held": pool.num_held, "reusable": pool.num_reusable}


class _Collector:
    """What `prometheus_client` asks for families; nothing is kept between two scrapes."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        """All families."""
        yield from self._of_models()
        yield from self._of_server()

    def _of_models(self) -> Iterator[Metric]:
        from prometheus_client.core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
            InfoMetricFamily,
        )

        models = list(self._state.models)
        for kind, table in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for name, told, value in table:
                family = kind(PREFIX + name, told, labels=["model"])
                for served in models:
                    family.add_metric([served.id], value(served))
                yield family
        for kind_name, name, told, label, values in BY_LABEL:
            made = CounterMetricFamily if kind_name == "counter" else GaugeMetricFamily
            family = made(PREFIX + name, told, labels=["model", label])
            for served in models:
                for each, count in list(values(served).items()):
                    family.add_metric([served.id, each], count)
            yield family
        for name, told, histogram in HISTOGRAMS:
            times = HistogramMetricFamily(PREFIX + name, told, labels=["model"])
            for served in models:
                found = histogram(served)
                times.add_metric([served.id], found.buckets(), found.total_s)
            yield times
        sizes = InfoMetricFamily(PREFIX + "cache_config", "Sizes and settings of the cache", labels=["model"])
        for served in models:
            cache, config = served.llm.engine.cache, served.llm.engine.config
            info = {
                "block_size": cache.spec.block_size,
                "num_blocks": cache.pool.num_blocks,
                "block_bytes": cache.spec.block_bytes,
                "num_bytes": served.llm.cache.num_bytes,
                "kv_dtype": cache.spec.dtype,
                "prefix_cache": str(cache.prefix_cache).lower(),
                "max_running": config.max_running,
                "token_budget": config.token_budget,
            }
            sizes.add_metric([served.id], {name: str(value) for name, value in info.items()})
        yield sizes

    def _of_server(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

        http = self._state.http
        responses = CounterMetricFamily(
            PREFIX + "http_responses", "Answers by route and status", labels=["method", "route", "status"]
        )
        for (method, route, status), count in sorted(http.responses.items()):
            responses.add_metric([method, route, str(status)], count)
        yield responses
        for name, told, value in (
            ("http_disconnects", "Clients that left before the end of their answer", http.num_disconnects),
            ("http_retries", "Requests that a client marks as retries", http.num_retries),
        ):
            yield CounterMetricFamily(PREFIX + name, told, value=value)
        events = self._state.events
        for name, told, count in (
            ("kv_events", "KV events that were handed to the socket", 0 if events is None else events.num_events),
            (
                "kv_events_dropped_batches",
                "Steps whose KV events the socket did not take, after which all blocks were told anew",
                0 if events is None else events.num_dropped,
            ),
        ):
            yield CounterMetricFamily(PREFIX + name, told, value=count)
        yield GaugeMetricFamily(PREFIX + "draining", "1 while the server drains", int(self._state.is_draining))
        yield InfoMetricFamily(PREFIX + "build", "The version of kvik", value={"version": __version__})


async def metrics(request: Request) -> Response:
    """Counters and times of all models, as Prometheus reads them."""
    from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
    from prometheus_client.exposition import CONTENT_TYPE_LATEST

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(ServerState.of(request)))
    ProcessCollector(registry=registry)
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
