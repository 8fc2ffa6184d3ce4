"""The check of the hot loops' machine code finds what it is for, and nothing else."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "disassembly.py"


@pytest.fixture(scope="module")
def disassembly() -> ModuleType:
    spec = importlib.util.spec_from_file_location("disassembly", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def function(name: str, *instructions: str, start: int = 0x1000) -> str:
    lines = [f"{start:016x} <{name}>:", *(f"    {start + 4 * i:x}:\t{text}" for i, text in enumerate(instructions))]
    return "\n".join(lines) + "\n"


DOT = "vpdpbusd (%rdx){1to16},%zmm3,%zmm17"
SPILL = "vmovdqa64 %zmm17,0x40(%rsp)"
FMA = "vfmadd231ps %ymm2,%ymm1,%ymm0"
OTHERS = (
    function("QuantizedTile<1>::run", DOT, "jne    2000 <x>", start=0x2000)
    + function("FloatTile<float>::run", FMA, "jne    3000 <x>", start=0x3000)
    + function("ScaledProducts<1>::run", FMA, "jne    4000 <x>", start=0x4000)
)


def problems(disassembly: ModuleType, *instructions: str) -> list[str]:
    found: list[str] = disassembly.check(OTHERS + function("attend_part", *instructions))[1]
    return found


def test_accepts_a_loop_that_keeps_its_sums_in_registers(disassembly: ModuleType) -> None:
    loop = [DOT, "vmovaps %zmm17,(%rdi)", "vmovaps 0x40(%rsp),%zmm2", "mov    %rax,0x8(%rsp)", "jne    1000 <x>"]
    assert problems(disassembly, *loop) == []


@pytest.mark.parametrize("product", [DOT, "vpmaddubsw %ymm1,%ymm2,%ymm3", "vfmadd213ps (%rax),%ymm1,%ymm2"])
@pytest.mark.parametrize(
    "spill", [SPILL, "vmovaps %ymm3,-0x20(%rsp,%rax,8)", "vmovups %xmm0,(%rsp)", "vextracti128 $0x1,%ymm3,0x10(%rsp)"]
)
def test_refuses_a_spill_inside_a_loop(disassembly: ModuleType, product: str, spill: str) -> None:
    (problem,) = problems(disassembly, "xor    %eax,%eax", product, spill, "jne    1004 <x>")
    assert "attend_part" in problem
    assert f"1008: {spill}" in problem


def test_few_spills_among_many_products_pass(disassembly: ModuleType) -> None:
    assert problems(disassembly, *[DOT] * 32, SPILL, SPILL, "jne    1000 <x>") == []
    assert len(problems(disassembly, *[DOT] * 31, SPILL, SPILL, "jne    1000 <x>")) == 2


def test_a_frame_pointer_is_the_stack_only_where_it_was_set_from_it(disassembly: ModuleType) -> None:
    loop = [DOT, "vmovaps %zmm17,-0x40(%rbp)", "jne    1004 <x>"]
    assert problems(disassembly, "mov    %rdi,%rbp", *loop) == []
    assert len(problems(disassembly, "mov    %rsp,%rbp", *loop)) == 1


def test_outer_loops_may_store(disassembly: ModuleType) -> None:
    assert problems(disassembly, SPILL, DOT, "jne    1004 <x>", SPILL, "jne    1000 <x>") == []


def test_loops_without_products_may_store(disassembly: ModuleType) -> None:
    assert problems(disassembly, DOT, "jne    1000 <x>", SPILL, "jne    1008 <x>") == []


def test_code_out_of_line_belongs_to_the_loop_it_returns_to(disassembly: ModuleType) -> None:
    moved = ["je     1010 <x>", DOT, "jne    1000 <x>", "ret", SPILL, "jmp    1004 <x>"]
    assert len(problems(disassembly, *moved)) == 1
    after_the_loop = [DOT, "jne    1000 <x>", "je     1014 <x>", "vmovaps %zmm1,%zmm2", "ret", SPILL, "jmp    100c <x>"]
    assert problems(disassembly, *after_the_loop) == []


def test_stripped_symbols_are_noticed(disassembly: ModuleType) -> None:
    count, found = disassembly.check(function(".text", DOT, "jne    1000 <x>"))
    assert count == 0
    assert len(found) == len(disassembly.KERNELS)
    assert all("stripped" in problem for problem in found)
