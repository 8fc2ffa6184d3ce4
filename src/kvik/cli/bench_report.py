"""What `kvik bench` shows: one report, as JSON has it, from which the tables, CSV and comparisons are made."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvik import __version__
from kvik.cli.race_report import work_report
from kvik.cli.report import save_text
from kvik.cli.terminal import columns, rate, seconds
from kvik.errors import InvalidInput
from kvik.hub.folder import model_bytes
from kvik.machine import available_threads, processor_name

if TYPE_CHECKING:
    from kvik.engine.llm import LLM
    from kvik.measure.cases import Row
    from kvik.measure.passes import StepProfile
    from kvik.ops.program import MachineLimits

KIND, VERSION = "kvik bench", 1
"""Of the JSON: docs/schemas/bench-1.json."""

MIN_COMPARED_ROUNDS = 4
"""Of each side, so that all of one side's times below all of the other's is no chance: 2 in 70 of equal ones."""

MAX_REPORT_BYTES = 1 << 26

Report = Mapping[str, Any]


def bench_report(
    name: str,
    llms: Mapping[int | None, LLM],
    rows: Sequence[Row],
    limits: Mapping[int, MachineLimits],
    rounds: int,
    profiles: Sequence[StepProfile],
    *,
    is_whole: bool,
) -> dict[str, Any]:
    """Everything that was measured, and where; rows without a single finished round are left out."""
    from kvik import _native

    llm = llms[None]
    config = llm.config
    return {
        "kind": KIND,
        "version": VERSION,
        "machine": {
            "processor": processor_name(),
            "num_threads": available_threads(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": f"{platform.system()} {platform.release()}",
            "kernels": _native.isa,
            "no_amx": _native.amx_obstacle(),
            "compiler": _native.compiler(),
            "python": platform.python_version(),
            "kvik": __version__,
        },
        "limits": [{"threads": threads, **asdict(of)} for threads, of in limits.items()],
        "model": {"name": name, "path": str(llm.model.path), "file_bytes": model_bytes(llm.model.path)},
        "engine": {"activations": config.activations, "context": llm.model.context, "kv_memory": config.kv_memory},
        "rounds": rounds,
        "rows": [row_report(row, llms[row.case.num_kv_heads], limits[row.case.threads]) for row in rows if row.seconds],
        "profiles": [profile_report(one) for one in profiles],
        "is_interrupted": not is_whole,
    }


def row_report(row: Row, llm: LLM, limits: MachineLimits) -> dict[str, Any]:
    """One case: its times, its counted work, and how near that came to the machine's limits."""
    case, work = row.case, row.work
    weights = llm.model.decoder.weights
    is_integer = any(getattr(linear.matrix, "quantized", False) for linear in weights.layers[0].linears)
    for_weights = limits.integer_operations_per_s if is_integer else limits.float_operations_per_s
    arithmetic_s = 2 * work.weight_multiply_adds / for_weights
    arithmetic_s += 2 * work.attention_multiply_adds / limits.float_operations_per_s
    return {
        "name": case.name,
        "kind": case.kind,
        "threads": case.threads,
        "kv_dtype": case.kv_dtype,
        "length": case.length,
        "num_tokens": case.num_tokens,
        "batch": case.batch,
        "num_kv_heads": llm.model.decoder.spec.num_kv_heads,
        "kv_token_bytes": llm.model.decoder.spec.kv_spec(case.kv_dtype).token_bytes,
        "held_weight_bytes": weights.num_bytes,
        "num_cached_tokens": row.num_cached_tokens,
        "seconds": row.seconds,
        "median_s": row.median_s,
        "tokens_per_s": row.tokens_per_s,
        "time_per_token_s": row.median_s / case.num_tokens,
        **work_report(work),
        "share_of_bandwidth": work.read_bytes / row.median_s / limits.bytes_per_s,
        "share_of_arithmetic": arithmetic_s / row.median_s,
    }


def exceeds(row: Row, llm: LLM, limits: MachineLimits) -> bool:
    """Whether a case was faster than these limits allow."""
    report = row_report(row, llm, limits)
    return bool(max(report["share_of_bandwidth"], report["share_of_arithmetic"]) > 1)


