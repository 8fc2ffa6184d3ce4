"""What the front of `kvik serve --replicas` costs: its processor time for a token, and what it adds to the first one.

python bench/front.py [--model MODEL] [--replicas N] [--tokens N] [--streams N]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

BARS = {"processor time for a token, ms": 0.2, "added to the first token, ms": 10.0}

NUM_FIRST_TOKENS = 40


def get(url: str) -> Any:
    """The JSON of a GET."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        return json.load(answer)


def stream(url: str, prompt: str, num_tokens: int) -> tuple[float, int]:
    """Seconds to the first token of a stream, and how many events it has."""
    body = {"prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(), headers)
    begun_s, first_s, num_events = time.perf_counter(), 0.0, 0
    with urllib.request.urlopen(request, timeout=600) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                num_events += 1
                first_s = first_s or time.perf_counter() - begun_s
    return first_s, num_events


def processor_s(pid: int) -> float:
    """That a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(url: str, pid: int, num_streams: int, num_tokens: int) -> dict[str, float]:
    """Milliseconds by the names of the bars."""
    replica = get(url + "/health")["replicas"][0]["url"]
    added = []
    for at in range(NUM_FIRST_TOKENS):
        prompts = [f"Number {2 * at + which} of some short prompts" for which in (0, 1)]
        added.append(stream(url, prompts[0], 1)[0] - stream(replica, prompts[1], 1)[0])
    idle_s, begun_s = processor_s(pid), time.perf_counter()
    time.sleep(3.0)
    idle_share = (processor_s(pid) - idle_s) / (time.perf_counter() - begun_s)
    counts: list[int] = []
    before_s, begun_s = processor_s(pid), time.perf_counter()
    threads = [
        threading.Thread(target=lambda at=at: counts.append(stream(url, f"Story {at}:", num_tokens)[1]))
        for at in range(num_streams)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lasted_s = time.perf_counter() - begun_s
    used_s = processor_s(pid) - before_s - idle_share * lasted_s
    print(
        f"{sum(counts):,} tokens of {num_streams} streams in {lasted_s:.1f} s; idle, the front takes {idle_share:.2%}"
    )
    found = (used_s / sum(counts) * 1000, statistics.median(added) * 1000)
    return dict(zip(BARS, found, strict=True))


def main() -> int:
    """Begin a front, measure it, and say whether it holds its bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=300, help="of each stream")
    options = parser.parse_args()
    command = [sys.executable, "-m", "kvik", "serve", options.model, "--replicas", str(options.replicas), "--port", "0"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, "--no-access-log", "--kv-memory", "1GiB"], stderr=log)
        try:
            while not (found := re.search(rb"serves at (http://\S+)/v1", os.pread(log.fileno(), 1 << 16, 0))):
                if process.poll() is not None:
                    sys.exit(os.pread(log.fileno(), 1 << 16, 0).decode())
                time.sleep(0.1)
            measured = measure(found[1].decode(), process.pid, options.streams, options.tokens)
        finally:
            process.terminate()
            process.wait(60)
    for name, value in measured.items():
        print(f"{name}: {value:.3f} (bar {BARS[name]:g})")
    return int(any(value > BARS[name] for name, value in measured.items()))


if __name__ == "__main__":
    sys.exit(main())
