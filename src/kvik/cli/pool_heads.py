"""`kvik pool-heads`: a model with fewer KV heads, and what that costs and gains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvik.cli.options import MAX_KV_HEADS, check_count, check_output_path, flag, value
from kvik.cli.report import write_report
from kvik.cli.terminal import columns, note, rate, write
from kvik.config import SamplingParams
from kvik.errors import InvalidInput
from kvik.hub.progress import bytes_progress, terminal_progress

if TYPE_CHECKING:
    from kvik.engine.llm import LLM

DECODED, ROUNDS = 64, 3

TEXT = """A river begins as rain on high ground. Drops gather into rills, rills into brooks, and where two brooks meet
the water is already strong enough to move a stone. Lower down the valley widens and the river slows; it drops the
sand and mud that it carried, and people have grown wheat on such ground for thousands of years. They built bridges
where the banks were firm, mills where the water fell, and towns where both could be had. In spring, when the snow
melts, the river remembers its old beds and tries them again. Then the meadows are lakes for a week, and children
row between the trees. By June nobody would believe it: the water is clear and low, and the only sound is that of
the cattle that have come down to drink."""
"""What the loss is measured on."""


def pool_heads(
    *,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="smollm2, a .gguf path or a Hub id.")],
    out: Annotated[Path, value("Output", "FILE", "The .gguf to write.", "-o", "--out")],
    kv_heads: Annotated[int, value("What is changed", "N", "KV heads; a divisor of the model's own.")],
    as_json: Annotated[bool, flag("Output", "--json", "Print one JSON object.")] = False,
) -> None:
    """Write a model with fewer KV heads: the mean of neighbours, as in the GQA paper.

    Keys and values take less memory and less time to read, but a model that was not trained further with its new heads
    writes worse. Both are measured: the mean loss over a text of this program's own, memory, and decode.
    """
    from kvik.engine.llm import LLM
    from kvik.hub.store import resolve
    from kvik.models.loader import check_config_of
    from kvik.models.pool_heads import pool_kv_heads

    check_count("--kv-heads", kv_heads, 1, MAX_KV_HEADS)
    check_output_path("--out", out)
    if out.suffix.lower() != ".gguf":
        raise InvalidInput(f"--out is {out}, kvik writes .gguf files", hint=f"name it {out.with_suffix('.gguf').name}")
    with terminal_progress() as report:
        source = resolve(model, check_config=check_config_of, progress=report)
    if source.is_dir():
        raise InvalidInput(
            f"{model} is a checkpoint folder, kvik pool-headss GGUF files",
            hint="make a GGUF of it first, with llama.cpp's convert_hf_to_gguf.py",
        )
    if out.exists() and out.samefile(source):
        raise InvalidInput(f"--out is the model itself, {out}", hint="name another file")
    with bytes_progress() as report:
        before = pool_kv_heads(source, out, kv_heads, report)
    note(f"{out}: written; measuring what it costs and gains")
    llms = {before.num_kv_heads: LLM(source, context=_context(before)), kv_heads: LLM(out, context=_context(before))}
    losses = {heads: _loss(llm) for heads, llm in llms.items()}
    speeds = _decode_speeds(llms)
    rows = [
        {
            "num_kv_heads": heads,
            "file_bytes": llm.model.path.stat().st_size,
            "kv_token_bytes": llm.model.decoder.spec.kv_spec("f16").token_bytes,
            "loss": losses[heads],
            "decode_tokens_per_s": speeds[heads],
        }
        for heads, llm in llms.items()
    ]
    if as_json:
        write_report({"kind": "kvik pool-heads", "version": 1, "source": str(source), "path": str(out), "rows": rows})
        return
    write("\n".join(_lines(rows)) + "\n")


def _context(spec: Any) -> int:
    return int(min(spec.context_length, 1024))


def _loss(llm: LLM) -> float:
    """Mean negative logarithm of the probability of the text's tokens, in nats."""
    import statistics

    params = SamplingParams(max_tokens=1, echo=True, logprobs=0, ignore_eos=True)
    token_ids = llm.encode(TEXT)[: llm.model.context - 1]
    (completion,) = llm.generate([token_ids], params)
    return -statistics.fmean(one.logprob for one in completion.prompt_logprobs or [] if one is not None)


def _decode_speeds(llms: dict[int, LLM]) -> dict[int, float]:
    """Tokens a second behind the text, by median; the models take turns."""
    import statistics

    decoded = min(DECODED, min(llm.model.context for llm in llms.values()) // 2)
    params = SamplingParams(max_tokens=decoded, ignore_eos=True)
    found: dict[int, list[float]] = {heads: [] for heads in llms}
    for _ in range(ROUNDS):
        for heads, llm in llms.items():
            (completion,) = llm.generate([llm.encode(TEXT)[: llm.model.context - decoded]], params)
            found[heads].append((completion.stats.num_completion_tokens - 1) / completion.stats.decode_s)
    return {heads: statistics.median(speeds) for heads, speeds in found.items()}


def _lines(rows: list[dict[str, Any]]) -> list[str]:
    table: list[tuple[str, ...]] = [("KV heads", "file", "KV bytes a token", "loss", "decode tok/s")]
    table += [
        (
            f"{row['num_kv_heads']}",
            f"{row['file_bytes'] / 1e6:,.1f} MB",
            f"{row['kv_token_bytes']:,}",
            f"{row['loss']:.3f}",
            rate(row["decode_tokens_per_s"]),
        )
        for row in rows
    ]
    before, after = rows
    return [
        *columns(table),
        "",
        f"Keys and values take {after['kv_token_bytes'] / before['kv_token_bytes']:.0%} of the memory. The loss rose by"
        f" {after['loss'] - before['loss']:.2f} nats a token:",
        "heads that were never trained together now speak with one voice. The paper trains 5 % of the original steps",
        "more to win most of it back; until then this file is for measuring, not for use.",
    ]
