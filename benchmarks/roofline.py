"""What limits each Triton kernel on a GPU that need not be there: `python -m benchmarks.roofline [--target sm_90]`.

The public operators run on CPU tensors with Triton's driver replaced, so the launches are the library's own; each is
compiled for the target and disassembled instead of run. From the machine code: how often each instruction is issued,
how long each unit of a multiprocessor is busy with it, and how long the memory needs to move each tensor once.

    memory time    bytes of all tensors that a launch is given / bandwidth
    limit ratio    the longest of all times / memory time: 1.00 where the memory alone limits the kernel

Every branch that can be reached counts once for each thread, loops as often as their case says; what only the last
program to arrive does, beyond an atomic operation, is left out. Not seen: latency, caches, tails of the grid, the cost
of a launch (2 to 5 microseconds).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import dmd2_fast
from benchmarks import harness
from benchmarks.roofline_cases import CASES, Case
from benchmarks.sass import Block, disassemble, loops_of

# --- GPUs and their units ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """One GPU of an architecture: data sheet, and lanes a clock a multiprocessor by unit (CUDA programming guide,
    "Throughput of native arithmetic instructions")."""

    name: str
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes a second
    lanes: dict[str, float]


_LANES = {"issue": 128, "integer multiply": 64, "ALU": 64, "special functions": 16, "load/store": 32, "FP64": 32}
GPUS = {
    80: Gpu("A100 80 GB", 108, 1.41e9, 2.0e12, {**_LANES, "FMA": 64}),
    90: Gpu("H100 SXM", 132, 1.755e9, 3.35e12, {**_LANES, "FMA": 128, "FP64": 64}),
}
_L1_BYTES = 64  # global memory's, a clock a multiprocessor
_SHARED_BYTES = 128

# The unit of an instruction by the beginning of its name, the first that fits; what fits none is the ALU's. Integer
# products run on the FMA units at their own rate; 64 bits of a product take twice the time. Conversions between integer
# and float go to the special functions' unit, except those ptxas calls I2FP and F2FP.
_UNITS = [
    (r"I2FP|F2FP", "ALU"),
    (r"U[A-Z]|R2UR|S2UR|VOTEU|LDCU", "uniform"),
    (r"S2R|CS2R|LDC", "other"),
    (r"BRA|BRX|BSSY|BSYNC|BREAK|EXIT|CALL|RET|WARPSYNC|NOP|YIELD|BAR|BPT|ELECT", "other"),
    (r"DEPBAR|ERRBAR|MEMBAR|CCTL|SYNCS|FENCE|ACQBULK|NANOSLEEP", "other"),
    (r"MUFU|I2F|F2I|F2F|FRND|I2I|POPC|FLO|BREV|REDUX", "special functions"),
    (r"IMAD|IDP", "integer multiply"),
    (r"FFMA|FADD|FMUL|FSWZADD|HFMA2|HADD2|HMUL2|HSET2|HSETP2", "FMA"),
    (r"DADD|DMUL|DFMA|DSETP|DMNMX", "FP64"),
    (r"LDS|STS|ATOMS|SHFL", "shared"),
    (r"LDG|STG|ATOM|RED|LD\.|ST\.", "global"),
    (r"LDL|STL", "local"),
]


def unit_of(opcode: str) -> str:
    """The unit that runs an instruction; "uniform" and "other" cost an issue slot alone."""
    return next((unit for pattern, unit in _UNITS if re.match(pattern, opcode)), "ALU")


def access_bytes(opcode: str) -> int:
    """Bytes a thread moves with a memory instruction."""
    width = re.search(r"\.[US]?(8|16|64|128|256)(\.|$)", opcode)
    return int(width[1]) // 8 if width else 4


# --- launches, compiled instead of run --------------------------------------------------------------------------------


@dataclass
class Launch:
    """A kernel as compiled for the target, its number of programs and the bytes of the tensors it is given."""

    kernel: Any
    programs: int
    bytes: int

    @property
    def name(self) -> str:
        return self.kernel.metadata.name.removeprefix("_").removesuffix("_kernel")


class _CompilesOnly:
    """Triton's driver where there is no GPU: names one."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def captured(arch: int) -> Iterator[list[Launch]]:
    """Within the block every Triton launch is compiled for sm_`arch` and put on the list that this gives; none runs."""
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        tensors = {a.data_ptr(): a.nbytes for a in (*args, *options.values()) if isinstance(a, Tensor)}
        launches.append(Launch(kernel, math.prod(grid), sum(tensors.values())))
        return kernel

    previous = driver._active  # its public reset would look for a GPU
    driver.set_active(_CompilesOnly(arch))
    JITFunction.run = compile_only
    try:
        with dmd2_fast.use_backend("triton"):
            yield launches
    finally:
        JITFunction.run = run
        driver._active = previous


# --- the roofline -----------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """What one launch needs on a target. Times are picoseconds an element, by unit; "memory" is one of them."""

    operator: str
    kernel: str
    dtype: str
    shape: str
    target: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    accesses: Counter[str]
    instructions: float
    bytes: float
    times: dict[str, float]

    @property
    def next_resource(self) -> str:
        return max((unit for unit in self.times if unit != "memory"), key=self.times.__getitem__)

    @property
    def next_share(self) -> float:
        return self.times[self.next_resource] / self.times["memory"]

    @property
    def limit_ratio(self) -> float:
        return max(1.0, self.next_share)


