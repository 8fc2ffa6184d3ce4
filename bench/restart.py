"""What the store brings and costs: time to first token after a restart, steps while blocks are written, verifying.

python bench/restart.py [--model smollm2] [--prompt 1500,4000] [--rounds 3] [--parts ask,verify,overhead,slots]

ask       each engine of a round is a process of its own, cold and stored ones in turn; the page cache of the files is
          dropped before stored ones where `--drop` is given (`posix_fadvise`, which needs no rights)
verify    what `kvik cache verify` reads and checks
overhead  in one process, an engine with a store and one without serve the same new prompts, in turn; `--requests`
slots     llama.cpp's server saves a slot, another process restores it and goes on (bench/peers/build_llama_cpp.sh)
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
import urllib.request
from pathlib import Path
from typing import Any

from kvik.cli.terminal import columns, seconds
from kvik.machine import available_threads
from serve_against_peers import listening

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
    token_ids = llm.encode(TEXT * 200)[: int(arguments.prompt)]
    (completion,) = llm.generate(token_ids, SamplingParams(max_tokens=8, ignore_eos=True))
    stats = completion.stats
    llm.close()
    return {
        "load_model_s": loaded_s - started_s,
        "first_token_s": stats.time_to_first_token_s,
        "start_to_first_token_s": loaded_s - arguments.begun_s + stats.time_to_first_token_s,
        "num_stored_tokens": stats.num_stored_tokens,
        "load_blocks_s": stats.load_s,
        "token_ids": completion.token_ids,
    }


def overhead(arguments: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: pairs of equal loads, with a store that takes all and without, in turn."""
    from kvik.config import SamplingParams
    from kvik.engine.llm import LLM
    from kvik.engine.stream import run_all

    llm = LLM(arguments.model, store=arguments.store, threads=arguments.threads, max_running=8)
    engines = {"without": llm.new_engine(store=None), "with": llm.engine}
    tier = llm.engine.tier
    assert tier is not None
    token_ids = llm.encode(TEXT * 200)
    # Of several lengths, so that they do not all end at once.
    lengths = [arguments.answer // 2 + at * 7 % arguments.answer for at in range(arguments.requests)]
    pairs: list[dict[str, float]] = []
    num_behind = []
    for number in range(arguments.rounds + 1):
        # Prompts that no round had before: each is computed, and with a store written while others run.
        starts = range(arguments.requests)
        prompts = [[number + 7, at + 11, *token_ids[at : at + arguments.new_prompt - 2]] for at in starts]
        pair: dict[str, float] = {}
        for name in ("with", "without") if number % 2 else ("without", "with"):
            engine = engines[name]
            asked = [SamplingParams(max_tokens=length, ignore_eos=True) for length in lengths]
            requests = map(engine.new_request, prompts, asked)
            sequences = [engine.new_sequence(request) for request in requests]
            started_s = time.perf_counter()
            run_all(engine, sequences)
            pair[name] = time.perf_counter() - started_s
            num_written = tier.store.stats.num_written
            assert engine.flush_store(60)
            if name == "with":
                num_behind.append(tier.store.stats.num_written - num_written)
        if number:
            pairs.append(pair)
    num_tokens = arguments.requests * arguments.new_prompt + sum(lengths)
    return {
        "pairs": pairs,
        "without_tokens_per_s": num_tokens / statistics.median(pair["without"] for pair in pairs),
        "with_tokens_per_s": num_tokens / statistics.median(pair["with"] for pair in pairs),
        "overhead": statistics.median(pair["with"] / pair["without"] for pair in pairs) - 1,
        "num_written": tier.store.stats.num_written,
        "num_written_behind": sum(num_behind),  # after the last request of a load had ended
        "num_dropped": tier.stats.num_dropped_blocks,
    }


def verify(arguments: argparse.Namespace) -> dict[str, Any]:
    """Bytes a second that `kvik cache verify` reads and checks, from the system's page cache."""
    from kvik.store.inventory import scopes
    from kvik.store.inventory import verify as verify_scope

    root = Path(arguments.store)
    rates, found = [], []
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


def slots(arguments: argparse.Namespace) -> dict[str, Any]:
    """llama.cpp's server: a prompt new, its slot saved; then, in another process, restored and asked again."""
    from kvik.engine.llm import LLM
    from kvik.hub.store import resolve

    program = arguments.peers / "bin" / "llama-server"
    model = str(resolve(arguments.model))
    llm = LLM(model, threads=arguments.threads)
    token_ids = llm.encode(TEXT * 200)[: int(arguments.prompt)]
    del llm
    folder = Path(arguments.store)
    folder.mkdir(exist_ok=True)
    context = len(token_ids) + 128

    def command(port: int) -> list[str]:
        options = {"-t": arguments.threads, "-tb": arguments.threads, "-np": 1, "-c": context, "-fa": "on"}
        flat = [f"{part}" for pair in options.items() for part in pair]
        return [f"{program}", "-m", model, "--port", f"{port}", "--slot-save-path", f"{folder}", "--no-ui", *flat]

    def answer(url: str) -> float:
        body = {"prompt": token_ids, "n_predict": 1, "temperature": 0, "cache_prompt": True, "id_slot": 0}
        return post(f"{url}/completion", body)

    with listening(command) as url:
        cold_s = answer(url)
        save_s = post(f"{url}/slots/0?action=save", {"filename": "slot"})
    started_s = time.perf_counter()
    with listening(command) as url:
        start_s = time.perf_counter() - started_s
        restore_s = post(f"{url}/slots/0?action=restore", {"filename": "slot"})
        first_s = answer(url)
    return {
        "cold_s": cold_s,
        "save_s": save_s,
        "start_s": start_s,
        "restore_s": restore_s,
        "answer_s": first_s,
        "first_token_s": restore_s + first_s,
        "start_to_first_token_s": start_s + restore_s + first_s,
        "file_bytes": (folder / "slot").stat().st_size,
    }


def post(url: str, body: object) -> float:
    """Seconds that a request took."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    started_s = time.perf_counter()
    with urllib.request.urlopen(request, timeout=300) as answer:
        answer.read()
    return time.perf_counter() - started_s


PARTS = {"ask": ask, "verify": verify, "overhead": overhead, "slots": slots}


def run(part: str, arguments: argparse.Namespace, store: Path | None, prompt: str = "0") -> dict[str, Any]:
    """A part in a process of its own."""
    command = [sys.executable, __file__, "--part", part, "--model", arguments.model, "--prompt", prompt]
    command += ["--begun-s", str(time.perf_counter())]  # a clock that processes share
    command += [] if store is None else ["--store", str(store)]
    for name in ("rounds", "threads", "requests", "new_prompt", "answer", "peers"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return result


def asked(arguments: argparse.Namespace, store: Path, prompt: str) -> dict[str, dict[str, Any]]:
    """Medians of processes that begin without the prompt and with it stored."""
    run("ask", arguments, store, prompt)
    rows: dict[str, list[dict[str, Any]]] = {"cold": [], "stored": []}
    for _ in range(arguments.rounds):
        rows["cold"].append(run("ask", arguments, None, prompt))
        if arguments.drop:
            drop_page_cache(store)
        rows["stored"].append(run("ask", arguments, store, prompt))
    texts = {tuple(row["token_ids"]) for each in rows.values() for row in each}
    assert len(texts) == 1, "the same tokens, whatever was stored"
    names = ("first_token_s", "start_to_first_token_s", "load_blocks_s", "num_stored_tokens")
    return {
        kind: {name: statistics.median(row[name] for row in found) for name in names} for kind, found in rows.items()
    }


def table(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """First tokens, of kvik and of llama.cpp."""
    rows: list[tuple[str, ...]] = [("prompt", "", "first token", "of cold", "from the start", "stored tokens")]
    for prompt, kinds in report["ask"].items():
        cold_s = kinds["cold"]["first_token_s"]
        for kind, row in kinds.items():
            times = (seconds(row["first_token_s"]), f"1/{cold_s / row['first_token_s']:.1f}")
            stored = f"{row['num_stored_tokens']:,.0f}"
            rows.append((prompt, kind, *times, seconds(row["start_to_first_token_s"]), stored))
    for prompt, row in report["slots"].items():
        rows.append((prompt, "llama.cpp", seconds(row["cold_s"]), "", seconds(row["start_s"] + row["cold_s"]), ""))
        times = (seconds(row["first_token_s"]), f"1/{row['cold_s'] / row['first_token_s']:.1f}")
        size = f"{row['file_bytes'] / 1e6:,.0f} MB"
        rows.append((prompt, "its slot", *times, seconds(row["start_to_first_token_s"]), size))
    return rows


def main() -> None:
    """Measure all and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompt", default="1500,4000", help="tokens; with commas between them, several")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=available_threads())
    parser.add_argument("--parts", default="ask,verify,overhead,slots")
    parser.add_argument("--requests", type=int, default=16, help="of a load of `overhead`, 8 of which run at once")
    parser.add_argument("--new-prompt", type=int, default=300, help="tokens of each of its prompts")
    parser.add_argument("--answer", type=int, default=64, help="tokens of each of its answers")
    parser.add_argument("--drop", action="store_true")
    parser.add_argument("--peers", type=Path, default=Path("build/peers"), help="where build_llama_cpp.sh built")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--begun-s", type=float)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](arguments)))
        return
    parts, prompts = arguments.parts.split(","), arguments.prompt.split(",")
    report: dict[str, Any] = {"ask": {}, "slots": {}}
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        if "ask" in parts:
            report["ask"] = {prompt: asked(arguments, store, prompt) for prompt in prompts}
            if "verify" in parts:
                report["verify"] = run("verify", arguments, store)
        if "slots" in parts and (arguments.peers / "bin" / "llama-server").exists():
            report["slots"] = {prompt: run("slots", arguments, Path(folder) / prompt, prompt) for prompt in prompts}
        if "overhead" in parts:
            report["overhead"] = run("overhead", arguments, Path(folder) / "other")
    print("\n".join(columns(table(report))))
    if "verify" in report:
        print(f"verify: {report['verify']['bytes_per_s'] / 1e6:,.0f} MB/s")
    if "overhead" in report:
        found = report["overhead"]
        print(
            f"{found['without_tokens_per_s']:,.0f} tokens/s without a store, {found['with_tokens_per_s']:,.0f} with it:"
            f" {100 * found['overhead']:+.1f} % of the time (median of {len(found['pairs'])} pairs);"
            f" {found['num_written']:,} blocks written, {found['num_written_behind']:,} of them behind a load,"
            f" {found['num_dropped']:,} dropped"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
