"""What the store brings and costs: time to first token after a restart, steps while blocks are written, verifying.

python bench/restart.py [--model smollm2] [--prompt 1500] [--rounds 3] [--threads N] [--json FILE]

Each engine of a round is a process of its own, cold and stored ones in turn; the page cache of the files is dropped
before stored ones where `--drop` is given (`posix_fadvise`, which needs no rights).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kvik.cli.terminal import columns, seconds

TEXT = (
    "The committee met again on the third day of the month, and its members, who had read the report in the meantime,"
    " asked what the figures of the second table meant, why those of the first had been left out, and who had paid. "
)


def ask(arguments: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: load, answer one prompt, tell what it took."""
    from kvik.config import SamplingParams
    from kvik.engine.llm import LLM

    started_s = time.perf_counter()
    llm = LLM(arguments.model, store=arguments.store, threads=arguments.threads)
    loaded_s = time.perf_counter()
    token_ids = llm.encode(TEXT * 200)[: arguments.prompt]
    (completion,) = llm.generate(token_ids, SamplingParams(max_tokens=8, ignore_eos=True))
    stats = completion.stats
    llm.close()
    return {
        "load_model_s": loaded_s - started_s,
        "first_token_s": stats.time_to_first_token_s,
        "start_to_first_token_s": loaded_s - started_s + stats.time_to_first_token_s,
        "num_stored_tokens": stats.num_stored_tokens,
        "load_blocks_s": stats.load_s,
        "token_ids": completion.token_ids,
    }


def decode(arguments: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: pairs of equal loads, with a store that takes all and without, in turn."""
    from kvik.config import SamplingParams
    from kvik.engine.llm import LLM

    llm = LLM(arguments.model, store=arguments.store, threads=arguments.threads)
    token_ids = llm.encode(TEXT * 200)
    times: dict[str, list[float]] = {"without": [], "with": []}
    engines = {"without": llm.new_engine(store=None), "with": llm.engine}
    params = SamplingParams(max_tokens=64, ignore_eos=True)
    for number in range(2 * arguments.rounds + 2):
        name = ("with", "without", "without", "with")[number % 4]
        # Prompts that no round had before: each is computed, and with a store written while others decode.
        prompts = [[number + 7, at + 11, *token_ids[at * 40 : at * 40 + 300]] for at in range(8)]
        llm.engine = engines[name]
        started_s = time.perf_counter()
        llm.generate(prompts, params)
        if number > 1:
            times[name].append(time.perf_counter() - started_s)
    tier = engines["with"].tier
    assert tier is not None
    engines["with"].close_store(60)
    medians = {name: statistics.median(each) for name, each in times.items()}
    return {
        "without_s": medians["without"],
        "with_s": medians["with"],
        "overhead": medians["with"] / medians["without"] - 1,
        "num_written": tier.store.stats.num_written,
        "num_dropped": tier.stats.num_dropped_blocks,
    }


def verify(arguments: argparse.Namespace) -> dict[str, Any]:
    """Bytes a second that `kvik cache verify` reads and checks, from the system's page cache."""
    from kvik.store.inventory import scopes
    from kvik.store.inventory import verify as verify_scope

    root = Path(arguments.store)
    rates = []
    for _ in range(arguments.rounds):
        started_s = time.perf_counter()
        found = [verify_scope(root, view.scope, b"") for view in scopes(root)]
        rates.append(sum(each.num_bytes for each in found) / (time.perf_counter() - started_s))
    return {"bytes_per_s": statistics.median(rates), "num_blocks": sum(each.num_blocks for each in found)}


def drop_page_cache(folder: Path) -> None:
    """Have the files' next read come from the disk, as far as the machine below does not keep them."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


PARTS = {"ask": ask, "decode": decode, "verify": verify}


def run(part: str, arguments: argparse.Namespace, store: Path | None) -> dict[str, Any]:
    """A part in a process of its own."""
    command = [sys.executable, __file__, "--part", part, "--model", arguments.model]
    command += ["--prompt", str(arguments.prompt), "--rounds", str(arguments.rounds)]
    command += [] if store is None else ["--store", str(store)]
    command += [] if arguments.threads is None else ["--threads", str(arguments.threads)]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measure all and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompt", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--drop", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--part", choices=PARTS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](arguments)))
        return
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        run("ask", arguments, store)
        rows = {"cold": [], "stored": []}  # type: dict[str, list[dict[str, Any]]]
        for _ in range(arguments.rounds):
            rows["cold"].append(run("ask", arguments, None))
            if arguments.drop:
                drop_page_cache(store)
            rows["stored"].append(run("ask", arguments, store))
        texts = {tuple(row["token_ids"]) for each in rows.values() for row in each}
        assert len(texts) == 1, "the same tokens, whatever was stored"
        names = ("first_token_s", "start_to_first_token_s", "load_blocks_s", "num_stored_tokens")
        for kind, found in rows.items():
            report[kind] = {name: statistics.median(row[name] for row in found) for name in names}
        report["verify"] = run("verify", arguments, store)
        report["decode"] = run("decode", arguments, Path(folder) / "other")
    cold, stored = report["cold"], report["stored"]
    table = [("", "first token", "with loading the model", "stored tokens")]
    for kind in ("cold", "stored"):
        row = report[kind]
        times = (seconds(row["first_token_s"]), seconds(row["start_to_first_token_s"]))
        table.append((kind, *times, f"{row['num_stored_tokens']:,.0f}"))
    print("\n".join(columns(table)))
    print(f"first token: 1/{cold['first_token_s'] / stored['first_token_s']:.1f} of cold")
    print(f"steps while blocks are written: {100 * report['decode']['overhead']:+.1f} %")
    print(f"verify: {report['verify']['bytes_per_s'] / 1e6:,.0f} MB/s")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
