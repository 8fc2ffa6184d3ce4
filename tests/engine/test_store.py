"""The store behind real models: a restart gives the same bits, whatever ended the process before."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gguf_files import tiny_llama
from kvik.config import EngineConfig, SamplingParams
from kvik.engine.engine import Engine
from kvik.engine.llm import LLM
from kvik.engine.open_store import read_secret
from kvik.engine.output import Completion
from kvik.errors import InvalidInput
from kvik.models.numerics import NUMERICS_VERSION
from models import random_prompt, run, tiny_model
from ops.arrangement import KV_DTYPES
from store.faults import ERRORS, inject
from store.test_files import failure
from subprocesses import environment

PARAMS = SamplingParams(max_tokens=5, ignore_eos=True, logprobs=3)


@pytest.fixture
def opened() -> Iterator[list[LLM]]:
    llms: list[LLM] = []
    yield llms
    for llm in llms:
        llm.close()


def ask(path: Path, prompt: list[int], **options: Any) -> Completion:
    """By an engine that begins for this prompt and ends after it."""
    llm = LLM(path, threads=1, **options)
    (completion,) = llm.generate(prompt, PARAMS)
    llm.close()
    return completion


def same_answer(left: Completion, right: Completion) -> bool:
    return (left.token_ids, left.logprobs) == (right.token_ids, right.logprobs)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_restart_gives_the_same_bits(tmp_path: Path, tiny_path: Path, kv_dtype: str, backend: str) -> None:
    store = tmp_path / "store"
    prompt = [index * 7 % 300 for index in range(150)]
    options: dict[str, Any] = {"kv_dtype": kv_dtype, "backend": backend}
    cold = ask(tiny_path, prompt, **options)
    first = ask(tiny_path, prompt, store=store, **options)
    second = ask(tiny_path, prompt, store=store, **options)
    assert (first.stats.num_stored_tokens, second.stats.num_stored_tokens) == (0, 128)
    assert same_answer(cold, first)
    assert same_answer(cold, second)


def test_no_bit_of_another_model_or_arithmetic_is_used(tmp_path: Path, tiny_path: Path) -> None:
    prompt, store = list(range(100)), tmp_path / "store"
    ask(tiny_path, prompt, store=store)
    other = tiny_llama(tmp_path / "other.gguf", seed=6)
    for path, options in (
        (other, {}),
        (tiny_path, {"kv_dtype": "f32"}),
        (tiny_path, {"kv_dtype": "k=f32,v=f16"}),
        (tiny_path, {"kv_dtype": "k=f16,v=f32"}),
        (tiny_path, {"activations": "int16"}),
        (tiny_path, {"backend": "reference"}),
    ):
        found = ask(path, prompt, store=store, **options)
        assert found.stats.num_stored_tokens == 0
        assert same_answer(found, ask(path, prompt, **options))
    assert len(list((store / "v1").glob("*/blocks"))) == 7
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(tiny_path.read_bytes())
    assert ask(copy, prompt, store=store).stats.num_stored_tokens == 96, "it is the weights that count, not their name"
    changed = bytearray(tiny_path.read_bytes())
    changed[-40] ^= 1
    copy.write_bytes(changed)
    assert ask(copy, prompt, store=store).stats.num_stored_tokens == 0, "one bit of one weight"


def test_engines_share_a_folder_while_both_run(tmp_path: Path, tiny_path: Path, opened: list[LLM]) -> None:
    first, second = (LLM(tiny_path, threads=1, store=tmp_path / "store") for _ in range(2))
    opened += [first, second]
    prompt = list(range(200))
    first.generate(prompt, PARAMS)
    assert first.engine.flush_store(10)
    (completion,) = second.generate(prompt, PARAMS)
    assert completion.stats.num_stored_tokens == 192


def test_a_secret_keeps_stores_apart(tmp_path: Path, tiny_path: Path) -> None:
    prompt, store = list(range(100)), tmp_path / "store"
    keys = [tmp_path / "a.key", tmp_path / "b.key"]
    for key in keys:
        key.write_text(f"{key.name} is long enough\n")
    counts = [
        ask(tiny_path, prompt, store=store, store_key=key).stats.num_stored_tokens
        for key in (None, keys[0], keys[1], keys[1], keys[0], None)
    ]
    assert counts == [0, 0, 0, 96, 96, 96]
    with pytest.raises(InvalidInput, match="No such file"):
        read_secret(tmp_path / "c.key")
    keys[0].write_text("short")
    with pytest.raises(InvalidInput, match="5 bytes"):
        LLM(tiny_path, store=store, store_key=keys[0])


def test_what_cannot_be_is_refused(tmp_path: Path, tiny_path: Path) -> None:
    for options in (
        {"store": ""},
        {"store": 3},
        {"store": "a\0b"},
        {"store": tmp_path, "prefix_cache": False},
        {"store": tmp_path, "store_quota": 0},
        {"store": tmp_path, "store_policy": "never"},
        {"store": tiny_path},
    ):
        with pytest.raises(InvalidInput):
            LLM(tiny_path, **options)


def test_about_says_what_is_there(tmp_path: Path, tiny_path: Path) -> None:
    ask(tiny_path, list(range(100)), store=tmp_path)
    (about,) = (tmp_path / "v1").glob("*/about.json")
    told = json.loads(about.read_text())
    assert told["model"] == str(tiny_path)
    assert told["payload_bytes"] == 2 * 2 * 2 * 16 * 2 * 32
    assert about.stat().st_mode & 0o077 == 0


def check_faults(
    tmp_path: Path,
    tiny_path: Path,
    fails: Callable[[int, int, str], int | None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    *,
    every: int,
    most: int,
) -> None:
    """Whichever call of the system fails while requests are served: the same tokens, and no more than a warning."""
    prompts = [[number, *range(130)] for number in range(2)]
    llm = LLM(tiny_path, threads=1)
    expected = [llm.generate(prompt, PARAMS)[0] for prompt in prompts]
    number, num_calls = 0, 1
    while number < num_calls:
        caplog.clear()
        llm = LLM(tiny_path, threads=1, store=tmp_path / str(number % 5))
        with monkeypatch.context() as patch:
            faulty = inject(patch, partial(fails, number))
            for prompt, wanted in zip(prompts, expected, strict=True):
                (completion,) = llm.generate(prompt, PARAMS)
                assert same_answer(completion, wanted)
                assert llm.engine.flush_store(10)
                llm.engine.clear_cache()
            num_calls = max(num_calls, min(faulty.num_calls, most))
        llm.close()
        warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(warnings) <= 2, "one for what cannot be written, one for what cannot be read"
        number += every
    assert num_calls > 20


def failing(error: int, always: bool) -> Callable[[int, int, str], int | None]:
    return lambda first, at, name: failure(first, always, error, at, name)


@pytest.mark.parametrize("always", [False, True], ids=["once", "always"])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    ("every", "most"), [(3, 40), pytest.param(1, 1000, marks=pytest.mark.full)], ids=["some calls", "any call"]
)
def test_with_a_disk_that_fails_service_goes_on(
    tmp_path: Path,
    tiny_path: Path,
    every: int,
    most: int,
    error: int,
    always: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    check_faults(tmp_path, tiny_path, failing(error, always), monkeypatch, caplog, every=every, most=most)


KILLED = """
import random, sys
from kvik.config import SamplingParams
from kvik.engine.llm import LLM
from kvik.engine.stream import run_all
path, store, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
llm = LLM(path, threads=1, store=store, store_quota="200kB", kv_memory="300kB")
chance = random.Random(seed)
print("ready", flush=True)
while True:
    beginning = chance.randrange(3)
    prompt = [(beginning * 11 + index * 7) % 300 for index in range(chance.randrange(40, 300))]
    llm.generate([prompt, prompt[:50]], SamplingParams(max_tokens=chance.randrange(1, 40)))
