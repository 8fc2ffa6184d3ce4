"""Memory: the process holds what the cache says it uses, and what is asked for is refused where it cannot be had.

Resident memory is measured in processes of their own. A superblock of the model there is 8 MiB of float32.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_files import tiny_llama
from kvik import _native
from kvik.cache import BLOCKS_PER_SUPERBLOCK, KVCacheSpec, sizing
from kvik.cache.sizing import AUTO_CONTEXTS, choose_pool_size
from kvik.config import EngineConfig, KVDType, SamplingParams
from kvik.engine import llm as llm_module
from kvik.engine.engine import KEPT_SUPERBLOCKS, Engine
from kvik.engine.llm import LLM
from kvik.engine.session import Session
from kvik.errors import InvalidInput, NotEnoughMemory
from kvik.models.loader import LoadedModel
from models import assert_idle, random_prompt, run
from sequences import new_sequence
from subprocesses import python

MIB = 2**20
SLACK_BYTES = 4 * MIB  # what Python and NumPy take and leave meanwhile
STEP_BYTES = 16 * MIB  # intermediate results of a step of 512 tokens
DTYPES = get_args(KVDType)

resident = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")

SCRIPT = """
import json, os, sys
from kvik import LLM, SamplingParams

def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def note(what):
    notes[what] = [resident_bytes(), llm.cache.committed_bytes, llm.cache.num_bytes]

def write(num_tokens, first_token):
    llm.generate([[first_token + i % 7 for i in range(num_tokens)]], SamplingParams(max_tokens=1, ignore_eos=True))

notes = {}
path, dtype, small, large = sys.argv[1:]
llm = LLM(path, threads=1, kv_dtype=dtype, kv_memory=int(small))
write(40, 3)  # so that all that Python makes once is made
del llm
notes["before"] = [resident_bytes(), 0, 0]
llm = LLM(path, threads=1, kv_dtype=dtype, kv_memory=int(large))
note("made")
write(1000, 100)
llm.cache.clear()
note("warm")  # a step's intermediate results have their place
for num_tokens in (1, 300, 1000, 2500):
    write(num_tokens, 3 + num_tokens % 200)
    note(f"computed {num_tokens}")
llm.cache.clear()
note("cleared")
write(2500, 50)
note("again")
llm.cache.clear()
note("cleared again")
print(json.dumps(notes))
"""


@pytest.fixture(scope="module")
def large_kv_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with much to remember: 32 KiB of float32 a token."""
    path = tmp_path_factory.mktemp("memory") / "tiny.gguf"
    shape = {"num_layers": 8, "num_heads": 8, "num_kv_heads": 8, "head_dim": 64, "hidden_size": 64}
    return tiny_llama(path, **shape, intermediate_size=64, context_length=4096)  # type: ignore[arg-type]


@resident
@pytest.mark.parametrize("dtype", DTYPES)
def test_resident_memory_is_what_the_cache_says(large_kv_path: Path, dtype: KVDType) -> None:
    superblock_bytes = BLOCKS_PER_SUPERBLOCK * KVCacheSpec.uniform(8, 8, 64, dtype).block_bytes
    sizes = [str(4 * superblock_bytes), str(100 * superblock_bytes)]
    done = python("-c", SCRIPT, str(large_kv_path), dtype, *sizes)
    assert done.returncode == 0, done.stderr
    notes: dict[str, list[int]] = json.loads(done.stdout)
    before, made, warm = (notes.pop(what)[0] for what in ("before", "made", "warm"))
    assert made - before < SLACK_BYTES, "memory that nobody has written"
    assert warm - made < STEP_BYTES
    for what, (resident_bytes, committed_bytes, num_bytes) in notes.items():
        assert num_bytes == 100 * superblock_bytes
        assert abs(resident_bytes - warm - committed_bytes) < 2 * superblock_bytes + SLACK_BYTES, f"{what}: {notes}"
        assert ("cleared" in what) == (committed_bytes == 0), what
    # What is cached stays, one prompt beside the other; cleared, it is as if it had not been.
    assert notes["computed 2500"][1] >= (1 + 3 + 9) * superblock_bytes
    assert notes["again"][1] >= 9 * superblock_bytes
    for what in ("cleared", "cleared again"):
        assert notes[what][0] - warm < SLACK_BYTES


# What an idle engine keeps.


