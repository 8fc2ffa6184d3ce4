"""Tiny models, loaded, and what an engine makes of a prompt: for the tests of loader and engine."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from gguf_files import tiny_llama, write_gguf
from kvik.config import ActivationDType, SamplingParams
from kvik.engine.engine import Engine
from kvik.engine.sequence import Sequence
from kvik.files.gguf import read_gguf
from kvik.models.decoder import Decoder
from kvik.models.loader import LoadedModel, load_model
from kvik.ops.native import NativeOps
from kvik.ops.reference import ReferenceOps
from sequences import new_sequence

FloatArray = npt.NDArray[np.float32]
Tensor = tuple[npt.NDArray[Any], GGMLQuantizationType]

GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)


def tiny_model(
    folder: Path, *, activations: ActivationDType = "int8", threads: int = 1, context: int | None = None, **options: Any
) -> LoadedModel:
    """A random model on the native backend; `options` are those of `tiny_llama`."""
    path = tiny_llama(folder / "tiny.gguf", **options)
    return load_model(path, NativeOps(activations, threads), context=context)


def tiny_reference_model(folder: Path, *, activations: ActivationDType = "int8", **options: Any) -> LoadedModel:
    """The same on the reference backend."""
    return load_model(tiny_llama(folder / "tiny.gguf", **options), ReferenceOps(activations))


def with_ops(model: LoadedModel, activations: ActivationDType, threads: int) -> LoadedModel:
    """The same weights, run by other native ops: neither setting shows in how a weight is packed."""
    return dataclasses.replace(model, decoder=model.decoder.with_ops(NativeOps(activations, threads)))


def shuffle_free_blocks(engine: Engine, seed: int) -> None:
    """Let blocks come as a long life would have it: neither neighbours nor in order."""
    pool, rng = engine.cache.pool, random.Random(seed)

    def any_free(after: int | None) -> int:
        return rng.choice([block_id for block_id in range(pool.num_blocks) if pool.is_free(block_id)])

    pool.next_free = any_free  # type: ignore[method-assign]


def altered(
    source: Path,
    target: Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    without: Iterable[str] = (),
) -> Path:
    """A copy of a GGUF file with some keys and tensors replaced or added, and some of either left out."""
    file = read_gguf(source)
    without = set(without)
    all_tensors: dict[str, Tensor] = {
        name: (tensor.data.reshape(*tensor.shape[:-1], -1), GGMLQuantizationType(tensor.type))
        for name, tensor in file.tensors.items()
    }
    return write_gguf(
        target,
        {key: value for key, value in (dict(file.metadata) | dict(metadata or {})).items() if key not in without},
        {name: tensor for name, tensor in (all_tensors | dict(tensors or {})).items() if name not in without},
    )


@dataclass(frozen=True, slots=True)
class Run:
    """One finished sequence: the tokens it chose and the logits it chose them from."""

    sequence: Sequence
    token_ids: list[int]
    logits: FloatArray  # (completion tokens, vocab_size)


def run_sequence(engine: Engine, sequence: Sequence) -> Run:
    """Queue the sequence and step to its end, proving the accounts after each step."""
    engine.add(sequence)
    rows: list[FloatArray] = []
    while sequence.finish_reason is None:
        result = engine.step()
        assert result is not None
        engine.scheduler.check()
        rows += [row for owner, row in zip(result.sequences, result.logits, strict=True) if owner is sequence]
    if sequence.error is not None:
        raise sequence.error
    return Run(sequence, sequence.completion_ids, np.stack(rows))


def run(engine: Engine, prompt: SequenceOf[int], params: SamplingParams = GREEDY, *, use_cache: bool = True) -> Run:
    """Complete one prompt on an engine that nobody else uses."""
    return run_sequence(engine, new_sequence(engine, prompt, params, use_cache=use_cache))


def num_common_tokens(first: SequenceOf[int], second: SequenceOf[int]) -> int:
    """How many tokens both begin with."""
    differs = (index for index, (mine, other) in enumerate(zip(first, second, strict=False)) if mine != other)
    return next(differs, min(len(first), len(second)))


def assert_idle(engine: Engine) -> None:
    """Nothing runs, nothing waits, and nobody holds a block."""
    engine.scheduler.check()
    assert not engine.scheduler.has_work
    assert engine.cache.pool.num_held == 0
    assert engine.step() is None


def random_prompt(model: LoadedModel, length: int, seed: int) -> list[int]:
    """Token ids by `default_rng(seed)`, special ones among them."""
    vocab_size = model.decoder.spec.vocab_size
    return [int(token_id) for token_id in np.random.default_rng(seed).integers(0, vocab_size, length)]


def beside_the_file(decoder: Decoder) -> int:
    """Bytes that ops read and no file has: ones of norms without a weight; less those of numbers that are no arrays."""
    norms = [layer.qkv.value_norm for layer in decoder.weights.layers]
    ones = sum(norm.num_bytes for norm in norms if norm is not None)
    return ones - 4 * decoder.spec.num_layers * decoder.spec.layer_scales
