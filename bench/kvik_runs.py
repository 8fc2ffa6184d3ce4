"""kvik's side of the comparison: each method is one measurement, and gives one figure."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence as SequenceOf
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvik import LLM, SamplingParams
from kvik.config import ActivationDType
from kvik.engine.engine import Engine
from kvik.engine.lease import Lease
from kvik.engine.sequence import Sequence
from kvik.errors import InvalidInput
from kvik.ops.base import Batch

IntArray = npt.NDArray[np.int32]

MEMORY_TOKENS = 8192
# Prints the peak of its own resident memory in KiB after all of the context is computed.
MEMORY_CHILD = f"""
import sys
from kvik import LLM, SamplingParams
llm = LLM(sys.argv[1], context={MEMORY_TOKENS}, threads=int(sys.argv[2]))
prompt = [100 + i % 1000 for i in range({MEMORY_TOKENS} - 1)]
llm.generate([prompt], SamplingParams(max_tokens=1, ignore_eos=True))
status = open("/proc/self/status").read()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


class NotAvailable(Exception):
    """A version of kvik, or of the peer, cannot do it."""


class KvikRuns:
    """Models stay loaded, and a prefilled context stays in the cache, from round to round."""

    def __init__(self, threads: int, context: int | None = None) -> None:
        self.threads = threads
        self.context = context  # most tokens of a sequence; None: the model's own limit
        self._deep: dict[tuple[Path, str, str, int], tuple[Engine, Lease | None]] = {}

    @cache  # noqa: B019  # lives as long as the program
    def llm(self, model: Path, activations: ActivationDType = "int8", kv_dtype: str = "f16") -> LLM:
        """A loaded model; a KV format that this version does not know raises `NotAvailable`."""
        try:
            return LLM(
                model,
                activations=activations,
                kv_dtype=kv_dtype,
                context=self.context,
                threads=self.threads,
                prefix_cache=False,
            )
        except InvalidInput as error:
            raise NotAvailable(str(error)) from error

    def prefill(self, model: Path, num_tokens: int, activations: ActivationDType = "int8") -> float:
        """Tokens a second of a prompt."""
        engine = self.llm(model, activations).engine
        sequence = engine.new_sequence(engine.new_request(random_tokens(engine, num_tokens), _params(1)))
        started_s = time.perf_counter()
        _finish(engine, sequence)
        return num_tokens / (time.perf_counter() - started_s)

    def decode(
        self,
        model: Path,
        num_tokens: int,
        *,
        depth: int = 1,
        activations: ActivationDType = "int8",
        kv_dtype: str = "f16",
    ) -> float:
        """Tokens a second after a prompt of `depth` tokens, with all that a step of the engine does."""
        key = (model, activations, kv_dtype, depth)
        engine, lease = self._deep.get(key) or (self.llm(model, activations, kv_dtype).new_engine(), None)
        # A later round goes on from what the first one computed, and computes the last prompt token only.
        params, prompt = _params(num_tokens + 1), random_tokens(engine, depth)
        sequence = engine.new_sequence(engine.new_request(prompt, params, hold=lease is None, lease=lease))
        engine.add(sequence)
        while sequence.num_completion_tokens == 0:
            engine.step()
            _raise(sequence)
        started_s = time.perf_counter()
        while sequence.finish_reason is None:
            engine.step()
        elapsed_s = time.perf_counter() - started_s
        _raise(sequence)
        self._deep[key] = engine, lease or sequence.lease
        return num_tokens / elapsed_s

    def batched_decode(self, model: Path, num_sequences: int, num_prompt_tokens: int, num_tokens: int) -> float:
        """Tokens a second of all sequences together: the decoder alone, and the most likely token of each."""
        engine = self.llm(model).engine
        decoder, kv_spec = engine.decoder, engine.kv_spec
        blocks = kv_spec.num_blocks_for(num_prompt_tokens + num_tokens)
        forward = decoder.capture(decoder.ops.allocate_kv(kv_spec, num_sequences * blocks))
        tables = np.arange(num_sequences * blocks, dtype=np.int32).reshape(num_sequences, blocks)
        latest = []
        for table in tables:
            prompt = np.asarray(random_tokens(engine, num_prompt_tokens), np.int32)
            batch = one_step(prompt, np.arange(num_prompt_tokens, dtype=np.int32), table[None], len(kv_spec.groups))
            latest.append(int(decoder.ops.to_numpy(forward(batch))[-1].argmax()))
        started_s = time.perf_counter()
        for step in range(num_tokens):
            positions = np.full(num_sequences, num_prompt_tokens + step, np.int32)
            batch = one_step(np.asarray(latest, np.int32), positions, tables, len(kv_spec.groups))
            latest = decoder.ops.to_numpy(forward(batch)).argmax(axis=1).tolist()
        return num_sequences * num_tokens / (time.perf_counter() - started_s)

    def step_bytes(
        self,
        model: Path,
        context: float,
        num_sequences: int = 1,
        activations: ActivationDType = "int8",
        kv: str = "f16",
    ) -> float:
        """Bytes of weights and of keys and values that a decode step reads."""
        engine = self.llm(model, activations, kv).engine
        weights = engine.runner.step_bytes(num_sequences, num_sequences)
        return weights + num_sequences * context * engine.kv_spec.token_bytes

    def peak_memory(self, model: Path) -> float:
        """Bytes: the peak of a process that computes a context of 8,192 tokens."""
        command = [sys.executable, "-c", MEMORY_CHILD, str(model), str(self.threads)]
        return int(_output_of(command)) * 1024.0

    def memory_target(self, model: Path) -> float:
        """Bytes: the file, the keys and values, and 60 MB."""
        kv_bytes = MEMORY_TOKENS * self.llm(model).engine.kv_spec.token_bytes
        return model.stat().st_size + kv_bytes + 60e6

    def cold_start(self, model: Path, prompt: str) -> float:
        """Seconds from the start of `kvik run` to its first token."""
        command = [sys.executable, "-m", "kvik", "run", "--raw", "--max-tokens", "1", "-m", str(model)]
        return first_byte_s([*command, "--threads", str(self.threads), prompt])


