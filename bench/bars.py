"""The bars of the shapes that people run: what kvik is to reach next to the better of llama.cpp and ik_llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from comparison import Case, Measure
from kvik.files.gguf import read_gguf
from kvik_runs import KvikRuns
from llama_cpp_runs import FlashAttention, IkLlamaCppRuns, LlamaCppRuns

CONTEXT = 8192
DEPTH = 8000
FLASH: tuple[FlashAttention, ...] = ("on", "off")
IK_OPTIONS: Mapping[str, tuple[FlashAttention, tuple[str, ...]]] = {
    "fa on": ("on", ()),
    "fa on, rtr": ("on", ("rtr",)),
    "fa on, rtr mqkv thp": ("on", ("rtr", "mqkv", "thp")),
    "fa off, rtr": ("off", ("rtr",)),
}
"""Of ik_llama.cpp, by the names in the table."""


@dataclass(frozen=True)
class Bars:
    """Ratios to the best of theirs, and the share of the bandwidth when one sequence decodes; `None`: not asked for."""

    decode: float | None = None
    share: float | None = None
    deep: float | None = None  # at `DEPTH`, f16 keys and values
    deep_int8: float | None = None
    prefill: float | None = None
    batch: float | None = None
    has_depth: bool = True  # whether it is measured at depth: a large model takes many minutes to get there
    has_ik: bool = True  # whether the better of both counts, or llama.cpp alone


EXPERTS = Bars(decode=1.0, prefill=1.5, batch=1.5, has_depth=False, has_ik=False)


BARS: dict[tuple[str, int, int], Bars] = {
    ("llama", 2048, 16): Bars(1.05, 0.9, 1.5, 1.5, 1.8, 2.0),
    ("llama", 3072, 28): Bars(1.05, 0.9, 1.3, 1.4, 1.8, 2.0),
    ("qwen3", 4096, 36): Bars(1.05, 0.9, None, None, 1.8, 2.0, has_depth=False),
    ("gemma3", 640, 18): Bars(1.2, None, 1.5, 1.5, 1.8, 2.0),
    ("llama", 576, 30): Bars(1.4, None, 2.5, 2.0, 1.6, 2.5),
    ("olmoe", 2048, 16): EXPERTS,
    ("qwen3moe", 2048, 8): EXPERTS,
    ("gpt-oss", 2880, 8): EXPERTS,
}
"""By architecture, hidden size and layers, for the formats that most files have."""

OTHER_FORMATS = Bars(decode=1.0, prefill=1.5, has_depth=False)
"""Of the first of these shapes, in all formats but Q4_K_M."""


def bars_of(model: Path) -> Bars:
    """The bars of a file's shape and format; where there are none, everything is measured and nothing asked for."""
    file = read_gguf(model)
    name = file.get_str("general.architecture")
    shape = (name, file.get_int(f"{name}.embedding_length"), file.get_int(f"{name}.block_count"))
    if shape == ("llama", 2048, 16) and "Q4_K_M" not in model.name:
        return OTHER_FORMATS
    return BARS.get(shape, Bars())


def context_of(model: Path) -> int:
    """`CONTEXT`, or as many tokens as the model was made for."""
    file = read_gguf(model)
    return min(CONTEXT, file.get_int(f"{file.get_str('general.architecture')}.context_length"))


def bar_cases(ours: KvikRuns, theirs: LlamaCppRuns, ik: IkLlamaCppRuns, model: Path) -> Iterator[Case]:
    """All rows of the table."""
    bars = bars_of(model)
    ik_options = IK_OPTIONS if bars.has_ik else {}

    def decode(count: int, depth: int = 0, kv_type: str = "f16", label: str = "") -> dict[str, Measure]:
        flash = FLASH if kv_type == "f16" else ("on",)
        found: dict[str, Measure] = {
            f"llama.cpp{label}, fa {on}": partial(theirs.decode, model, count, on, depth=depth, kv_type=kv_type)
            for on in flash
        }
        found |= {
            f"ik_llama.cpp{label}, {name}": partial(ik.decode, model, count, *flags, depth=depth, kv_type=kv_type)
            for name, flags in ik_options.items()
            if flags[0] in flash
        }
        return found

    yield Case(
        "decode 128 from empty",
        partial(ours.decode, model, 128, depth=1),
        decode(128),
        target=bars.decode,
        share_target=bars.share,
        step_bytes=partial(ours.step_bytes, model, 64),
    )
    if bars.has_depth:
        deep = decode(32, DEPTH)
        for kv, peers, target in (
            ("f16", deep, bars.deep),
            ("int8", deep | decode(32, DEPTH, "q8_0", ", q8_0 KV"), bars.deep_int8),
        ):
            yield Case(
                f"decode 32 at {DEPTH:,}, {kv} KV",
                partial(ours.decode, model, 32, depth=DEPTH, kv_dtype=kv),
                peers,
                target=target,
                step_bytes=partial(ours.step_bytes, model, DEPTH + 16, 1, "int8", kv),
            )
    yield Case(
        "prefill 512",
        partial(ours.prefill, model, 512),
        {f"llama.cpp, fa {on}": partial(theirs.prefill, model, 512, on) for on in FLASH}
        | {f"ik_llama.cpp, {name}": partial(ik.prefill, model, 512, *flags) for name, flags in ik_options.items()},
        target=bars.prefill,
    )
    yield Case(
        "decode 64 after 128, 8 sequences",
        partial(ours.batched_decode, model, 8, 128, 64),
        {f"llama.cpp, fa {on}": partial(theirs.batched_decode, model, 8, 128, 64, on) for on in FLASH}
        | {
            f"ik_llama.cpp, {name}": partial(ik.batched_decode, model, 8, 128, 64, *flags)
            for name, flags in ik_options.items()
        },
        target=bars.batch,
        step_bytes=partial(ours.step_bytes, model, 128 + 32, 8),
        tokens_of_step=8,
    )
