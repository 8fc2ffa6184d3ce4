"""llama.cpp's side of the comparison: its own benchmark programs, one run for one figure."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from kvik_runs import NotAvailable, first_byte_s

FlashAttention = Literal["on", "off"]
POLL_S = 0.02


class LlamaCppRuns:
    """The programs in `folder`/bin, as bench/peers/build_llama_cpp.sh leaves them."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder = folder
        self.threads = threads

    @property
    def version(self) -> str:
        """What was built, and how."""
        try:
            return ", ".join((self.folder / "version.txt").read_text().splitlines())
        except OSError:
            return "not built"

    def prefill(self, model: Path, num_tokens: int, flash: FlashAttention) -> float:
        """Tokens a second of a prompt."""
        return self._bench(model, flash, "-p", str(num_tokens), "-n", "0")

    def decode(
        self, model: Path, num_tokens: int, flash: FlashAttention, *, depth: int = 0, kv_type: str = "f16"
    ) -> float:
        """Tokens a second after `depth` tokens, without sampling."""
        where = ["-d", str(depth)] if depth else []
        return self._bench(model, flash, "-p", "0", "-n", str(num_tokens), *where, "-ctk", kv_type, "-ctv", kv_type)

    def batched_decode(
        self, model: Path, num_sequences: int, num_prompt_tokens: int, num_tokens: int, flash: FlashAttention
    ) -> float:
        """Tokens a second of all sequences together."""
        return float(self.batched(model, num_sequences, num_prompt_tokens, num_tokens, flash)["speed_tg"])

    def batched(
        self, model: Path, num_sequences: int, num_prompt_tokens: int, num_tokens: int, flash: FlashAttention
    ) -> dict[str, Any]:
        """What llama-batched-bench says of such a run: t_pp and t_tg in seconds, speed_tg in tokens a second."""
        context = num_sequences * (num_prompt_tokens + num_tokens)
        counts = ["-npp", num_prompt_tokens, "-ntg", num_tokens, "-npl", num_sequences, "-c", context]
        command = [self._program("llama-batched-bench"), "-m", str(model), *map(str, counts)]
        command += ["-t", str(self.threads), "-tb", str(self.threads), "-fa", flash, "--output-format", "jsonl"]
        return _last_json(_run(command))

    def peak_memory(self, model: Path, flash: FlashAttention) -> float:
        """Bytes: the peak of a process that computes a context of 8,192 tokens."""
        peak = 0.0

        def watch(child: subprocess.Popen[str]) -> None:
            nonlocal peak
            peak = max(peak, _peak_resident_bytes(child.pid))

        command = [*self._llama_bench(model, flash), "-p", "8192", "-n", "0", "-r", "1", "--no-warmup"]
        _run(command, watch)
        return peak

    def cold_start(self, model: Path, prompt: str) -> float:
        """Seconds from the start of the program to its first token."""
        command = [self._program("llama-completion"), "-m", str(model), "-p", prompt, "-n", "1", "-no-cnv"]
        options = ["--no-display-prompt", "--no-warmup", "-c", "512", "--temp", "0", "-t", str(self.threads)]
        return first_byte_s([*command, *options])

    def make_file(self, source: Path, kind: str) -> Path:
        """The model in another weight format, made once: F16 from the source, the others from F16."""
        path = self.folder / "models" / f"{source.stem}.{kind}.gguf"
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        base = source if kind == "F16" else self.make_file(source, "F16")
        partial = path.with_suffix(".partial")
        _run([self._program("llama-quantize"), "--allow-requantize", str(base), str(partial), kind])
        partial.rename(path)
        return path

    def _bench(self, model: Path, flash: FlashAttention, *options: str) -> float:
        return float(_last_json(_run([*self._llama_bench(model, flash), *options, "-r", "1"]))["avg_ts"])

    def _llama_bench(self, model: Path, flash: FlashAttention) -> list[str]:
        command = [self._program("llama-bench"), "-m", str(model), "-t", str(self.threads)]
        return [*command, "-fa", flash, "-o", "jsonl"]

    def _program(self, name: str) -> str:
        path = self.folder / "bin" / name
        if not path.exists():
            raise NotAvailable(f"{path} is missing; bench/peers/build_llama_cpp.sh makes it")
        return str(path)


def _run(command: Sequence[str], watch: Callable[[subprocess.Popen[str]], None] | None = None) -> str:
    """Stdout of a program; it does not outlive this process's interest in it."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            while watch is not None and child.poll() is None:
                watch(child)
                time.sleep(POLL_S)
            output, errors = child.communicate()
        except BaseException:
            child.kill()
            raise
    if child.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}: {errors[-500:]}")
    return output


def _last_json(output: str) -> dict[str, Any]:
    lines = [line for line in output.splitlines() if line.startswith("{")]
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def _peak_resident_bytes(process_id: int) -> float:
    """VmHWM, which unlike getrusage's figure starts anew with the program."""
    try:
        status = Path(f"/proc/{process_id}/status").read_text(encoding="ascii")
    except OSError:
        return 0.0
    return next((float(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0.0)
