"""What windows save: a model of Gemma 3 1B's shape with random weights, behind long contexts, with windows and without.

python bench/windows.py --context 8000
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

import numpy as np

from kvik import LLM, SamplingParams
from kvik.models.decoder import Decoder
from kvik.models.random_weights import RandomWeights
from kvik.models.spec import DecoderSpec, LayerSpec, RopeSpec
from kvik.models.weights import read_weights

LAYERS, WINDOW, PATTERN = 26, 512, 6
DECODED = 64


def spec_of(vocab_size: int, context: int, *, windows: bool) -> DecoderSpec:
    """Five layers with a window to one without; or none."""
    rope = RopeSpec(10_000.0, 256, adjacent_pairs=False)
    layers = tuple(LayerSpec(rope, WINDOW if windows and (index + 1) % PATTERN else None) for index in range(LAYERS))
    return DecoderSpec(
        architecture="gemma3_text",
        hidden_size=1152,
        intermediate_size=6912,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        vocab_size=vocab_size,
        context_length=context,
        layers=layers,
        tied_head=True,
        norm_eps=1e-6,
        norm_places="around",
        qk_norm="head",
        activation="gelu_tanh",
    )


def main() -> None:
    """Measure both in turns, and print what each takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    base = LLM("smollm2", context=512)
    context = options.context + DECODED + 1
    llms: dict[str, LLM] = {}
    for name, windows in (("windows", True), ("none", False)):
        spec = spec_of(base.model.decoder.spec.vocab_size, context, windows=windows)
        ops = base.model.decoder.ops
        decoder = Decoder(spec, read_weights(spec, RandomWeights(spec, ops, {}, "Q4_1")), ops, context)
        base.model = replace(base.model, context=context)
        llms[name] = base.with_decoder(decoder)
    prompt = np.random.default_rng(0).integers(0, spec.vocab_size, options.context).tolist()
    speeds: dict[str, list[float]] = {name: [] for name in llms}
    stats = {}
    for _ in range(options.rounds):
        for name, llm in llms.items():
            (done,) = llm.generate([prompt], SamplingParams(max_tokens=DECODED, ignore_eos=True))
            speeds[name].append((DECODED - 1) / done.stats.decode_s)
            stats[name] = done.stats
    for name in llms:
        print(
            f"{name}: {stats[name].kv_bytes / 1e6:.1f} MB of keys and values held behind {options.context:,} tokens,"
            f" decode {statistics.median(speeds[name]):.1f} tok/s"
        )


if __name__ == "__main__":
    main()
