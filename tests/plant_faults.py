"""Plant one fault at a time in a copy of the tree, and say which tier of the tests finds it first.

    python tests/plant_faults.py [--only WORD ...] [--tiers tiny,test,...]

A fault is a text of one file and what stands there instead; tests/unit/test_planted_faults.py sees that each text is
still there. Native faults are compiled, with plain flags for the tests and with sanitizers for the last two tiers. The
copy and what was compiled stay in build/faults, so that the next run is shorter.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TREE = ROOT / "build" / "faults" / "tree"
COMPILED = ROOT / "build" / "faults" / "cmake"
IMPORTS = ROOT / "build" / "faults" / "imports"
TIMEOUT_S = 3600

# An editable install of kvik would come before PYTHONPATH.
SITECUSTOMIZE = """import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__name__.startswith("ScikitBuild")]
"""


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong, and where."""

    name: str
    path: str
    old: str
    new: str

    @property
    def is_native(self) -> bool:
        return self.path.startswith("native/")

    def count(self, root: Path) -> int:
        """How often its text stands in the file: once, or the fault cannot be planted."""
        return (root / self.path).read_text(encoding="utf-8").count(self.old)


FAULTS = (
    Fault(
        "the rows behind a draft have the mask of the row before it",
        "src/kvik/engine/sampler.py",
        "    masks += [masks[-1]] * (num_rows - len(masks))",
        "    masks = [masks[0]] * num_rows",
    ),
    Fault(
        "a grammar that allows only what may not come yet leaves no token",
        "src/kvik/engine/sampler.py",
        "    if mask is not None:\n        mask = without(",
        "    if mask is not None and not forbidden_ids:\n        mask = without(",
    ),
    Fault(
        "a shared block is written without a copy",
        "src/kvik/cache/manager.py",
        "return self.pool.ref_count(block_id) == 1 and not self.pool.is_named(block_id)",
        "return not self.pool.is_named(block_id)",
    ),
    Fault(
        "a block of the tree is written in place, and stays in the tree",
        "src/kvik/cache/manager.py",
        "return self.pool.ref_count(block_id) == 1 and not self.pool.is_named(block_id)",
        "return self.pool.ref_count(block_id) == 1",
    ),
    Fault(
        "a release is forgotten: the source of a copy stays held",
        "src/kvik/cache/manager.py",
        "        for held in self._being_copied:\n            self.release(held)\n        self._being_copied.clear()",
        "        self._being_copied.clear()",
    ),
    Fault(
        "a block that is held again stays among the reusable: it can be evicted",
        "src/kvik/cache/block_pool.py",
        "                del self._reusable[block_id]\n            self._ref_counts[block_id] += 1",
        "            self._ref_counts[block_id] += 1",
    ),
    Fault(
        "the beginning of a sequence is evicted before its end",
        "src/kvik/cache/block_pool.py",
        "        for block_id in reversed(block_ids):",
        "        for block_id in block_ids:",
    ),
    Fault(
        "blocks are shared across salts",
        "src/kvik/cache/radix.py",
        "    format: str\n    salt: str | None = None",
        "    format: str\n    salt: str | None = __import__('dataclasses').field(default=None, compare=False)",
    ),
    Fault(
        "a block that agrees in part is matched as a whole",
        "src/kvik/cache/radix.py",
        "common_bytes(tokens, at, child.tokens) // key_bytes",
        "common_bytes(tokens, at, child.tokens) // -key_bytes * -1",
    ),
    Fault(
        "a window's block is given back one token too early",
        "src/kvik/cache/spec.py",
        "return max(0, num_tokens + 1 - self.window)",
        "return max(0, num_tokens + 2 - self.window)",
    ),
    Fault(
        "the first block that codes stand beside goes with its segment",
        "src/kvik/cache/twins.py",
        "num_first = min(count, max(0, self.spec.num_first_blocks - table.first))",
        "num_first = 0",
    ),
    Fault(
        "the twin of an evicted block is still found",
        "src/kvik/cache/manager.py",
        "        self.twins.forget(block_id)\n        self.pool.forget(block_id)",
        "        self.pool.forget(block_id)",
    ),
    Fault(
        "a count in a GGUF file is believed",
        "src/kvik/files/gguf.py",
        "        self.check_count(count, item_bytes, MAX_NUM_ARRAY_ITEMS - self.num_array_items,",
        "        (lambda *checked: None)(count, item_bytes, MAX_NUM_ARRAY_ITEMS - self.num_array_items,",
    ),
    Fault(
        "the planner forgets that the engine allocates whole superblocks",
        "src/kvik/planner/memory.py",
        "return whole_superblocks(shared + users * (-(-tokens // BLOCK_SIZE) - shared))",
        "return shared + users * (-(-tokens // BLOCK_SIZE) - shared)",
    ),
    Fault(
        "a copied block comes from its neighbour's slots",
        "native/kv_arrays.h",
        "tile(index, source, offset, bytes)",
        "tile(index, source ^ 1, offset, bytes)",
    ),
    Fault(
        "a stored block whose bytes have changed is used",
        "src/kvik/store/entry.py",
        "    if not hmac.compare_digest(tag_of(key, fields, view[HEADER_BYTES:]), tag):",
        "    if tag_of(key, fields, view[HEADER_BYTES:])[:0] != tag[:0]:",
    ),
    Fault(
        "a block that was evicted meanwhile is stored under its old name",
        "src/kvik/engine/store_tier.py",
        "cache.places_of(block_id) if cache.tree.digest_of(block_id) == digest else None",
        "cache.places_of(block_id) if cache.tree.digest_of(block_id) is not None else None",
    ),
    Fault(
        "a token sees the one after it",
        "native/attention_work.inl",
        "task.whole ? kSegment : args.kv_bounds[task.first_token] - start;",
        "task.whole ? kSegment : args.kv_bounds[task.first_token] + 1 - start;",
    ),
    Fault(
        "threads that share a tile's segments are not ordered",
        "native/attend.cpp",
        "if (unfinished.fetch_sub(1, std::memory_order_acq_rel) == 1) merge_slots(thread, tile);",
        "if (unfinished.fetch_sub(1, std::memory_order_relaxed) == 1) merge_slots(thread, tile);",
    ),
    Fault(
        "rows past a matrix's last one are read",
        "native/packing.cpp",
        "blocks[r] = r < count ? source + (first + r) * source_row + at : kZeros;",
        "blocks[r] = source + (first + r) * source_row + at;",
    ),
    Fault(
        "of equally likely tokens another is taken than the first",
        "native/sample.inl",
        "    if (value > best) best = value, first = i;",
        "    if (value >= best) best = value, first = i;",
    ),
    Fault(
        "what a step that failed has half written is gone on from",
        "src/kvik/engine/scheduler.py",
        "            self._drop_blocks(item.sequence)\n            for each in",
        "            for each in",
    ),
    Fault(
        "a preempted request's own work counts as found in the prefix cache",
        "src/kvik/engine/scheduler.py",
        "        if sequence.costs.num_preemptions:\n            return  # what it finds is its own work\n",
        "",
    ),
    Fault(
        "the memory of hidden states is reused before they are read",
        "src/kvik/ops/program.py",
        "self._program.finish(self._ids[self._output.id], kept)",
        "self._program.finish(self._ids[self._output.id])",
    ),
    Fault(
        "a preempted embedding adds what it computes again once more",
        "src/kvik/engine/pooling.py",
        "for row in rows[self._num_tokens - first :]:",
        "for row in rows:",
    ),
)