"""


def check_kills(tmp_path: Path, path: Path, seeds: range) -> None:
    """Kill a busy process at a random moment, again and again; what it leaves is used, and nothing of it is wrong."""
    store = tmp_path / "store"
    prompts = [[(beginning * 11 + index * 7) % 300 for index in range(300)] for beginning in range(3)]
    cold = [ask(path, prompt) for prompt in prompts]
    num_stored = 0
    for seed in seeds:
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path), str(store), str(seed)],
            stdout=subprocess.PIPE,
            env=environment(),
            text=True,
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(random.Random(seed).uniform(0, 0.5))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        llm = LLM(path, threads=1, store=store, store_quota="200kB")
        for completion, expected in zip(llm.generate(prompts, PARAMS), cold, strict=True):
            assert same_answer(completion, expected)
            num_stored += completion.stats.num_stored_tokens
        store_of = llm.engine.tier
        assert store_of is not None
        assert {fault.name for fault in store_of.store.stats.faults} <= {"MISSING"}, "nothing is ever torn"
        llm.close()
    assert num_stored > 0


def test_killed_at_random_moments_under_load(tmp_path: Path, tiny_path: Path) -> None:
    check_kills(tmp_path, tiny_path, range(3))


@pytest.mark.full
def test_killed_at_many_random_moments_under_load(tmp_path: Path, tiny_path: Path) -> None:
    check_kills(tmp_path, tiny_path, range(100, 300))


def kv_bits(engine: Engine, prompt: list[int]) -> str:
    """What a prompt leaves in the cache."""
    table = run(engine, prompt, SamplingParams(max_tokens=1)).sequence.table
    assert table.block_ids == []
    found = engine.cache.match(prompt)
    return hashlib.sha256(engine.runner.read_blocks(found.block_ids, 0)).hexdigest()[:16]


BITS = {
    "f32": "52a7dfe3fc6baf11",
    "f16": "0778fdfe39be45d9",
    "int8": "74b63d2186ddf35c",
    "k=int8,v=f16": "369f8e14e9fbf0a0",
    "k=f16,v=int8": "de26696eae559149",
    "k=f32,v=f16": "1beb8be5550f53c2",
}


def test_a_change_of_bits_or_layout_raises_the_numerics_version(tmp_path: Path) -> None:
    """Where this fails and the change is meant, raise `NUMERICS_VERSION` with it: stored blocks are of other bits."""
    model = tiny_model(tmp_path, seed=5)
    prompt = random_prompt(model, 200, 1)
    bits = {dtype: kv_bits(Engine(model, EngineConfig(kv_dtype=dtype)), prompt) for dtype in KV_DTYPES}
    assert (NUMERICS_VERSION, bits) == (1, BITS)
