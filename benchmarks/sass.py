"""A kernel's machine code as basic blocks and loops, by the disassembler that ships with Triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import triton


@dataclass
class Block:
    """Instructions that run one after another, (predicate, opcode, operands) each."""

    instructions: list[tuple[str, str, str]] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)
    count: float = 0.0  # how often a thread runs it

    @property
    def opcodes(self) -> list[str]:
        return [opcode for _, opcode, _ in self.instructions]


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def disassemble(cubin: bytes, name: str) -> tuple[list[Block], int]:
    """The basic blocks of a kernel, in address order from its entry, and its registers a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _tool("nvdisasm", "-c", file.name)
        usage = _tool("cuobjdump", "-res-usage", file.name)
    section = re.search(rf"^\s*\.section\s+\.text\.{re.escape(name)},.*?(?=^\s*\.section\s|\Z)", text, re.M | re.S)
    registers = re.search(rf"Function {re.escape(name)}:\s+REG:(\d+)", usage)
    if section is None or registers is None:
        raise RuntimeError(f"nvdisasm shows no code of {name}")
    blocks, at_label = [Block()], {}
    for line in section[0].splitlines():
        if label := re.match(r"(\.?[\w$.]+):\s*$", line):
            if blocks[-1].instructions:
                blocks.append(Block())
            at_label[label[1]] = len(blocks) - 1
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@(!?U?P\w+)\s+)?([\w.]+)\s*(.*?)\s*;", line):
            predicate, opcode, operands = found.groups()
            blocks[-1].instructions.append((predicate or "", opcode, operands))
            if re.match(r"BRA|EXIT|RET", opcode) or _is_jump(opcode, operands):
                blocks.append(Block())
    if not blocks[-1].instructions:
        blocks.pop()
    for index, block in enumerate(blocks):
        block.successors = [s for s in _successors(block, index, at_label) if s < len(blocks)]
    return blocks, int(registers[1])


def _is_jump(opcode: str, operands: str) -> bool:
    """A branch to a label of the kernel; ptxas leaves some loops with a CALL that never returns."""
    return opcode.startswith("BRA") or (opcode.startswith("CALL.REL.NOINC") and "`(.L_" in operands)


def _successors(block: Block, index: int, at_label: dict[str, int]) -> list[int]:
    predicate, opcode, operands = block.instructions[-1]
    is_conditional = predicate not in ("", "PT", "UPT") or re.match(r"!?U?P\d", operands) is not None
    is_conditional |= opcode.startswith(("BRA.DIV", "BRA.CONV", "BRA.U"))
    if _is_jump(opcode, operands):
        target = re.search(r"`\((\.?[\w$.]+)\)", operands)
        assert target is not None, f"a branch without a label: {opcode} {operands}"
        return [at_label[target[1]], *([index + 1] if is_conditional else [])]
    if re.match(r"EXIT|RET", opcode):
        return [index + 1] if is_conditional else []
    return [index + 1]


def _reached(blocks: list[Block], start: int, without: int | None = None) -> set[int]:
    """The blocks that can follow `start`, itself included, where `without` is never entered."""
    reached, waiting = {start}, [start]
    while waiting:
        for successor in blocks[waiting.pop()].successors:
            if successor != without and successor not in reached:
                reached.add(successor)
                waiting.append(successor)
    return reached


def last_program_only(blocks: list[Block]) -> set[int]:
    """The blocks that a program may leave out after its atomic operation on global memory.

    In our kernels all programs count themselves in, and the last one to arrive folds what all have left.
    """
    rare: set[int] = set()
    exits = {index for index, block in enumerate(blocks) if any(opcode == "EXIT" for opcode in block.opcodes)}
    for start in _reached(blocks, 0):
        if any(opcode.startswith("ATOMG") for opcode in blocks[start].opcodes):
            after = _reached(blocks, start) - {start}
            rare |= {index for index in after if _reached(blocks, start, without=index) & exits}
    return rare


def loops_of(blocks: list[Block]) -> list[set[int]]:
    """The blocks of each loop, in the order of the loops' headers. Sets the count of reached blocks to 1.

    What only the last program does is left out: it is one program's work in a whole grid.
    """
    rare = last_program_only(blocks)
    bodies: dict[int, set[int]] = {}
    predecessors: dict[int, set[int]] = {}
    is_open: dict[int, bool] = {}  # on the path from the entry, of those reached so far
    latches: list[tuple[int, int]] = []

    def visit(index: int) -> None:
        is_open[index], blocks[index].count = True, 1.0
        for successor in blocks[index].successors:
            if successor in rare:
                continue
            predecessors.setdefault(successor, set()).add(index)
            if successor not in is_open:
                visit(successor)
            elif is_open[successor]:
                latches.append((index, successor))
        is_open[index] = False

    visit(0)
    for latch, header in latches:
        body, waiting = bodies.setdefault(header, {header}), [latch]
        while waiting:
            index = waiting.pop()
            if index not in body:
                body.add(index)
                waiting += predecessors[index]
    return [bodies[header] for header in sorted(bodies)]
