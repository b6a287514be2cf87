"""A dispatch mode that counts FLOPs and living bytes of whatever runs inside, also of tensors without memory."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

META = torch.device("meta")


class Ledger(TorchDispatchMode):
    """FLOPs of what runs inside, and bytes of the tensors made inside that are alive at once, by storage."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0
        self.live = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}
        self._older: set[int] = set()

    def ignore(self, tensors: Any) -> None:
        """These were there before: weights, the batch. They must outlive this counter."""
        self._older |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def note(self, extra: int) -> None:
        """Something that was not run would have needed this many bytes more than are alive now."""
        self.peak = max(self.peak, self.live + extra)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        packet = function.overloadpacket
        formula: Any = ATTENTION_FLOPS.get(packet) or flop_registry.get(packet)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=output)
        for value in tree_iter(output):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or key in self._older:
            return

        def gone(_: Any) -> None:
            del self._alive[key]
            self.live -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@contextlib.contextmanager
def flash_on_meta() -> Iterator[None]:
    """Attention without a matrix of scores, as CPU and GPU run it; on meta, PyTorch would write the whole matrix."""
    original = functional.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **options):
        if query.device == META and attn_mask is None and not dropout_p and not options:
            return _FLASH(query, key, value, is_causal=is_causal, scale=scale)[0]
        return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)

    functional.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


ATTENTION_FLOPS = {
    _FLASH: lambda query, key, value, *_, **__: sdpa_flop_count(query.shape, key.shape, value.shape),
    # Four products, as through a matrix of scores: that flash attention computes these again is no work asked for.
    _FLASH_BACKWARD: lambda _, query, key, value, *__, **___: 2 * sdpa_flop_count(query.shape, key.shape, value.shape),
}
