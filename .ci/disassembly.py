"""Fail if an innermost loop of a hot kernel stores a vector register to the stack.

The matrix and attention kernels are written so that their sums stay in registers. A compiler may undo that without a
word: gcc's tree-reassoc once postponed the integer sums until 64 of them were alive, spilled them in every loop and
halved the speed of prefill, while all tests passed. So this looks at the machine code. A hot loop is a loop with
products (vpmaddubsw, vpdpbusd, vfmadd...) and no other loop inside; a spill is a move of a vector register to memory
addressed by the stack pointer, or by a frame pointer set from it. One spill for every sixteen products is let pass:
that is what the largest AVX2 tile of 4-bit weights costs, and every tile without spills was slower.

The functions are known by their symbols, which must not be stripped: CMakeLists.txt builds with NOSTRIP (installing a
wheel strips).

    python .ci/disassembly.py build/*/_native*.so
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PRODUCT = re.compile(r"v?pmaddubsw|v?pdpbusd|v?pmaddwd|vfn?m(add|sub)\d+p[sd]")
FUNCTION = re.compile(r"^[0-9a-f]+ <(?P<name>.*)>:$")
INSTRUCTION = re.compile(r"^\s*(?P<address>[0-9a-f]+):\s+(?P<text>\S.*?)\s*$")
JUMP = re.compile(r"^(?:bnd |notrack )?j\w+\s+(?P<target>[0-9a-f]+)\b")
STORE = re.compile(r"^v?(?:mov|extract|pextr)\S*\s+.*%[xyz]mm\d+,[^,(]*\(%(?P<base>r[sb]p)\b[^)]*\)(?:\{.*\})?$")
UNCONDITIONAL = re.compile(r"^(?:bnd |notrack )?(?:jmp|ret|ud2|hlt)")
FRAME_POINTER = re.compile(r"^mov\s+%rsp,%rbp$")
PRODUCTS_PER_SPILL = 16
# One token's products with quantised weights (multiply_one_token) wait for memory, so that a spill costs them nothing.
# A kernel of each kind must be among the hot loops, else the check has lost sight of what it guards.
KERNELS = ("QuantizedTile", "ScaledProducts", "FloatTile", "attend_part")


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly."""

    address: int
    text: str


@dataclass(frozen=True)
class Function:
    """A symbol and the instructions behind it."""

    name: str
    instructions: list[Instruction]


@dataclass(frozen=True)
class Spill:
    """A vector register stored to the stack inside a hot loop."""

    function: str
    instruction: Instruction

    def __str__(self) -> str:
        return f"{self.function}\n    {self.instruction.address:x}: {self.instruction.text}"


def functions(disassembly: Iterable[str]) -> Iterator[Function]:
    """The functions of what `objdump -d --no-show-raw-insn` prints."""
    current: Function | None = None
    for line in disassembly:
        if match := FUNCTION.match(line):
            if current:
                yield current
            current = Function(match["name"], [])
        elif current and (match := INSTRUCTION.match(line)):
            current.instructions.append(Instruction(int(match["address"], 16), match["text"]))
    if current:
        yield current


Block = list[Instruction]  # straight code, named by the address of its first instruction


def blocks_and_edges(function: Function) -> tuple[dict[int, Block], dict[int, set[int]]]:
    """The control flow inside a function: blocks, and for each the blocks that may come next."""
    targets = {i.address: int(match["target"], 16) for i in function.instructions if (match := JUMP.match(i.text))}
    blocks: dict[int, Block] = {}
    edges: dict[int, set[int]] = {}
    inside = {instruction.address for instruction in function.instructions}
    leaders = set(targets.values()) & inside
    start, falls_through = -1, False
    for index, instruction in enumerate(function.instructions):
        ended = index == 0 or function.instructions[index - 1].address in targets or not falls_through
        if ended or instruction.address in leaders:
            if falls_through:
                edges[start].add(instruction.address)
            start = instruction.address
            blocks[start], edges[start] = [], set()
        blocks[start].append(instruction)
        falls_through = not UNCONDITIONAL.match(instruction.text)
        if targets.get(instruction.address) in leaders:
            edges[start].add(targets[instruction.address])
    return blocks, edges


