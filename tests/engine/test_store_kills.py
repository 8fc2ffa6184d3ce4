"""Killed at each call of the system that the store makes while an engine serves: a restart gives the uncached bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from subprocesses import python

KILLED = """
import os, shutil, signal, sys
from dataclasses import replace
from pathlib import Path
import pytest
from kvik.config import SamplingParams
from kvik.engine.llm import LLM
from kvik.store import Fault
from store.faults import inject

path, root, first, step = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
params = SamplingParams(max_tokens=5, ignore_eos=True, logprobs=3)
prompts = [[(beginning * 11 + index * 7) % 300 for index in range(110)] for beginning in range(3)]
llm = LLM(path, threads=1)  # it has no threads, so that it can be forked, and no store yet

def answers(*asked):
    found = llm.generate([prompts[each] for each in asked], params)
    return {each: (completion.token_ids, completion.logprobs) for each, completion in zip(asked, found)}, found

expected = answers(0, 1, 2)[0]

def in_a_child(work):
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]

def open_engine(store):
    llm.engine = llm.new_engine(store=str(store), store_quota="60kB")  # of the 9 blocks, 7
    return llm.engine

def serve(store, number):
    with pytest.MonkeyPatch.context() as patch:
        inject(patch, lambda at, name: signal.SIGKILL if at == number else None)
        engine = open_engine(store)
        for asked in ((0,), (1, 2), (0, 1)):  # what is new is written, what is evicted and known is read
            found = answers(*asked)[0]
            assert all(expected[each] == found[each] for each in asked)
            assert engine.flush_store(60)
            engine.clear_cache()
        llm.close()

def restart(store, counts):
    engine = open_engine(store)
    found, completions = answers(0, 1, 2)
    assert found == expected, "other tokens or logprobs than those that were computed without a store"
    faults = engine.tier.store.stats.faults.keys() - {Fault.MISSING}
    assert not faults, f"torn: {faults}"
    assert engine.flush_store(60)
    llm.close()
    assert not list(store.glob("v1/*/quarantine/*"))
    counts.write_text(str(sum(each.stats.num_stored_tokens for each in completions)))

number, num_stored = first, 0
while True:
    store = root / str(number)
    status = in_a_child(lambda: serve(store, number))
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, f"call {number}: {status}"
    after = in_a_child(lambda: restart(store, root / "count"))
    assert after == 0, f"killed at call {number}: the restart is wrong"
    num_stored += int((root / "count").read_text())
    shutil.rmtree(store)
    if status == 0:
        break
    number += step
print(number, num_stored)
"""


def check_kills(tmp_path: Path, model: Path, first: int, step: int) -> None:
    told = python("-c", KILLED, str(model), str(tmp_path), str(first), str(step), OPENBLAS_NUM_THREADS="1")
    assert told.returncode == 0, told.stderr
    num_calls, num_stored_tokens = map(int, told.stdout.split())
    assert num_calls > 150, "the calls of several blocks, of reading some, of sweeps"
    assert num_stored_tokens > 0, "what was whole is used"


def test_killed_at_some_calls_of_the_system_a_restart_gives_the_same_bits(tmp_path: Path, tiny_path: Path) -> None:
    check_kills(tmp_path, tiny_path, 3, 23)


@pytest.mark.full
@pytest.mark.parametrize("first", range(4))
def test_killed_at_every_call_of_the_system_a_restart_gives_the_same_bits(
    tmp_path: Path, tiny_path: Path, first: int
) -> None:
    check_kills(tmp_path, tiny_path, first, 4)
