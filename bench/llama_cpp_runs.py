"""llama.cpp's side of the comparison: its own benchmark programs, one run for one figure."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from kvik_runs import NotAvailable, first_byte_s

FlashAttention = Literal["on", "off"]
POLL_S = 0.02
TENSOR = re.compile(r"^\[ *\d+/ *\d+\] (\S+) +- \[.*\], type = +(\w+), size = [^(\n]*(?:\((\w+)\))?$", re.MULTILINE)
"""A line of llama-quantize's dry run: a tensor's name, its weight format, and the one that it gets, if another."""


class Programs:
    """Programs in `folder`/bin, as a script in bench/peers leaves them; they use so many threads."""

    script: ClassVar[str]
    version_file: ClassVar[str]

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder = folder
        self.threads = threads

    @property
    def version(self) -> str:
        """What was built, and how."""
        try:
            return ", ".join((self.folder / self.version_file).read_text().splitlines())
        except OSError:
            return "not built"

    def program(self, name: str) -> str:
        """The path of one of them. Raises `NotAvailable`."""
        path = self.folder / "bin" / name
        if not path.exists():
            raise NotAvailable(f"{path} is missing; bench/peers/{self.script} makes it")
        return str(path)


class LlamaCppRuns(Programs):
    """llama.cpp's."""

    script = "build_llama_cpp.sh"
    version_file = "version.txt"

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
        command = [self.program("llama-batched-bench"), "-m", str(model), *map(str, counts)]
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
        command = [self.program("llama-completion"), "-m", str(model), "-p", prompt, "-n", "1", "-no-cnv"]
        options = ["--no-display-prompt", "--no-warmup", "-c", "512", "--temp", "0", "-t", str(self.threads)]
        return first_byte_s([*command, *options])

    def make_file(self, source: Path, kind: str) -> Path:
        """The model in another weight format, made once: F16 from the source, the others from F16."""
        path = self.folder / "models" / f"{source.stem}.{kind}.gguf"
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.quantize(source if kind == "F16" else self.make_file(source, "F16"), path, kind)
        return path

    def quantize(self, source: Path, path: Path, kind: str) -> None:
        """Write the model to `path` in a weight format, whole or not at all."""
        partial = path.with_suffix(".partial")
        command = [self.program("llama-quantize"), "--allow-requantize", str(source), str(partial), kind]
        _run([*command, str(self.threads)])
        partial.rename(path)

    def tensor_types(self, source: Path, kind: str) -> dict[str, str]:
        """The weight formats that the tensors have in a file of such a kind, which is not written."""
        said = _run([self.program("llama-quantize"), "--dry-run", str(source), kind], stderr=subprocess.STDOUT)
        return {found[1]: found[3] or found[2] for found in TENSOR.finditer(said)}

    def _bench(self, model: Path, flash: FlashAttention, *options: str) -> float:
        return float(_last_json(_run([*self._llama_bench(model, flash), *options, "-r", "1"]))["avg_ts"])

    def _llama_bench(self, model: Path, flash: FlashAttention) -> list[str]:
        command = [self.program("llama-bench"), "-m", str(model), "-t", str(self.threads)]
        return [*command, "-fa", flash, "-o", "jsonl"]


class IkLlamaCppRuns(Programs):
    """Those of ik_llama.cpp.

    `options` are those of its programs, by their names: rtr repacks weights as they are loaded, mqkv joins three
    projections, thp asks for huge pages. Gate and up in one, and graphs that are used again, it has unasked.
    """

    script = "build_ik_llama_cpp.sh"
    version_file = "ik_version.txt"

    def prefill(self, model: Path, num_tokens: int, flash: FlashAttention, options: Sequence[str] = ()) -> float:
        """Tokens a second of a prompt."""
        return self._bench(model, flash, options, "-p", str(num_tokens), "-n", "0")

    def decode(
        self,
        model: Path,
        num_tokens: int,
        flash: FlashAttention,
        options: Sequence[str] = (),
        *,
        depth: int = 0,
        kv_type: str = "f16",
    ) -> float:
        """Tokens a second after `depth` tokens, without sampling."""
        counts = ["-p", "0", "-n", "0", "-gp", f"{depth},{num_tokens}"] if depth else ["-p", "0", "-n", str(num_tokens)]
        return self._bench(model, flash, options, *counts, "-ctk", kv_type, "-ctv", kv_type)

    def batched_decode(
        self,
        model: Path,
        num_sequences: int,
        num_prompt_tokens: int,
        num_tokens: int,
        flash: FlashAttention,
        options: Sequence[str] = (),
    ) -> float:
        """Tokens a second of all sequences together."""
        context = num_sequences * (num_prompt_tokens + num_tokens)
        counts = ["-npp", num_prompt_tokens, "-ntg", num_tokens, "-npl", num_sequences, "-c", context]
        command = [self.program("ik-llama-batched-bench"), "-m", str(model), *map(str, counts)]
        threads = ["-t", str(self.threads), "-tb", str(self.threads)]
        command += [*threads, "-fa", flash, *(f"-{option}" for option in options)]
        # It writes a log into the folder where it runs, and its table to stderr.
        said = _run(command, folder=self.folder, stderr=subprocess.STDOUT)
        rows = [line.split("|") for line in said.splitlines() if line.startswith("|")]
        return float(rows[-1][8])  # PP, TG, B, N_KV, T_PP, S_PP, T_TG, S_TG

    def _bench(self, model: Path, flash: FlashAttention, options: Sequence[str], *what: str) -> float:
        command = [self.program("ik-llama-bench"), "-m", str(model), "-t", str(self.threads)]
        switches = [text for option in options for text in (f"-{option}", "1")]
        found = json.loads(_run([*command, "-fa", str(int(flash == "on")), *switches, *what, "-r", "1", "-o", "json"]))
        return float(found[-1]["avg_ts"])


def _run(
    command: Sequence[str],
    watch: Callable[[subprocess.Popen[str]], None] | None = None,
    *,
    folder: Path | None = None,
    stderr: int = subprocess.PIPE,
) -> str:
    """Stdout of a program that runs in `folder`; it does not outlive this process's interest in it."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=folder) as child:
        try:
            while watch is not None and child.poll() is None:
                watch(child)
                time.sleep(POLL_S)
            output, errors = child.communicate()
        except BaseException:
            child.kill()
            raise
    if child.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}: {(errors or output)[-500:]}")
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
