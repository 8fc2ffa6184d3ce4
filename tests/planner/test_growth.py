"""A process that loads a model and fills its cache grows by what was planned, within one part in a hundred.

Resident memory is read in processes of their own, as in tests/engine/test_memory.py. The models remember much, so that
what Python and its libraries take by themselves stays below that part.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

from families.gguf_cases import tensors_of
from families.gguf_of import gguf_of
from gguf_files import tiny_llama
from kvik.planner.plan import plan
from subprocesses import python

pytestmark = [
    pytest.mark.full,  # caches of 500 MB, written in full
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc"),
]

SCRIPT = """
import gc, json, os, sys
import kvik
from kvik import LLM, SamplingParams
from kvik.machine import give_back_memory

def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def fill(llm, num_tokens, users):
    prompts = [[3 + (7 * index + user) % 200 for index in range(num_tokens - 1)] for user in range(users)]
    llm.generate(prompts, SamplingParams(max_tokens=1, ignore_eos=True))

warm, path, kv, context, users = *sys.argv[1:4], *map(int, sys.argv[4:])
planned = kvik.plan(path, context=context, users=users, kv=kv)
llm = LLM(warm, threads=1)
fill(llm, 400, 2)  # so that all that is made once is made
del llm
gc.collect()
give_back_memory()  # what the first model leaves to malloc would be taken again, and not seen to grow
before = resident_bytes()
llm = LLM(path, threads=1, kv_dtype=kv, context=context, kv_memory=planned.kv.num_bytes)
fill(llm, context, users)
print(json.dumps([planned.needed_bytes, resident_bytes() - before, planned.kv.num_bytes, llm.cache.committed_bytes]))
"""


def check_growth(warm: Path, path: str, kv: str, context: int, users: int) -> None:
    done = python("-c", SCRIPT, str(warm), path, kv, str(context), str(users))
    assert done.returncode == 0, done.stderr
    planned, grown, kv_bytes, committed = json.loads(done.stdout)
    print(f"planned {planned / 1e6:.1f} MB, grown by {grown / 1e6:.1f} MB")  # noqa: T201  # shown where it fails
    assert committed == kv_bytes
    assert abs(grown - planned) <= planned / 100


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("growth") / "warm.gguf")


@pytest.mark.parametrize(("seed", "kv"), [(0, "f32"), (1, "f16"), (2, "int8")])
def test_random_models_grow_as_planned(tmp_path: Path, warm: Path, seed: int, kv: str) -> None:
    rng = random.Random(seed)
    token_bytes = {"f32": 4 * 64, "f16": 2 * 64, "int8": 64 + 4}[kv]
    num_layers, num_kv_heads = rng.randint(12, 20), rng.choice([24, 32])
    users = rng.randint(4, 8)
    context = 500 * 10**6 // (2 * num_layers * num_kv_heads * token_bytes * users)
    shape = {"num_layers": num_layers, "num_heads": num_kv_heads, "num_kv_heads": num_kv_heads, "head_dim": 64}
    widths = {"hidden_size": 64, "intermediate_size": rng.choice([64, 256]), "context_length": 1 << 15}
    print(f"seed {seed}: {shape}, {widths}, {kv}, {users} users, context {context}")  # noqa: T201  # shown where it fails
    path = tiny_llama(tmp_path / "tiny.gguf", **shape, **widths, seed=seed)  # type: ignore[arg-type]
    check_growth(warm, str(path), kv, context, users)


MIXTURE = {
    "model_type": "qwen3_moe",
    "vocab_size": 300,
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "num_experts": 16,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 512,
}


def test_a_step_of_a_mixture_takes_about_what_is_planned(tmp_path: Path, warm: Path) -> None:
    """Each token's row once for each of its experts, and both halves of their MLPs."""
    path = gguf_of(tmp_path / "mixture.gguf", MIXTURE, tensors_of(MIXTURE))
    done = python("-c", SCRIPT, str(warm), str(path), "f16", "600", "1")
    assert done.returncode == 0, done.stderr
    planned, grown, *_ = json.loads(done.stdout)
    step = plan(str(path), context=600).activation_bytes
    assert step > 11e6
    assert abs(grown - planned) < step / 5


def test_the_default_model_grows_as_planned(default_model_path: Path, warm: Path) -> None:
    check_growth(warm, str(default_model_path), "f16", 512, 16)
