"""What the compiled suites share: the library's launchers on the simulator, and what every launch must be clear of.

The simulator refuses any access outside an argument's bytes, so every launch here is a bounds check as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import ptxsim
import torch

from dmd2_fast import use_backend
from dmd2_fast.kernels import _fold

ARCHITECTURES = (80, 90)


@contextlib.contextmanager
def simulated(arch: int, **options: object) -> Iterator[ptxsim.SimDevice]:
    """The public operators inside run their Triton kernels, compiled for `arch`, in the simulator.

    Memory that PyTorch allocates is full of NaNs until a kernel writes to it, but not with ctas=: then only some
    programs run, and the last to arrive, which sets a counter back, may not be one of them.
    """
    _fold.forget()
    torch.use_deterministic_algorithms("ctas" not in options)  # this is what fills memory
    try:
        with use_backend("triton"), ptxsim.device(arch=arch, fake_cuda=True, **options) as device:
            yield device
    finally:
        torch.use_deterministic_algorithms(False)
        _fold.forget()


def assert_clean(device: ptxsim.SimDevice, num_launches: int) -> None:
    """So many launches there were; none had a race (race="report") or read what nobody wrote."""
    assert len(device.launches) == num_launches
    for launch in device.launches:
        assert launch.result.races == []
        assert launch.result.warnings == []


def assert_memory_bound(device: ptxsim.SimDevice, arch: int, num_bytes: float) -> None:
    """Memory is the limit of every launch, and together they move num_bytes, in 128-bit accesses of whole sectors."""
    moved = 0.0
    for launch in device.launches:
        result = launch.result
        assert result.roofline(arch)["bound"] == "mem"
        moved += result.dram_read + result.dram_write
        for _, _, kind, opcode, requests, size, sectors, _ in result.mem_table():
            # Of what a sample has one (coefficients, ids, sums), all threads want the same sector.
            if kind != "shared" and sectors > 1:
                assert size == 32 * 16 * requests, opcode
    assert moved <= 1.03 * num_bytes
