"""Innermost loops of a compiled object: their instructions, and the functions they come from.

An object is compiled with line tables (``-g1``, which changes no instruction), read by ``objdump``,
and each loop that multiplies and adds is traced by ``addr2line`` to the function template it was
written in, however deep that was inlined.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CXX = shlex.split(os.environ.get("CXX", "g++"))
INSTRUCTION = re.compile(r"^ +([0-9a-f]+):\s+(\S+)\s*([^#<]*)(?:[#<].*)?$")
FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
# A template of ours in the name of a function: its name, and its arguments behind the SIMD type.
TEMPLATE = re.compile(r"(\w+)<spfmt::\(anonymous namespace\)::\w+Simd((?:, [\w ]+)*)>")


@dataclass(frozen=True)
class Instruction:
    address: int
    mnemonic: str
    operands: str  # AT&T order: sources first

    @property
    def is_fma(self) -> bool:
        return self.mnemonic.startswith(("vfmadd", "vfnmadd")) and self.mnemonic.endswith(
            ("ps", "ss")
        )

    @property
    def target(self) -> int | None:
        """Where a direct jump goes."""
        direct = self.mnemonic.startswith("j") and not self.operands.startswith("*")
        return int(self.operands.split()[0], 16) if direct else None

    def uses(self, register: str) -> bool:
        return f"%{register}" in self.operands

    def __str__(self) -> str:
        return f"{self.address:8x}:  {self.mnemonic:14s} {self.operands}"


@dataclass(frozen=True)
class Loop:
    function: str  # the symbol that holds it
    body: tuple[Instruction, ...]
    frame_pointer: bool  # the function addresses its stack through %rbp
    source: str = ""  # the template the loop was written in, "tile_panel"
    arguments: tuple[str, ...] = ()  # its arguments behind the SIMD type, ("4", "4")

    @property
    def fmas(self) -> tuple[Instruction, ...]:
        return tuple(i for i in self.body if i.is_fma)

    @property
    def stack_accesses(self) -> tuple[Instruction, ...]:
        stack = r"\(%r[sb]p" if self.frame_pointer else r"\(%rsp"
        return tuple(i for i in self.body if re.search(stack, i.operands))

    @property
    def vector_spills(self) -> tuple[Instruction, ...]:
        return tuple(i for i in self.stack_accesses if re.search(r"%[xyz]mm", i.operands))

    @property
    def scalar_reloads(self) -> tuple[Instruction, ...]:
        return tuple(i for i in self.stack_accesses if not re.search(r"%[xyz]mm", i.operands))

    @property
    def name(self) -> str:
        return f"{self.source or self.function}<{', '.join(self.arguments)}>"

    def __str__(self) -> str:
        return "\n".join([f"{self.name} in {self.function}:", *map(str, self.body)])


def compile_object(source: Path, to: Path, flags: list[str]) -> Path:
    """`source` as an object: Python's own flags, then `flags`, as setuptools has them."""
    python = [*shlex.split(sysconfig.get_config_var("CFLAGS") or ""), "-fPIC"]
    subprocess.run([*CXX, *python, *flags, "-g1", "-c", source, "-o", to], check=True)
    return to


def hot_loops(path: Path) -> list[Loop]:
    """The innermost loops of an object that multiply and add, with where they were written."""
    loops = []
    for name, code in _functions(path):
        framed = any(i.mnemonic == "mov" and i.operands == "%rsp,%rbp" for i in code)
        for body in innermost_loops(code):
            if any(i.is_fma for i in body):
                loops.append(Loop(name, body, framed))
    written = _templates(path, [i.address for loop in loops for i in loop.fmas])
    return [_attributed(loop, written) for loop in loops]


def _functions(path: Path) -> Iterator[tuple[str, list[Instruction]]]:
    command = ["objdump", "-d", "-C", "-j", ".text", "--no-show-raw-insn", "-w", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    name, code = "", []
    for line in text.splitlines():
        if start := FUNCTION.match(line):
            if code:
                yield name, code
            name, code = start[1], []
        elif found := INSTRUCTION.match(line):
            code.append(Instruction(int(found[1], 16), found[2], found[3].strip()))
    if code:
        yield name, code


def _attributed(loop: Loop, written: dict[int, tuple[str, tuple[str, ...]]]) -> Loop:
    """The template most of its FMAs come from: jump threading may mix in a neighbour's."""
    counted = Counter(written.get(i.address, ("", ())) for i in loop.fmas)
    (source, arguments), _ = counted.most_common(1)[0]
    if not source:
        source = re.sub(r"\(.*", "", loop.function.replace("(anonymous namespace)", ""))
        source = source.rpartition("::")[2]
    return Loop(loop.function, loop.body, loop.frame_pointer, source, arguments)


def _templates(path: Path, addresses: list[int]) -> dict[int, tuple[str, tuple[str, ...]]]:
    """Per address the innermost inlined function that is a template over a SIMD type."""
    command = ["addr2line", "-a", "-i", "-f", "-C", "-j", ".text", "-e", str(path)]
    text = subprocess.run(
        command, input="\n".join(map(hex, addresses)), check=True, capture_output=True, text=True
    ).stdout
    written: dict[int, tuple[str, tuple[str, ...]]] = {}
    address = 0
    for line in text.splitlines():
        if line.startswith("0x"):
            address = int(line, 16)
        elif address not in written and (found := TEMPLATE.search(line)):
            arguments = tuple(a for a in found[2].split(", ")[1:] if a not in ("float", "double"))
            written[address] = (found[1], arguments)
    return written


def innermost_loops(code: list[Instruction]) -> list[tuple[Instruction, ...]]:
    """Loops without a loop inside: cycles that are broken for good by removing their entry."""
    index = {instruction.address: k for k, instruction in enumerate(code)}
    after: list[list[int]] = []
    for k, instruction in enumerate(code):
        ends = instruction.mnemonic.startswith(("jmp", "ret", "ud2", "hlt"))
        nexts = [] if ends or k + 1 == len(code) else [k + 1]
        if instruction.target in index:
            nexts.append(index[instruction.target])
        after.append(nexts)
    found, pending = [], cycles(after, set(range(len(code))))
    while pending:
        cycle = pending.pop()
        inner = cycles(after, cycle - {_entry(after, cycle)})
        pending += inner
        if not inner:
            found.append(tuple(code[k] for k in sorted(cycle)))
    return sorted(found, key=lambda body: body[0].address)


def _entry(after: list[list[int]], cycle: set[int]) -> int:
    entered = (n for k, nexts in enumerate(after) if k not in cycle for n in nexts if n in cycle)
    return min(entered, default=min(cycle))


def cycles(after: list[list[int]], nodes: set[int]) -> list[set[int]]:
    """Strongly connected components of more than one node, or with an edge to itself (Tarjan)."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    found = []
    for root in sorted(nodes):
        if root in order:
            continue
        work = [(root, iter(after[root]))]
        order[root] = low[root] = len(order)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, nexts = work[-1]
            for n in nexts:
                if n not in nodes:
                    continue
                if n not in order:
                    order[n] = low[n] = len(order)
                    stack.append(n)
                    on_stack.add(n)
                    work.append((n, iter(after[n])))
                    break
                if n in on_stack:
                    low[node] = min(low[node], order[n])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == order[node]:
                    component = set(stack[stack.index(node) :])
                    del stack[-len(component) :]
                    on_stack -= component
                    if len(component) > 1 or node in after[node]:
                        found.append(component)
    return found