def table_lines(report: Report, *, markdown: bool = False, by_heads: bool = False) -> list[str]:
    """The machine, a line for each row, and the limits; `by_heads` where rows differ in their number of KV heads."""
    heading: tuple[str, ...] = ("case", "batch", "KV", "threads", "tok/s", "low … high", "time", "read", "math")
    rows = [heading, *(_cells(row) for row in report["rows"])]
    if by_heads:
        first = [("KV heads", "KV a token", "weights")]
        first += [
            (f"{row['num_kv_heads']}", f"{row['kv_token_bytes']:,} B", f"{row['held_weight_bytes'] / 1e6:,.0f} MB")
            for row in report["rows"]
        ]
        rows = [(*more, *cells) for more, cells in zip(first, rows, strict=True)]
        heading = rows[0]
    machine = report["machine"]
    no_amx = f" (no AMX: {machine['no_amx']})" if machine.get("no_amx") else ""
    title = (
        f"{report['model']['name']}, {report['engine']['activations']} activations, {machine['processor']},"
        f" {machine['kernels']} kernels{no_amx}, kvik {machine['kvik']}, medians of {report['rounds']:,}"
    )
    if markdown:
        table = ["| " + " | ".join(cells) + " |" for cells in rows]
        table.insert(1, "|---" * len(heading) + "|")
    else:
        table = columns(rows)
    lines = [title, "", *table, ""]
    lines += [
        f"{limit['threads']} threads can read {limit['bytes_per_s'] / 1e9:.1f} GB/s and do"
        f" {limit['integer_operations_per_s'] / 1e9:,.0f} GOP/s of int8,"
        f" {limit['float_operations_per_s'] / 1e9:,.0f} GFLOP/s of float32;"
        for limit in report["limits"]
    ]
    lines.append("read, math: the part of its time that a case needs at those. time: to the first token, or a token's.")
    if by_heads:
        lines += [
            "All have random weights of the model's shape and bits: memory and speed are real, what they write is not.",
            "A trained model writes worse with fewer KV heads until trained again: `kvik pool-heads` shows how much.",
        ]
    if any(max(row["share_of_bandwidth"], row["share_of_arithmetic"]) > 1 for row in report["rows"]):
        lines.append("More than 100%: what is read lies in the caches. (The limits were measured again, to be sure.)")
    return lines


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    processed = row["tokens_per_s"] * row["median_s"]
    is_rate = row["kind"] != "seen"  # what is not computed has no rate
    spread = f"{rate(processed / max(row['seconds']))} … {rate(processed / min(row['seconds']))}"
    per_token = row["time_per_token_s"]
    return (
        row["name"],
        f"{row['batch']:,}",
        row["kv_dtype"],
        f"{row['threads']}",
        rate(row["tokens_per_s"]) if is_rate else "-",
        spread if is_rate and len(row["seconds"]) > 1 else "-",
        f"{per_token * 1e3:.1f} ms" if per_token < 0.9995 else seconds(per_token),
        f"{row['share_of_bandwidth']:.0%}",
        f"{row['share_of_arithmetic']:.0%}",
    )


def csv_text(report: Report) -> str:
    """A line for each row under one with the names; times of single rounds are separated by blanks."""
    text = io.StringIO()
    rows = [dict(row) | {"seconds": " ".join(map(repr, row["seconds"]))} for row in report["rows"]]
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def save_report(path: Path, report: Report) -> None:
    """Write it, whole or not at all."""
    save_text(path, json.dumps(report, indent=1, allow_nan=False) + "\n")


def read_report(path: Path) -> Report:
    """A report that `--save` or `--json` wrote. Raises `InvalidInput` for anything else."""
    hint = "give a file that `kvik bench --save FILE` wrote"
    try:
        with path.open("rb") as file:
            content = file.read(MAX_REPORT_BYTES + 1)
    except OSError as error:
        raise InvalidInput(f"--compare is {path}: {error.strerror}", hint=hint) from None
    try:
        if len(content) > MAX_REPORT_BYTES:
            raise ValueError
        report = json.loads(content)
        kind, version = report["kind"], report["version"]
        if kind == KIND and version == VERSION:
            rows = [_checked(row) for row in report["rows"]]
            return {name: dict(report[name]) for name in ("machine", "model", "engine")} | {"rows": rows}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InvalidInput(f"--compare is {path}, which is not a report of kvik bench", hint=hint) from None
    raise InvalidInput(
        f"--compare is {path}, a report of {kind!r:.40}, version {version!r:.20}; this is {KIND!r}, version {VERSION}",
        hint=hint,
    )


