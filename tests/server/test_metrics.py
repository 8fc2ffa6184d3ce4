"""`/metrics` says what the requests themselves say."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvik.engine.llm import LLM
from kvik.server.watch.meter import SECONDS, Histogram
from live_server import LiveServer, gated, live
from models import tiny_model
from server_process import wait_until

MODEL = '{model="tiny"}'
TIMES = ("request_queue_time", "request_prefill_time", "request_decode_time", "e2e_request_latency")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = tiny_model(tmp_path_factory.mktemp("tiny"), seed=5, context_length=2048).path
    return LLM(path, kv_memory="8MiB", threads=1)


@pytest.fixture
def server(tiny: LLM) -> Iterator[LiveServer]:
    llm, _ = gated(tiny)
    with live({"tiny": llm}) as server:
        yield server


def complete(server: LiveServer, prompt: list[int], **fields: object) -> dict[str, object]:
    answer = server.ask("POST", "/v1/completions", {"prompt": prompt, "max_tokens": 5, "ignore_eos": True, **fields})
    assert answer.status == 200, answer.data
    usage: dict[str, object] = answer.body["usage"]
    return usage


def total(server: LiveServer, name: str) -> float:
    return server.samples()[f"kvik_{name}{MODEL}"]


def test_every_family_says_what_it_is(server: LiveServer) -> None:
    complete(server, [1, 2, 3])
    answer = server.ask("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    text = answer.data.decode()
    families = list(text_string_to_metric_families(text))
    assert len(families) > 30
    for family in families:
        assert family.documentation, family.name
        assert family.type != "unknown", family.name
        assert f"# HELP {family.name}" in text
    names = {sample.name for family in families for sample in family.samples}
    assert {"kvik_num_requests_running", "kvik_kv_cache_usage_perc", "process_resident_memory_bytes"} <= names
    head = server.ask("HEAD", "/metrics")
    assert (head.status, head.data) == (200, b"")


def test_sums_are_those_of_the_requests_own_usage(server: LiveServer) -> None:
    prompt = list(range(3, 83))
    usages = [complete(server, prompt), complete(server, prompt), complete(server, prompt[:40], n=3)]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]  # type: ignore[index]
    assert cached[1] >= 64
    assert total(server, "prompt_tokens_total") == sum(usage["prompt_tokens"] for usage in usages)  # type: ignore[misc]
    assert total(server, "prompt_tokens_cached_total") == sum(cached)
    assert total(server, "prompt_tokens_computed_total") == 80 + 80 + 40 - sum(cached)
    assert total(server, "generation_tokens_total") == 25
    assert total(server, "prefix_cache_hits_total") == sum(cached)
    assert total(server, "prefix_cache_queries_total") == 79 + 79 + 39
    samples = server.samples()
    assert samples['kvik_request_success_total{finished_reason="length",model="tiny"}'] == 5
    misses = {name: value for name, value in samples.items() if name.startswith("kvik_prefix_cache_misses_total")}
    assert sum(misses.values()) == 3


def test_one_sample_of_each_time_for_each_request_and_one_less_than_tokens_between_them(server: LiveServer) -> None:
    for at in range(4):
        complete(server, [at + 1] * 8)
    for name in ("time_to_first_token", *TIMES):
        assert total(server, f"{name}_seconds_count") == 4, name
    assert total(server, "inter_token_latency_seconds_count") == 4 * 4
    samples = server.samples()
    assert (
        samples[f"kvik_e2e_request_latency_seconds_sum{MODEL}"]
        > samples[f"kvik_request_decode_time_seconds_sum{MODEL}"]
    )
    assert samples['kvik_e2e_request_latency_seconds_bucket{le="+Inf",model="tiny"}'] == 4


def test_gauges_return_to_zero_and_the_cache_says_its_size(server: LiveServer) -> None:
    complete(server, list(range(3, 83)))
    samples = server.samples()
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert samples[f"kvik_{name}{MODEL}"] == 0, name
    pool = server.served.llm.engine.cache.pool
    blocks = {
        state: samples[f'kvik_cache_blocks{{model="tiny",state="{state}"}}'] for state in ("free", "held", "reusable")
    }
    assert blocks == {"free": pool.num_free, "held": 0, "reusable": pool.num_reusable}
    assert sum(blocks.values()) == pool.num_blocks
    (info,) = [name for name in samples if name.startswith("kvik_cache_config_info")]
    assert f'num_blocks="{pool.num_blocks}"' in info
    assert f'num_bytes="{server.served.llm.cache.num_bytes}"' in info


def test_one_who_leaves_is_counted_once_and_one_who_stays_is_not(server: LiveServer) -> None:
    body = {"prompt": [1, 2, 3], "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with server.asking("POST", "/v1/completions", body) as response:
        assert response.readline().startswith(b"data: ")
        running = server.samples()
        assert running[f"kvik_num_requests_running{MODEL}"] == 1
        assert running[f"kvik_kv_cache_usage_perc{MODEL}"] > 0
    wait_until(lambda: total(server, "request_aborts_total") == 1)
    wait_until(lambda: server.samples()["kvik_http_disconnects_total"] == 1)
    complete(server, [4, 5], stream=False)
    samples = server.samples()
    assert samples["kvik_http_disconnects_total"] == 1
    assert samples[f"kvik_num_requests_running{MODEL}"] == samples[f"kvik_kv_cache_usage_perc{MODEL}"] == 0
    assert samples[f"kvik_request_decode_time_seconds_count{MODEL}"] == 1  # of the one that ended well


def test_a_failing_step_is_counted_by_its_error(server: LiveServer) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("planted")

    server.served.llm.engine.runner.run = broken  # type: ignore[method-assign, assignment]
    answer = server.ask("POST", "/v1/completions", {"prompt": [1], "max_tokens": 2})
    assert answer.status == 500
    samples = server.samples()
    assert samples['kvik_request_failures_total{model="tiny",reason="StepFailed"}'] == 1
    assert samples['kvik_http_responses_total{method="POST",route="/v1/completions",status="500"}'] == 1


def test_labels_have_few_values_whatever_is_asked_for(server: LiveServer) -> None:
    for path in ("/v1/models/tiny", "/v1/models/nobody", "/secret-1", "/secret-2"):
        server.ask("GET", path)
    server.ask("GET", "/version", headers={"x-stainless-retry-count": "2"})
    server.ask("BREW", "/version")
    answer = server.ask("GET", "/metrics").data.decode()
    assert "secret" not in answer
    assert "nobody" not in answer
    samples = server.samples()
    assert samples['kvik_http_responses_total{method="GET",route="/v1/models/{name}",status="200"}'] == 1
    assert samples['kvik_http_responses_total{method="GET",route="/v1/models/{name}",status="404"}'] == 1
    assert samples['kvik_http_responses_total{method="GET",route="(none)",status="404"}'] == 2
    assert samples['kvik_http_responses_total{method="(other)",route="/version",status="405"}'] == 1
    assert samples["kvik_http_retries_total"] == 1


def test_a_histogram_counts_what_lies_below_each_end() -> None:
    times = Histogram()
    for value in (0.0005, 0.001, 0.3, 500.0):
        times.add(value)
    found = dict(times.buckets())
    assert found["0.001"] == 2
    assert found["0.25"] == 2
    assert found["0.5"] == found[str(SECONDS[-1])] == 3
    assert found["+Inf"] == 4
    assert times.total_s == pytest.approx(500.3015)


def test_the_meter_forgets_sequences_that_have_ended(server: LiveServer) -> None:
    complete(server, [1, 2, 3])
    meter = server.served.meter
    assert not meter.is_decoding
    assert meter.num_steps == 5
    assert min(meter.step_s.values()) > 0