def num_unused_superblocks(engine: Engine) -> int:
    """Superblocks that are committed, and of which no block is held or reusable."""
    pool = engine.cache.pool
    pool.check([hold.table.block_ids for hold in engine.cache.holds])
    used = {block_id // BLOCKS_PER_SUPERBLOCK for block_id in range(pool.num_blocks) if not pool.is_free(block_id)}
    return engine.cache.committed_bytes // (BLOCKS_PER_SUPERBLOCK * engine.kv_spec.block_bytes) - len(used)


def after_many_requests(llm: LLM) -> None:
    prompts = [random_prompt(llm.model, 400, seed) for seed in range(5)]
    llm.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True))


def after_recomputing(llm: LLM) -> None:
    llm.generate(random_prompt(llm.model, 500, seed=0), SamplingParams(max_tokens=4, ignore_eos=True), use_cache=False)


def after_a_stream_was_left(llm: LLM) -> None:
    streams = [llm.stream(random_prompt(llm.model, 500, seed), SamplingParams(ignore_eos=True)) for seed in range(6)]
    for stream in streams:
        next(stream)
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]


def after_an_abort(llm: LLM) -> None:
    engine = llm.engine
    sequences = [
        new_sequence(engine, random_prompt(llm.model, 500, seed), SamplingParams(ignore_eos=True)) for seed in range(6)
    ]
    for sequence in sequences:
        engine.add(sequence)
    while any(sequence.num_completion_tokens == 0 for sequence in sequences):
        engine.step()
    for sequence in sequences:
        engine.abort(sequence)


def after_a_session(llm: LLM) -> None:
    with Session(llm) as session:
        session.append("user", "tell me all you know, " * 12)
        session.generate(SamplingParams(max_tokens=60, ignore_eos=True))
        with session.fork() as other:
            other.append("user", "and now")
            other.generate(SamplingParams(max_tokens=4, ignore_eos=True))


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize(
    "live",
    [after_many_requests, after_recomputing, after_a_stream_was_left, after_an_abort, after_a_session],
)
def test_an_idle_engine_keeps_little_that_is_unused(
    tiny_path: Path, live: Callable[[LLM], None], prefix_cache: bool
) -> None:
    llm = LLM(str(tiny_path), threads=1, prefix_cache=prefix_cache)
    live(llm)
    assert llm.cache.num_held == 0
    assert num_unused_superblocks(llm.engine) <= KEPT_SUPERBLOCKS
    if not prefix_cache:
        assert llm.cache.num_reusable == 0
    llm.cache.clear()
    assert (llm.cache.committed_bytes, llm.cache.num_free) == (0, llm.cache.num_blocks)
    assert_idle(llm.engine)


def test_a_session_that_goes_leaves_little(tiny_path: Path) -> None:
    """The conversation is longer than what an idle engine keeps, and nothing else runs afterwards."""
    llm = LLM(str(tiny_path), threads=1, prefix_cache=False, kv_dtype="f32")
    sessions = [Session(llm) for _ in range(5)]
    for session in sessions:
        session.append("user", "x" * 300)
        session.generate(SamplingParams(max_tokens=4, ignore_eos=True))
    assert llm.cache.num_held > KEPT_SUPERBLOCKS * BLOCKS_PER_SUPERBLOCK
    for session in sessions:
        session.close()
    assert llm.cache.num_held == 0
    assert num_unused_superblocks(llm.engine) <= KEPT_SUPERBLOCKS


# How large the cache becomes.

specs = st.builds(
    KVCacheSpec.uniform,
    num_layers=st.integers(1, 96),
    num_kv_heads=st.integers(1, 32),
    head_dim=st.integers(1, 64).map(lambda count: 8 * count),
    dtype=st.sampled_from(DTYPES),
)
contexts = st.integers(2, 2**20)


def pool_blocks(available: int, spec: KVCacheSpec, context: int, kv_memory: int | str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizing, "available_memory_bytes", lambda: available)
        return choose_pool_size(spec, context, kv_memory, token_budget=512, max_running=64).num_blocks


