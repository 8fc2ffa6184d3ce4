"""What the server costs a streamed token: its CPU time over real sockets, less the model's part, with many clients.

python bench/serve_streams.py [--clients 300] [--tokens 100] [--rounds 5] [--speed 6000]

The server is a process of its own with the stand-in model of bench/async_streams.py, so what is measured is scheduling,
sampling, text, metrics, the way of each piece to its stream, its JSON and the write to its socket, and each request's
own cost over its tokens. The model waits so long that all streams together get `--speed` tokens a second, one write
each. The clients' time is not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from async_streams import PROMPT, Letters, make_engine
from kvik.engine.batch import ScheduledBatch
from kvik.engine.runner import StepOutput
from kvik.server.listening import bind
from kvik.server.run import serve
from kvik.server.served import Models, ServedModel
from kvik.server.settings import ServerConfig
from kvik.server.state import ServerState

CLOCK_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Codes(Letters):
    """Letters that are only ever given as token ids."""

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Nobody asks for this."""
        raise AssertionError


def serve_stand_in(num_streams: int, tokens_per_s: int) -> None:
    """The server: it writes its port, and the model's seconds of CPU when it ends."""
    engine: Any = make_engine(num_streams)
    engine.model.tokenizer = Codes()
    run_s, run = 0.0, engine.runner.run

    def paced(batch: ScheduledBatch) -> StepOutput:
        nonlocal run_s
        started_s = time.thread_time()
        time.sleep(len(batch.items) / tokens_per_s)
        output: StepOutput = run(batch)
        run_s += time.thread_time() - started_s
        return output

    engine.runner.run = paced
    model = SimpleNamespace(
        tokenizer=engine.model.tokenizer,
        path=engine.model.path,
        context=engine.model.context,
        chat_template=None,
        decoder=engine.decoder,
    )
    llm: Any = SimpleNamespace(engine=engine, model=model, config=engine.config, is_chat_model=False)
    config = ServerConfig(port=0, access_log=False)
    listening = bind(config.host, config.port)
    state = ServerState(config, Models([ServedModel("stand-in", llm)]))
    serve(state, listening, on_ready=lambda: print(listening.getsockname()[1], flush=True))
    print(run_s, flush=True)


async def read_stream(port: int, index: int, num_tokens: int) -> int:
    """One client: how many events with text it got."""
    body = {"prompt": [index % 7] * PROMPT, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    data = json.dumps(body | {"cache_salt": f"{index}", "temperature": 0}).encode()
    lines = ("POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Connection: close")
    head = "\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + data)
    answer = await reader.read()
    while more := await reader.read(1 << 16):
        answer += more
    writer.close()
    assert answer.startswith(b"HTTP/1.1 200 "), answer[:200]
    return answer.count(b'"text":"b"')


def cpu_s(folder: str) -> float:
    """Of a process, or of one of its threads, so far."""
    fields = Path(f"/proc/{folder}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * CLOCK_TICK_S


def run_round(num_clients: int, num_tokens: int, tokens_per_s: int) -> tuple[float, float, float]:
    """Microseconds of CPU a token, all but the model's and those of the event loop's thread; and tokens a second."""
    command = [sys.executable, __file__, "--serve", "--clients", str(num_clients), "--speed", str(tokens_per_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        process = f"{server.pid}"
        loop = f"{server.pid}/task/{server.pid}"
        before_s, loop_before_s, started_s = cpu_s(process), cpu_s(loop), time.perf_counter()

        async def all_clients() -> list[int]:
            return await asyncio.gather(*(read_stream(port, index, num_tokens) for index in range(num_clients)))

        counts = asyncio.run(all_clients())
        elapsed_s = time.perf_counter() - started_s
        used_s, loop_s = cpu_s(process) - before_s, cpu_s(loop) - loop_before_s
        server.terminate()
        model_s = float(server.stdout.readline())
    assert set(counts) == {num_tokens}, set(counts)
    count = num_clients * num_tokens
    return 1e6 * (used_s - model_s) / count, 1e6 * loop_s / count, count / elapsed_s


def main() -> None:
    """Print the median."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, default in (("clients", 300), ("tokens", 100), ("rounds", 5), ("speed", 6000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve_stand_in(args.clients, args.speed)
        return
    rounds = [run_round(args.clients, args.tokens, args.speed) for _ in range(args.rounds)]
    costs, loop_costs, speeds = zip(*rounds, strict=True)
    loop = statistics.median(loop_costs)
    print(
        f"{args.clients} clients, {args.tokens} tokens each: {loop:.1f} µs of CPU a token in the event loop's thread"
        f" ({min(loop_costs):.1f} … {max(loop_costs):.1f}), {statistics.median(costs):.1f} with the engine's"
        f" ({min(costs):.1f} … {max(costs):.1f}); {statistics.median(speeds):,.0f} tokens/s came;"
        f" streams of 6,000 tokens/s take {loop * 0.6:.0f} % of a core,"
        f" {statistics.median(costs) * 0.6:.0f} with the engine"
    )


if __name__ == "__main__":
    main()