def _checked(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a comparison needs of a row. Raises ValueError, KeyError or TypeError where that is not there."""
    times, name = row["seconds"], row["name"]
    if not (isinstance(name, str) and times and all(type(one) is float and one > 0 for one in times)):
        raise ValueError
    hash(_key(row))
    return {**row, "batch": int(row["batch"]), "median_s": statistics.median(times)}


def compare_lines(old: Report, new: Report, name: str) -> list[str]:
    """What moved beyond noise, row by row; what differs in the circumstances comes first."""
    lines = [f"against {name}:"]
    for part in ("machine", "model", "engine"):
        for key, before in old[part].items():
            now = new[part].get(key)
            if now != before:
                lines.append(f"  another {part}: {key} was {before}, is {now}")
    before_by_key = {_key(row): row for row in old["rows"]}
    rows: list[tuple[str, ...]] = [("case", "batch", "KV", "threads", "was", "is", "speed", "")]
    for row in new["rows"]:
        before = before_by_key.pop(_key(row), None)
        where = (row["name"], f"{row['batch']:,}", row["kv_dtype"], f"{row['threads']}")
        if before is None:
            rows.append((*where, "-", f"{row['median_s'] * 1e3:,.1f} ms", "-", "new"))
            continue
        times = (f"{before['median_s'] * 1e3:,.1f} ms", f"{row['median_s'] * 1e3:,.1f} ms")
        speed = f"{before['median_s'] / row['median_s']:.2f}"
        rows.append((*where, *times, speed, moved(before["seconds"], row["seconds"])))
    rows += [
        (row["name"], f"{row['batch']:,}", row["kv_dtype"], f"{row['threads']}", f"{row['median_s'] * 1e3:,.1f} ms",
         "-", "-", "not measured now")
        for row in before_by_key.values()
    ]  # fmt: skip
    return [*lines, *columns(rows)]


def moved(before: Sequence[float], now: Sequence[float]) -> str:
    """Whether all times of one side lie below all of the other's."""
    if min(len(before), len(now)) < MIN_COMPARED_ROUNDS:
        return f"too few rounds to tell, {MIN_COMPARED_ROUNDS} each would"
    if max(now) < min(before):
        return "faster"
    return "slower" if min(now) > max(before) else "within noise"


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    keys = ("kind", "threads", "kv_dtype", "length", "num_tokens", "batch")
    return (*(row[name] for name in keys), row.get("num_kv_heads"))


def profile_lines(profile: StepProfile) -> list[str]:
    """A table: each kind of op, its time and share, what it moved and computed, how near the limit it came."""
    limits, total_s = profile.limits, sum(op.seconds for op in profile.ops)
    rows = [("op", "in → out", "times", "ms", "share", "GB/s", "GOP/s", "of the limit")]
    for op, count in zip(profile.ops, profile.counts, strict=True):
        rows.append(
            (
                op.name,
                " → ".join(f"{width:,}" if width else "·" for width in op.widths),
                f"{count}",
                f"{op.seconds * 1e3:.3f}",
                f"{op.seconds / total_s:.1%}",
                f"{op.bytes / op.seconds / 1e9:.1f}",
                f"{op.operations / op.seconds / 1e9:.0f}",
                f"{op.least_seconds(limits) / op.seconds:.0%}",
            )
        )
    least_s = sum(op.least_seconds(limits) for op in profile.ops)
    rows.append(
        ("all", "", f"{sum(profile.counts)}", f"{total_s * 1e3:.3f}", "100.0%", "", "", f"{least_s / total_s:.0%}")
    )
    lines = [profile.title, *columns(rows, left=2)]
    lines.append(
        f"limits, measured now: {limits.bytes_per_s / 1e9:.1f} GB/s read from an array as large as the weights, "
        f"{limits.integer_operations_per_s / 1e9:,.0f} GOP/s of int8, "
        f"{limits.float_operations_per_s / 1e9:,.0f} GFLOP/s of float32"
    )
    return lines


def profile_report(profile: StepProfile) -> dict[str, Any]:
    """The same for machines."""
    return {
        "title": profile.title,
        "limits": asdict(profile.limits),
        "ops": [
            asdict(op) | {"count": count, "least_seconds": op.least_seconds(profile.limits)}
            for op, count in zip(profile.ops, profile.counts, strict=True)
        ],
    }
