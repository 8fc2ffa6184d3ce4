"""`kvik doctor`: what kvik finds on this machine, and what is slow here and why."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from kvik import __version__
from kvik.cli.terminal import columns, write
from kvik.machine import available_memory_bytes, available_threads, processor_name, user_folder
from kvik.units import amount

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
EXTRAS = {"server": "starlette", "plot": "matplotlib"}
MIN_MEMORY_BYTES = 1_000_000_000
MIN_DISK_BYTES = 1_000_000_000
BUSY_SHARE = 0.5
"""Of the processors, that other work takes: from here on a step waits for it."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What was found."""

    kvik: str
    python: str
    system: str
    compiler: str  # of the native module
    processor: str
    kernels: str  # the instruction set in use
    usable_kernels: tuple[str, ...]
    amx: str  # why it cannot be used; empty where it can
    num_threads: int
    num_processors: int
    load: float  # processes that want a processor, over the last minute
    memory_bytes: int  # available
    huge_pages: str  # always, madvise, never, or unknown
    bytes_per_s: float | None  # read, as `kvik bench` measured it
    folder: str
    folder_is_writable: bool
    disk_free_bytes: int
    default_model: str
    extras: tuple[str, ...]
    keeps_bytecode: bool
    forced_isa: str  # KVIK_ISA


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that makes kvik slow or stops it here."""

    problem: str
    hint: str


def examine() -> Machine:
    """Look at this machine; nothing is measured."""
    from kvik import _native
    from kvik.hub import store
    from kvik.ops.limits import kept_limits

    folder = user_folder()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    limits = kept_limits()
    model = store.models_folder() / store.SMOLLM2.file_name
    return Machine(
        kvik=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver()) or 'unknown C library'}",
        compiler=_native.compiler(),
        processor=processor_name(),
        kernels=_native.isa,
        usable_kernels=tuple(isa for isa in _native.usable_isas() if not isa.endswith("-emulated")),
        amx=_native.amx_obstacle(),
        num_threads=available_threads(),
        num_processors=os.cpu_count() or 1,
        load=os.getloadavg()[0],
        memory_bytes=available_memory_bytes(),
        huge_pages=huge_pages(HUGE_PAGES),
        bytes_per_s=None if limits is None else limits.bytes_per_s,
        folder=str(folder),
        folder_is_writable=os.access(there, os.W_OK),
        disk_free_bytes=shutil.disk_usage(there).free,
        default_model=f"{model} ({amount(model.stat().st_size)})" if model.exists() else "not downloaded",
        extras=tuple(name for name, module in EXTRAS.items() if find_spec(module) is not None),
        keeps_bytecode=not os.environ.get("PYTHONDONTWRITEBYTECODE"),
        forced_isa=os.environ.get("KVIK_ISA", ""),
    )


def huge_pages(path: Path) -> str:
    """The kernel's choice, which stands in brackets; unknown where the system says nothing."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    return text.partition("[")[2].partition("]")[0] or "unknown"


def findings(machine: Machine) -> Iterator[Finding]:
    """What is slow here and why, the worst first."""
    if machine.kernels == "generic" and not machine.forced_isa:
        yield Finding(
            f"{machine.processor} has no AVX2: the plain kernels are more than ten times slower",
            "take a machine with AVX2, as nearly all x86-64 processors since 2015 have",
        )
    best = machine.usable_kernels[0]
    if machine.forced_isa and machine.kernels != best:
        yield Finding(
            f"KVIK_ISA={machine.forced_isa} keeps kvik from the {best} kernels",
            "unset KVIK_ISA; the bits stay the same",
        )
    if machine.memory_bytes < MIN_MEMORY_BYTES:
        yield Finding(
            f"{amount(machine.memory_bytes)} of memory are available: few models fit",
            "`kvik plan MODEL` tells what one needs; end what else runs, or raise the control group's limit",
        )
    if machine.load > BUSY_SHARE * machine.num_processors:
        yield Finding(
            f"other work runs here: a load of {machine.load:.1f} on {machine.num_processors} processors",
            "end it before you measure; threads wait for each other at each op",
        )
    if machine.num_threads < machine.num_processors:
        yield Finding(
            f"this process may use {machine.num_threads} of {machine.num_processors} processors",
            "raise its affinity or its control group's quota, if that is not meant",
        )
    if machine.huge_pages == "never":
        yield Finding(
            "the kernel gives no large pages: weights and long contexts are read more slowly",
            f"as root: echo madvise > {HUGE_PAGES}",
        )
    if not machine.folder_is_writable:
        yield Finding(f"{machine.folder} cannot be written", "set KVIK_HOME to a folder of yours")
    if machine.disk_free_bytes < MIN_DISK_BYTES:
        yield Finding(
            f"{amount(machine.disk_free_bytes)} are free where kvik keeps its files",
            "free some space, `kvik cache gc`, or set KVIK_HOME to a folder on another disk",
        )
    if not machine.keeps_bytecode:
        yield Finding("PYTHONDONTWRITEBYTECODE is set: every start compiles kvik again", "unset it")
    if "server" not in machine.extras:
        yield Finding("`kvik serve` and `kvik run --url` lack their packages", "pip install 'kvik[server]'")


def lines(machine: Machine) -> list[str]:
    """A table of what was found."""
    kernels = f"{machine.kernels} (usable: {', '.join(machine.usable_kernels)})"
    read = "not measured yet: `kvik bench --profile`"
    if machine.bytes_per_s is not None:
        read = f"{machine.bytes_per_s / 1e9:.1f} GB/s"
    rows = [
        ("kvik", f"{machine.kvik}, Python {machine.python}, {machine.compiler}"),
        ("system", machine.system),
        ("processor", machine.processor),
        ("kernels", kernels),
        *([("AMX", machine.amx)] if machine.amx else []),
        ("threads", f"{machine.num_threads} of {machine.num_processors} processors; load {machine.load:.1f}"),
        ("memory", f"{amount(machine.memory_bytes)} available; large pages: {machine.huge_pages}"),
        ("reads", read),
        ("files", f"{machine.folder}; {amount(machine.disk_free_bytes)} free"),
        ("smollm2", machine.default_model),
        ("extras", ", ".join(machine.extras) or "none"),
    ]
    return columns(rows, left=2)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Tell what kvik finds on this machine, and what is slow here and why; nothing is measured."""
    machine = examine()
    found = [*findings(machine)]
    if as_json:
        report: dict[str, Any] = {"machine": asdict(machine), "findings": [asdict(one) for one in found]}
        write(json.dumps(report, indent=2) + "\n")
        return
    told = [line for one in found for line in ("", f"slow or missing: {one.problem}", f"hint: {one.hint}")]
    write("".join(f"{line}\n" for line in [*lines(machine), *(told or ["", "nothing is wrong here"])]))