@dataclass(frozen=True, slots=True)
class Tier:
    """How a tier is run, of pytest or of the sanitizers."""

    name: str
    variables: dict[str, str]
    arguments: tuple[str, ...]
    native_only: bool = False


PYTEST = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--no-header", "--tb=line")
TIERS = (
    Tier("tiny", {"KVIK_TIER": "tiny"}, (*PYTEST, "-m", "tiny")),
    Tier("test", {"KVIK_TIER": "test"}, (*PYTEST, "-n", "2", "-m", "not full and not nightly")),
    Tier("rest", {"KVIK_TIER": "all"}, (*PYTEST, "-n", "2", "-m", "full or hypothesis")),
    Tier("address", {}, ("tests/sanitize.sh", "address"), native_only=True),
    Tier("thread", {}, ("tests/sanitize.sh", "thread"), native_only=True),
)


def copy_tree() -> None:
    """What git knows or would take, where it differs: unchanged files keep their time, and are not compiled again."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    for name in names:
        content, target = (ROOT / name).read_bytes(), TREE / name
        if not target.exists() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            shutil.copymode(ROOT / name, target)
    IMPORTS.mkdir(parents=True, exist_ok=True)
    (IMPORTS / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="ascii")


def place_module(*, compiled: bool) -> None:
    """The native module, as it is installed or from the copy's sources, where the copy's `kvik` finds it."""
    if compiled:
        # Optimised less, and without AVX-512, it is compiled in a third of the time; the bits are the same.
        configure = [
            "cmake",
            "-S",
            str(TREE),
            "-B",
            str(COMPILED),
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        flags = ["-DKVIK_AVX512=OFF", "-DCMAKE_CXX_FLAGS_RELEASE=-O1"]
        for command in ([*configure, *flags], ["ninja", "-C", str(COMPILED)]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stdout[-3000:] + done.stderr[-3000:])
        (module,) = COMPILED.glob("_native*.so")
    else:
        from kvik import _native

        module = Path(_native.__file__)
    for old in (TREE / "src" / "kvik").glob("_native*.so"):
        old.unlink()
    shutil.copy(module, TREE / "src" / "kvik" / module.name)


def run(tier: Tier, log: Path) -> str | None:
    """The first test that fails, or `None`."""
    is_script = tier.arguments[0].endswith(".sh")
    path = os.pathsep.join([str(IMPORTS), str(TREE / "src")])
    variables = {"PYTHON": sys.executable} if is_script else {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    command = ["bash" if is_script else sys.executable, *tier.arguments]
    with log.open("w", encoding="utf-8") as output:
        done = subprocess.run(
            command,
            cwd=TREE,
            env=os.environ | variables | tier.variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_S,
            check=False,
        )
    return None if done.returncode == 0 else first_failure(log.read_text(encoding="utf-8", errors="replace"))


def first_failure(output: str) -> str:
    """The test that failed, or in which a sanitizer ended the process, and what the sanitizer said."""
    if failed := re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE):
        return failed[1].removeprefix("tests/")
    where = re.search(r'File "\S*/tests/(\S+)", line \d+ in (test_\w+)', output)
    said = re.search(r"SUMMARY: (\w+: \S+)", output)
    named = f"{where[1]}::{where[2]}" if where else "a test that did not end"
    return f"{named} ({said[1]})" if said else named


def find(fault: Fault, tiers: list[Tier]) -> str:
    """Plant it, run the tiers until one fails, and take it out again."""
    path = TREE / fault.path
    original = path.read_text(encoding="utf-8")
    path.write_text(original.replace(fault.old, fault.new), encoding="utf-8")
    try:
        place_module(compiled=fault.is_native)
        for tier in tiers:
            if tier.native_only and not fault.is_native:
                continue
            started_s = time.monotonic()
            failure = run(tier, ROOT / "build" / "faults" / f"{tier.name}.log")
            if failure:
                return f"{tier.name} | `{failure}` | {time.monotonic() - started_s:.0f}"
        return "**none** | |"
    finally:
        path.write_text(original, encoding="utf-8")


def main() -> int:
    """Print a row of a Markdown table for each fault; exit status 1 where one was not found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="faults whose name or file has one of these words")
    parser.add_argument("--tiers", default=",".join(tier.name for tier in TIERS))
    args = parser.parse_args()
    stale = [fault for fault in FAULTS if fault.count(ROOT) != 1]
    for fault in stale:
        say(f"{fault.name}: its text stands {fault.count(ROOT)} times in {fault.path}, not once; write it anew")
    if stale:
        return 2
    chosen = [f for f in FAULTS if not args.only or any(word in f.name or word in f.path for word in args.only)]
    tiers = [tier for tier in TIERS if tier.name in args.tiers.split(",")]
    copy_tree()
    say("| fault | file | found by | first failing test | s |\n|---|---|---|---|---|")
    num_missed = 0
    for fault in chosen:
        found = find(fault, tiers)
        num_missed += "**none**" in found
        say(f"| {fault.name} | {fault.path} | {found} |")
    return 1 if num_missed else 0


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
