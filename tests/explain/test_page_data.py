"""What a page knows: every figure against a formula or an array that it comes from."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from explain.conftest import NUM_WRITTEN, traced
from families.goldens import golden_of
from gguf_files import tiny_llama
from kvik import LLM, InvalidInput
from kvik.cache import KVCacheSpec
from kvik.explain.html import render_page
from kvik.explain.page_data import kv_variants, page_data
from kvik.explain.perfetto import perfetto_trace
from kvik.explain.run import TracedRun
from kvik.explain.selection import AIMED_BYTES, Selection, select
from work_formulas import TinyShape

SHAPE = TinyShape()


def array(kept: dict[str, Any]) -> np.ndarray[Any, Any]:
    data = np.frombuffer(base64.b64decode(kept["data"]), np.dtype(kept["dtype"]).newbyteorder("<"))
    return data.reshape(kept["shape"])


def test_steps_cost_what_the_formulas_say(data: dict[str, Any]) -> None:
    prompt = data["num_prompt_tokens"]
    assert len(data["steps"]) == NUM_WRITTEN
    for index, step in enumerate(data["steps"]):
        known = prompt + index
        with_cache, without = step["with_cache"], step["without"]
        new = prompt if index == 0 else 1
        assert (with_cache["first_position"], with_cache["num_tokens"]) == (known - new, new)
        assert (without["first_position"], without["num_tokens"]) == (0, known)
        assert with_cache["num_repeated_tokens"] == 0
        assert without["num_repeated_tokens"] == (0 if index == 0 else known - 1)
        for lane, num_tokens in ((with_cache, new), (without, known)):
            assert lane["num_kv_vectors"] == 2 * num_tokens * 2 * 2  # key and value, layers, KV heads
            attention = SHAPE.attention(known - num_tokens, known)
            assert lane["multiply_adds"] == SHAPE.multiply_adds(num_tokens, 1) + attention
            assert lane["weight_bytes"] == SHAPE.step_bytes()
            assert lane["kv_bytes"] == known * SHAPE.kv_token_bytes("f16")
            assert lane["kv_written_bytes"] == num_tokens * SHAPE.kv_token_bytes("f16")
            assert lane["seconds"] > 0


def test_tensors_are_those_of_the_run(data: dict[str, Any], run: TracedRun) -> None:
    tracer = run.with_cache.tracer
    assert [layer["layer"] for layer in data["layers"]] == [0, 1]
    for index, layer in enumerate(data["layers"]):
        np.testing.assert_array_equal(array(layer["queries"]), tracer.queries[index])
        np.testing.assert_array_equal(array(layer["keys"]), tracer.keys[index].astype(np.float16))
        np.testing.assert_array_equal(array(layer["values"]), tracer.values[index].astype(np.float16))
        assert (layer["heads"], layer["kv_heads"]) == ([0, 1, 2, 3], [0, 1])
        assert layer["scale"] == 0.25  # heads of 16
    np.testing.assert_array_equal(array(data["hidden"]), tracer.hidden[0][:, :48])


def test_heads_that_are_named_are_the_ones_that_are_drawn(llm: LLM, run: TracedRun) -> None:
    changed = TracedRun(
        **{name: getattr(run, name) for name in TracedRun.__dataclass_fields__ if name != "selection"},
        selection=Selection(run.selection.layers, (1,)),
    )
    layer = page_data(changed, "tiny", [], [])["layers"][0]
    assert (layer["heads"], layer["kv_heads"]) == ([2, 3], [1])
    np.testing.assert_array_equal(array(layer["queries"]), run.with_cache.tracer.queries[0][:, 2:])
    np.testing.assert_array_equal(array(layer["keys"])[:, 0], run.with_cache.tracer.keys[0][:, 1].astype(np.float16))


def test_memory_is_that_of_the_cache(data: dict[str, Any], run: TracedRun) -> None:
    spec, memory = run.with_cache.lane.engine.kv_spec, data["memory"]
    assert memory["token_bytes"] == spec.token_bytes == 2 * 2 * 2 * 16 * 2
    assert memory["held_bytes"] == [spec.held_bytes(count) for count in range(len(data["tokens"]))]
    lease = run.with_cache.lane.sequence.lease
    assert lease is not None
    table = lease.hold.table.block_ids
    wanted = [table[position // 32] * 32 + position % 32 for position in range(len(data["tokens"]) - 1)]
    assert memory["slots"] == wanted
    own = [variant for variant in memory["variants"] if variant["is_own"]]
    assert [variant["num_kv_heads"] for variant in own] == [2]
    assert own[0]["whole_context_bytes"] == spec.held_bytes(512)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "counts"),
    [(9, 3, [9, 3, 1]), (12, 12, [12, 3, 1]), (32, 1, [32, 8, 1]), (71, 1, [71, 1]), (1, 1, [1]), (4, 4, [4, 2, 1])],
)
def test_variants_are_mha_gqa_and_mqa(num_heads: int, num_kv_heads: int, counts: list[int]) -> None:
    spec = KVCacheSpec.uniform(num_layers=3, num_kv_heads=num_kv_heads, head_dim=16, dtype="f16")
    found = kv_variants(spec, num_heads)
    assert [count for count, _ in found] == counts
    assert all(variant.token_bytes * num_heads == found[0][1].token_bytes * count for count, variant in found)


def test_a_selection_fits_and_goes_from_the_first_layer_to_the_last(tmp_path: Path) -> None:
    spec = LLM(str(tiny_llama(tmp_path / "deep.gguf", num_layers=9))).model.decoder.spec
    kv_spec = spec.kv_spec("f16")
    assert select(spec, kv_spec, 64).layers == (0, 2, 4, 6, 8)
    many = select(spec, kv_spec, 20_000)
    assert many == Selection((4,), (0,))
    assert many.num_bytes(spec, kv_spec, 20_000) > AIMED_BYTES, "less than one head cannot be drawn"
    assert select(spec, kv_spec, 64, layers=[7]).layers == (7,)
    assert select(spec, kv_spec, 64, kv_heads=[1]).kv_heads == (1,)
    with pytest.raises(InvalidInput, match="no layer 9: the model has 9"):
        select(spec, kv_spec, 64, layers=[9])
    with pytest.raises(InvalidInput, match="no KV head 2: the model has 2"):
        select(spec, kv_spec, 64, kv_heads=[2])
    with pytest.raises(InvalidInput, match="9 layers x 2 KV heads x 20,000 tokens take 92 MB"):
        select(spec, kv_spec, 20_000, layers=list(range(9)))


def test_the_bytes_of_a_selection_are_those_of_the_page(run: TracedRun) -> None:
    layers = page_data(run, "tiny", [], [])["layers"]
    written = sum(len(layer[name]["data"]) for layer in layers for name in ("queries", "keys", "values"))
    decoder = run.llm.model.decoder
    num_tokens = len(run.token_ids) - 1  # the last one was not computed
    planned = run.selection.num_bytes(decoder.spec, decoder.spec.kv_spec("f16"), num_tokens)
    assert planned <= written <= planned + 4 * 3 * len(layers)


def test_a_window_is_told(tmp_path: Path) -> None:
    run = traced(LLM(str(golden_of("gemma2").write_folder(tmp_path))), list(range(3, 40)), 4)
    windows = [layer["window"] for layer in page_data(run, "gemma", [], [])["layers"]]
    assert windows == [run.llm.model.decoder.spec.layers[layer].window for layer in run.selection.layers]
    assert any(windows)


class Scripts(HTMLParser):
    """The texts of all script elements."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag == "script"
        if self._inside:
            assert "src" not in dict(attrs)
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[-1] += data


