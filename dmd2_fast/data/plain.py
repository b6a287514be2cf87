"""The plain loader: PyTorch and Pillow in a few threads. For machines without DALI, and the oracle for the other."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dmd2_fast.data.loader import PREFETCH, Loader


class PlainLoader(Loader):
    """Reads through PyTorch and Pillow, some iterations ahead in `num_threads` threads; 0 reads when asked."""

    name = "plain"

    def _raw(self) -> Generator[Tensor, None, None]:
        if self.num_threads == 0:
            for iteration in itertools.count(self.start_iteration):
                yield self._to_device([self._decode(self.order(iteration)[1].tolist())])
        executor = ThreadPoolExecutor(self.num_threads, thread_name_prefix="dmd2_fast-data")
        queue: deque[list[Future[NDArray[np.uint8]]]] = deque()
        try:
            for iteration in itertools.count(self.start_iteration):
                indices = self.order(iteration)[1].numpy()
                parts = np.array_split(indices, min(self.num_threads, len(indices)))
                queue.append([executor.submit(self._decode, part.tolist()) for part in parts])
                if len(queue) > PREFETCH:
                    yield self._to_device([future.result() for future in queue.popleft()])
        finally:
            executor.shutdown(wait=True, cancel_futures=True)

    def _decode(self, indices: list[int]) -> NDArray[np.uint8]:
        return np.stack([self.dataset.decode(index) for index in indices])

    def _to_device(self, parts: list[NDArray[np.uint8]]) -> Tensor:
        raw = torch.from_numpy(np.concatenate(parts))
        if self.device.type == "cuda":
            raw = raw.pin_memory()
        return raw.to(self.device, non_blocking=True)
