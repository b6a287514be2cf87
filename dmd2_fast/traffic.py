"""Bytes that the ranks exchange, counted where DeepSpeed and this library call torch.distributed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor


@dataclass
class Traffic:
    """Bytes of whole tensors, padding included: each of N ranks receives, or sends, (N - 1) / N of them."""

    gathered: int = 0
    """Bytes that all-gathers made: weights."""
    num_gathers: int = 0
    reduced: int = 0
    """Bytes that went into reduce-scatters: gradients."""
    num_reductions: int = 0
    all_reduced: int = 0
    """Bytes of all-reduces: norms, flags, and gradients with `reduce_scatter` off."""
    num_all_reductions: int = 0


def _bytes(value: Tensor | list[Tensor]) -> int:
    return sum(part.numel() * part.element_size() for part in (value if isinstance(value, list) else [value]))


COUNTED = {
    "all_gather": ("tensor_list", 0, "gathered", "num_gathers"),
    "all_gather_into_tensor": ("output_tensor", 0, "gathered", "num_gathers"),
    "reduce_scatter": ("input_list", 1, "reduced", "num_reductions"),
    "reduce_scatter_tensor": ("input", 1, "reduced", "num_reductions"),
    "all_reduce": ("tensor", 0, "all_reduced", "num_all_reductions"),
}
"""Function -> name and place of the argument that is whole, and what it is added to."""


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """What this rank exchanges inside. With one rank DeepSpeed gathers and reduces nothing."""
    traffic, places = Traffic(), []

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        argument, place, size, number = COUNTED[name]

        def call(*arguments: Any, **options: Any) -> Any:
            whole = options[argument] if argument in options else arguments[place]
            setattr(traffic, size, getattr(traffic, size) + _bytes(whole))
            setattr(traffic, number, getattr(traffic, number) + 1)
            return function(*arguments, **options)

        return call

    def put(owner: Any, attribute: str, name: str) -> None:
        function = getattr(owner, attribute)
        places.append((owner, attribute, function))
        setattr(owner, attribute, counting(name, function))

    for name in COUNTED:
        put(dist, name, name)
    from deepspeed.comm import comm

    # DeepSpeed's backend has taken hold of these two functions at its start.
    put(comm.cdb, "all_gather_function", "all_gather_into_tensor")
    put(comm.cdb, "reduce_scatter_function", "reduce_scatter_tensor")
    try:
        yield traffic
    finally:
        for owner, attribute, function in places:
            setattr(owner, attribute, function)