@pytest.mark.parametrize(
    "name", ["tiny", "</script><script>alert(1)</script>", "__DATA__ __MAIN__ <!-- \\u2028 \u2028"]
)
def test_the_data_come_out_of_the_page_as_they_went_in(data: dict[str, Any], name: str) -> None:
    hostile = {**data, "model": {**data["model"], "name": name}}
    scripts = Scripts()
    page = render_page(hostile)
    scripts.feed(page)
    assert len(scripts.texts) == 3
    assert json.loads(scripts.texts[0]) == json.loads(json.dumps(hostile))
    modules = json.loads(scripts.texts[1])["imports"]
    wanted = set(re.findall(r'from "(kvik/[a-z]+\.js)"', page))
    assert wanted <= modules.keys()
    assert all(address.startswith("data:text/javascript") for address in modules.values())


def test_a_trace_has_every_step_and_op(data: dict[str, Any], run: TracedRun) -> None:
    trace = json.loads(json.dumps(perfetto_trace(run, "tiny"), allow_nan=False))
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in events)
    for process, lane in ((1, "with_cache"), (2, "without")):
        steps = [event for event in events if event["pid"] == process and event["cat"] == "step"]
        assert len(steps) == NUM_WRITTEN
        for event, step in zip(steps, data["steps"], strict=True):
            assert {name: event["args"][name] for name in step[lane]} == step[lane]
            assert (event["args"]["token_id"], event["args"]["text"]) == (step["chosen"]["id"], step["chosen"]["text"])
            assert [one["token_id"] for one in event["args"]["candidates"]] == [one["id"] for one in step["candidates"]]
        ops = [event for event in events if event["pid"] == process and event["cat"] != "step"]
        assert len(ops) == NUM_WRITTEN * (1 + 2 * 13 + 3)
        for before, after in pairwise(ops):
            assert after["ts"] >= before["ts"] + before["dur"] - 1e-3
    names = [event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"]
    assert names == ["with the cache", "without the cache"]
    assert trace["otherData"]["is_same"] is True
    assert trace["otherData"]["text"].startswith(trace["otherData"]["prompt"])
