"""The DALI loader: we choose the samples and hand over their encoded bytes, DALI decodes them ahead in its threads."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dmd2_fast.data.loader import PREFETCH, Loader
from dmd2_fast.errors import DataError


class DaliLoader(Loader):
    """Reads through NVIDIA DALI: on the CPU, or with the GPU of `device` when that is a CUDA device.

    The order is ours (an external source), so batches are those of the plain loader, bit for bit.
    """

    name = "dali"

    def _raw(self) -> Generator[Tensor, None, None]:
        # DALI has no public way to end a pipeline: its threads end with the last reference, which this frame holds.
        pipeline = self._pipeline()
        for iteration in itertools.count(self.start_iteration):
            try:
                (output,) = pipeline.run()
            except RuntimeError as error:
                raise self._diagnosis(iteration, error) from error
            yield self._to_torch(output)

    def _pipeline(self) -> Any:
        from nvidia.dali import Pipeline, fn, types

        on_gpu = self.device.type == "cuda"
        device_id = (self.device.index or 0) if on_gpu else None
        pipeline = Pipeline(
            batch_size=self.order.rank_batch_size,
            num_threads=max(1, self.num_threads),
            device_id=device_id,
            prefetch_queue_depth=PREFETCH,
        )
        iterations = itertools.count(self.start_iteration)

        def encoded_batch() -> list[NDArray[np.uint8]]:
            indices = self.order(next(iterations))[1].tolist()
            return [np.frombuffer(self.dataset.encoded(index), dtype=np.uint8) for index in indices]

        with pipeline:
            encoded = fn.external_source(source=encoded_batch, dtype=types.UINT8, ndim=1)
            if self.dataset.encoding == "png":
                color = types.GRAY if self.dataset.sample_shape[0] == 1 else types.RGB
                raw = fn.decoders.image(
                    encoded, device="mixed" if on_gpu else "cpu", output_type=color, adjust_orientation=False
                )
            else:
                raw = encoded.gpu() if on_gpu else encoded
            pipeline.set_outputs(raw)
        pipeline.build()
        return pipeline

    def _to_torch(self, output: Any) -> Tensor:
        if self.device.type != "cuda":
            # DALI's own buffer, which a later run overwrites: making the batch has copied it by then.
            return torch.from_numpy(output.as_array())
        from nvidia.dali.plugin.pytorch import feed_ndarray

        raw = torch.empty(output.as_tensor().shape(), dtype=torch.uint8, device=self.device)
        feed_ndarray(output.as_tensor(), raw, cuda_stream=torch.cuda.current_stream(self.device))
        return raw

    def _diagnosis(self, iteration: int, error: RuntimeError) -> DataError:
        """Which sample DALI could not decode: it names only a position in some batch it was reading ahead."""
        for ahead in range(PREFETCH + 1):
            for index in self.order(iteration + ahead)[1].tolist():
                try:
                    self.dataset.decode(index)
                except DataError as cause:
                    return cause
        return DataError(f'DALI could not read the data: {error}. Set data.loader to "plain" to read without it.')