def unit_clocks(blocks: list[Block], gpu: Gpu) -> tuple[float, dict[str, float]]:
    """Instructions a thread, and the clocks for which a thread keeps each unit of a multiprocessor busy."""
    lanes: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    for block in blocks:
        for opcode in block.opcodes:
            unit = unit_of(opcode)
            lanes["issue"] += block.count
            lanes[unit] += block.count * (2 if re.match(r"IMAD\.(WIDE|HI)", opcode) else 1)
            if unit in ("global", "shared") and not opcode.startswith("SHFL"):
                moved[unit] += block.count * access_bytes(opcode)
    lanes["FMA"] += lanes["integer multiply"]
    lanes["load/store"] = lanes["global"] + lanes["shared"] + lanes["local"]
    clocks = {unit: lanes[unit] / width for unit, width in gpu.lanes.items()}
    clocks["L1"] = moved["global"] / _L1_BYTES + moved["shared"] / _SHARED_BYTES
    return lanes["issue"], clocks


def trips_of(launch: Launch, case: Case) -> tuple[int, ...]:
    """How often each loop of the kernel runs, as the case says."""
    source = launch.kernel.src
    constants = {source.fn.arg_names[index]: value for (index,), value in source.constants.items()}
    return case.trips[launch.name](constants) if launch.name in case.trips else ()


def row_of(launch: Launch, arch: int, case: Case, dtype: torch.dtype) -> Row:
    """The roofline of one launch. ValueError where the case does not say how often the kernel's loops run."""
    gpu, metadata, elements = GPUS[arch], launch.kernel.metadata, math.prod(case.shape)
    blocks, registers = disassemble(launch.kernel.asm["cubin"], metadata.name)
    loops, trips = loops_of(blocks), trips_of(launch, case)
    if len(loops) != len(trips):
        raise ValueError(f"{launch.name} on sm_{arch} has {len(loops)} loops, its case names {len(trips)} trip counts")
    for body, number in zip(loops, trips, strict=True):
        for index in body:
            blocks[index].count *= number
    issued, clocks = unit_clocks(blocks, gpu)
    reached = [opcode for block in blocks if block.count for opcode in block.opcodes]
    threads = 32 * metadata.num_warps * launch.programs / elements  # an element
    picoseconds = 1e12 * threads / (gpu.multiprocessors * gpu.clock)
    return Row(
        operator=case.name,
        kernel=launch.name,
        dtype=str(dtype).removeprefix("torch."),
        shape="x".join(map(str, case.shape)),
        target=f"sm_{arch}",
        registers=registers,
        spilled_bytes=sum(access_bytes(opcode) for opcode in reached if unit_of(opcode) == "local"),
        shared_bytes=metadata.shared,
        accesses=Counter(f"{o[:2]}{8 * access_bytes(o)}" for o in reached if re.match(r"LDG|STG", o)),
        instructions=issued * threads,
        bytes=launch.bytes / elements,
        times={
            "memory": 1e12 * launch.bytes / elements / gpu.bandwidth,
            **{unit: value * picoseconds for unit, value in clocks.items()},
        },
    )


def launches_of(case: Case, dtype: torch.dtype, arch: int) -> list[Launch]:
    """What the case launches on a target, compiled; nothing where Triton lacks the operator."""
    with captured(arch) as launches:
        case.call(torch.empty(case.shape, dtype=dtype))
    return launches


COLUMNS: dict[str, Callable[[Row], str]] = {
    "operator": lambda row: row.operator,
    "kernel": lambda row: row.kernel,
    "dtype": lambda row: row.dtype,
    "shape": lambda row: row.shape,
    "target": lambda row: row.target,
    "registers": lambda row: str(row.registers),
    "spilled bytes": lambda row: str(row.spilled_bytes),
    "shared bytes": lambda row: str(row.shared_bytes),
    "accesses": lambda row: " ".join(f"{number} {width}" for width, number in sorted(row.accesses.items())),
    "instructions / element": lambda row: f"{row.instructions:.1f}",
    "bytes / element": lambda row: f"{row.bytes:.2f}",
    "memory ps / element": lambda row: f"{row.times['memory']:.2f}",
    "next resource": lambda row: row.next_resource,
    "its share of memory time": lambda row: f"{row.next_share:.2f}",
    "limit ratio": lambda row: f"{row.limit_ratio:.2f}",
}


def table(rows: list[Row], markdown: bool) -> str:
    """All columns of all rows, aligned; as Markdown on request."""
    cells = [[text(row) for text in COLUMNS.values()] for row in rows]
    if markdown:
        return harness.markdown(list(COLUMNS), cells)
    cells.insert(0, list(COLUMNS))
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", default=["sm_80", "sm_90"], choices=[f"sm_{arch}" for arch in GPUS])
    parser.add_argument("--only", default="", metavar="NAME", help="the operators whose name contains this")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: nothing would be compiled")
    rows = []
    for case in CASES:
        if arguments.only in case.name:
            for dtype, target in itertools.product(case.dtypes, arguments.target):
                arch = int(target.removeprefix("sm_"))
                rows += [row_of(launch, arch, case, dtype) for launch in launches_of(case, dtype, arch)]
    print(table(rows, arguments.markdown))


if __name__ == "__main__":
    main()