@given(specs, contexts, st.integers(1, 2**44))
def test_the_figure_is_never_above_what_was_asked_for(spec: KVCacheSpec, context: int, kv_memory: int) -> None:
    superblock_bytes = BLOCKS_PER_SUPERBLOCK * spec.block_bytes
    if kv_memory < superblock_bytes:
        with pytest.raises(InvalidInput, match=f"{kv_memory:,} bytes") as caught:
            pool_blocks(2**50, spec, context, kv_memory)
        assert (found := re.search(r"([\d,]+) MiB or more", caught.value.hint))
        assert pool_blocks(2**50, spec, context, number(found[1]) * MIB) > 0
        return
    num_blocks = pool_blocks(2**50, spec, context, kv_memory)
    assert num_blocks % BLOCKS_PER_SUPERBLOCK == 0
    assert kv_memory - superblock_bytes < num_blocks * spec.block_bytes <= kv_memory


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spare_bytes", [-1, 0, 1, 12_345])
def test_the_figure_is_that_of_the_arrays(tiny: LoadedModel, dtype: KVDType, spare_bytes: int) -> None:
    spec = tiny.decoder.spec.kv_spec(dtype)
    kv_memory = 5 * BLOCKS_PER_SUPERBLOCK * spec.block_bytes + spare_bytes
    engine = Engine(tiny, EngineConfig(kv_dtype=dtype, kv_memory=kv_memory))
    num_bytes = engine.cache.pool.num_blocks * spec.block_bytes
    (group,) = spec.groups
    head_dim = group.key.num_items
    arrays = _native.KVArrays(
        spec.num_layers, engine.cache.pool.num_blocks, group.num_kv_heads, head_dim, spec.dtype, spec.dtype
    )
    assert num_bytes == arrays.num_bytes
    assert kv_memory - BLOCKS_PER_SUPERBLOCK * spec.block_bytes < num_bytes <= kv_memory
    run(engine, random_prompt(tiny, 300, seed=1))
    assert engine.cache.committed_bytes <= num_bytes


@given(specs, contexts, st.integers(0, 2**44))
def test_auto_takes_half_of_the_memory_or_one_context(spec: KVCacheSpec, context: int, available: int) -> None:
    one_context = spec.pool_blocks_for(context)
    if one_context * spec.block_bytes > available:
        check_refusal(available, spec, context, "auto")
        return
    num_blocks = pool_blocks(available, spec, context, "auto")
    assert num_blocks % BLOCKS_PER_SUPERBLOCK == 0
    assert one_context <= num_blocks <= AUTO_CONTEXTS * one_context
    num_bytes = num_blocks * spec.block_bytes
    assert num_bytes <= available // 2 or num_blocks == one_context
    # And no less than that: another superblock would be too much.
    assert (
        num_blocks == AUTO_CONTEXTS * one_context
        or 2 * (num_bytes + BLOCKS_PER_SUPERBLOCK * spec.block_bytes) > available
    )


@given(specs, contexts, st.integers(0, 2**44), st.floats(0, 8))
def test_more_than_the_machine_has_is_refused(spec: KVCacheSpec, context: int, available: int, factor: float) -> None:
    kv_memory = max(BLOCKS_PER_SUPERBLOCK * spec.block_bytes, int(available * factor))
    size = spec.pool_size_within(kv_memory, context=context, step_tokens=512, max_running=64)
    if spec.pool_bytes(size) > available:
        check_refusal(available, spec, context, kv_memory)
    else:
        assert pool_blocks(available, spec, context, kv_memory) * spec.block_bytes <= min(kv_memory, available)


def check_refusal(available: int, spec: KVCacheSpec, context: int, kv_memory: int | str) -> None:
    """The refusal gives figures that are taken when they are followed, or says that none would be."""
    with pytest.raises(NotEnoughMemory, match="a cache of") as caught:
        pool_blocks(available, spec, context, kv_memory)
    hint = caught.value.hint
    tokens = re.search(r"the context to (\d+) or less", hint)
    size = re.search(r"kv_memory to ([\d,]+) MiB or less", hint)
    if tokens is not None:
        assert kv_memory == "auto"
        assert 0 < int(tokens[1]) < context
        num_blocks = pool_blocks(available, spec, int(tokens[1]), "auto")
        assert spec.pool_blocks_for(int(tokens[1])) <= num_blocks
        assert num_blocks * spec.block_bytes <= available
    if size is not None:
        assert 0 < pool_blocks(available, spec, context, number(size[1]) * MIB) * spec.block_bytes <= available
    superblock_bytes = BLOCKS_PER_SUPERBLOCK * spec.block_bytes
    assert (tokens is not None) == (kv_memory == "auto" and superblock_bytes <= available)
    if tokens is None and size is None:
        least = re.search(r"free some: the least cache takes ([\d,]+) MiB", hint)
        assert least is not None, hint
        assert available < number(least[1]) * MIB < superblock_bytes + MIB


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_what_is_refused_costs_nothing(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the weights are read."""
    for module in (sizing, llm_module):
        monkeypatch.setattr(module, "available_memory_bytes", lambda: 10 * MIB)

    def read(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("kvik.models.loader.Decoder", read)
    for kv_memory, error in ((11 * MIB, NotEnoughMemory), ("1GiB", NotEnoughMemory), (1000, InvalidInput)):
        with pytest.raises(error):
            LLM(str(tiny_path), kv_memory=kv_memory)
    monkeypatch.undo()
    assert LLM(str(tiny_path), kv_memory="11MiB").cache.num_bytes <= 11 * MIB