def random_tokens(engine: Engine, num_tokens: int) -> list[int]:
    """The arithmetic does not depend on which; the same ones each time."""
    ids = np.random.default_rng(0).integers(0, engine.decoder.spec.vocab_size, num_tokens)
    return [int(token_id) for token_id in ids]


def first_byte_s(command: SequenceOf[str]) -> float:
    """Seconds from the start of a program to the first byte on its stdout."""
    started_s = time.perf_counter()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_environment()
    ) as child:
        try:
            assert child.stdout is not None
            first = os.read(child.stdout.fileno(), 1)
            elapsed_s = time.perf_counter() - started_s
            _, errors = child.communicate()
        except BaseException:
            child.kill()
            raise
    if child.returncode != 0 or not first:
        raise RuntimeError(f"{command[0]} ended with {child.returncode}: {errors.decode(errors='replace')[-500:]}")
    return elapsed_s


def _output_of(command: SequenceOf[str]) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=_environment()).stdout


def _environment() -> dict[str, str]:
    """A child finds kvik as this process does, and its bytecode, as an installed program's is found."""
    paths = os.pathsep.join(filter(None, sys.path))
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPATH": paths}


def _params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True)


def _finish(engine: Engine, sequence: Sequence) -> None:
    engine.add(sequence)
    while sequence.finish_reason is None:
        engine.step()
    _raise(sequence)


def _raise(sequence: Sequence) -> None:
    if sequence.error is not None:
        raise sequence.error


def one_step(token_ids: IntArray, positions: IntArray, tables: IntArray, num_groups: int = 1) -> Batch:
    """One sequence's tokens, or one token of each sequence."""
    alone = len(tables) == 1
    rows = np.zeros(len(token_ids), np.int32) if alone else np.arange(len(tables), dtype=np.int32)
    return Batch.in_blocks(
        token_ids=token_ids,
        positions=positions,
        sequence_index=rows,
        block_tables=tables,
        logit_rows=np.asarray([len(token_ids) - 1], np.int32) if alone else rows,
        num_groups=num_groups,
    )