def cycles(nodes: set[int], edges: dict[int, set[int]]) -> list[set[int]]:
    """The strongly connected parts that contain a cycle (Tarjan, 1972), without recursion."""
    order: dict[int, int] = {}
    lowest: dict[int, int] = {}
    path: list[int] = []
    found = []
    for root in sorted(nodes):
        work = [(root, iter(sorted(edges[root] & nodes)))] if root not in order else []
        while work:
            node, successors = work[-1]
            if node not in order:
                order[node] = lowest[node] = len(order)
                path.append(node)
            following = next(successors, None)
            if following is None:
                work.pop()
                if work:
                    lowest[work[-1][0]] = min(lowest[work[-1][0]], lowest[node])
                if lowest[node] == order[node]:
                    part = set(path[path.index(node) :])
                    del path[path.index(node) :]
                    if len(part) > 1 or node in edges[node]:
                        found.append(part)
            elif following not in order:
                work.append((following, iter(sorted(edges[following] & nodes))))
            elif following in path:
                lowest[node] = min(lowest[node], order[following])
    return found


def innermost_loops(function: Function) -> list[Block]:
    """The instructions of each loop that contains no other.

    Code that the compiler moved out of line jumps back too, so loops are the cycles of the control flow: a cycle
    without the blocks through which it is entered has the loops inside it as its cycles.
    """
    blocks, edges = blocks_and_edges(function)

    def innermost(nodes: set[int]) -> Iterator[set[int]]:
        for cycle in cycles(nodes, edges):
            entered = {b for a in edges if a not in cycle for b in edges[a] & cycle} or {min(cycle)}
            inside = list(innermost(cycle - entered))
            yield from inside or [cycle]

    return [[i for start in sorted(loop) for i in blocks[start]] for loop in innermost(set(blocks))]


def hot_loops(function: Function) -> list[Block]:
    """Innermost loops of a kernel that multiply."""
    if not any(kernel in function.name for kernel in KERNELS):
        return []
    return [loop for loop in innermost_loops(function) if any(PRODUCT.match(i.text) for i in loop)]


def spills(function: Function) -> list[Spill]:
    """What is wrong with a function."""
    framed = any(FRAME_POINTER.match(i.text) for i in function.instructions)
    found = []
    for loop in hot_loops(function):
        stores = [(i, match["base"]) for i in loop if (match := STORE.match(i.text))]
        spilled = [Spill(function.name, i) for i, base in stores if base == "rsp" or framed]
        if len(spilled) * PRODUCTS_PER_SPILL > sum(bool(PRODUCT.match(i.text)) for i in loop):
            found += spilled
    return found


def disassemble(path: Path) -> str:
    """All code of a binary."""
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def check(disassembly: str) -> tuple[int, list[str]]:
    """The number of hot loops, and what is wrong with them."""
    everything = list(functions(disassembly.splitlines()))
    hot = [(function.name, len(hot_loops(function))) for function in everything]
    problems = [str(spill) for function in everything for spill in spills(function)]
    for kernel in KERNELS:
        if not any(kernel in name and loops for name, loops in hot):
            problems.append(f"no hot loop in any function named {kernel}: were the symbols stripped?")
    return sum(loops for _, loops in hot), problems


def main() -> int:
    """Print what is wrong; the exit status says whether anything is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binaries", nargs="+", type=Path, help="built _native*.so, or object files of the kernels")
    arguments = parser.parse_args()
    loops, problems = check("\n".join(disassemble(path) for path in arguments.binaries))
    for problem in problems:
        print(problem)  # noqa: T201
    print(f"{loops} hot loops, {len(problems)} problems")  # noqa: T201
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
