"""What a run measures of itself between log lines: device tensors and seconds."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .ranks import reduce_mean


class Clock:
    """Seconds spent in named parts since the last reading; what no part claims is "other"."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = defaultdict(float)
        self.start = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.parts[name] += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        now = time.perf_counter()
        seconds = {f"seconds/{name}": value for name, value in self.parts.items()}
        seconds["seconds/other"] = now - self.start - sum(self.parts.values())
        self.parts.clear()
        self.start = now
        return seconds


class Metrics:
    """Sums of device tensors between log lines; reading them is the one host read."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = defaultdict(int)

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().float().reshape(())
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
            self.counts[name] += 1

    def restore(self, sums: dict[str, Tensor], counts: dict[str, int]) -> None:
        """Go on from the sums of an interrupted interval."""
        self.sums, self.counts = dict(sums), defaultdict(int, counts)

    def read(self) -> dict[str, float]:
        """Means over the interval and over ranks. Collective. Ranks add the same names, in the same order."""
        if not self.sums:
            return {}
        names = list(self.sums)
        means = reduce_mean(torch.stack([self.sums[name] / self.counts[name] for name in names]))
        self.sums.clear()
        self.counts.clear()
        return dict(zip(names, means.tolist(), strict=True))
