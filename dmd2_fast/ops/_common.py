"""What the operators share: argument checks, prediction types, and going to the working dtype and back.

Legend: N batch, * any trailing shape. Arithmetic is in f32, or f64 where the first tensor is f64.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dmd2_fast.random import NoiseKey, check_range, check_sample_ids, key_words, normal_reference

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow")
EPSILON, SAMPLE, V_PREDICTION, FLOW = range(4)
"""Operators take the type's position in PREDICTION_TYPES."""


def working_dtype(first: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: f32, f64 for f64."""
    return torch.float64 if first.dtype == torch.float64 else torch.float32


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(N,) to (N, 1, ..., 1) of as many dimensions as `like`, in its working dtype."""
    return values.to(working_dtype(like)).reshape(-1, *[1] * (like.dim() - 1))


def store(result: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Round once to the dtype and memory format of `like`: the strides are those of torch.empty_like(like)."""
    out = torch.empty_like(like, dtype=dtype or like.dtype)
    if result.dtype == out.dtype and result.stride() == out.stride():
        return result
    return out.copy_(result)


def draw(
    like: Tensor, noise: Tensor | None, seed: int, step: int, stream: int, sample_ids: Tensor | None
) -> Tensor | None:
    """Noise of the shape of `like` in its working dtype: the given, the keyed, or None where there is neither."""
    if noise is not None:
        return noise.to(working_dtype(like))
    if sample_ids is None:
        return None
    return normal_reference(sample_ids, like.shape[1:], seed, step, stream, working_dtype(like))


def x0_from(x_t: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: int) -> Tensor:
    """x0 of a prediction, all in the working dtype and of shapes that broadcast."""
    if prediction_type == EPSILON:
        return (x_t - sigma * prediction) / alpha
    if prediction_type == V_PREDICTION:
        return (alpha * x_t - sigma * prediction) / (alpha * alpha + sigma * sigma)
    if prediction_type == FLOW:
        return (x_t - sigma * prediction) / (alpha + sigma)
    return prediction


def check_tensor(name: str, tensor: Tensor, first: Tensor | None = None) -> None:
    """ValueError unless `tensor` is floating, on the device of `first`, and f64 exactly where `first` is."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: got {type(tensor).__name__}, expected a tensor")
    if tensor.dtype not in FLOATING:
        raise ValueError(f"{name}: got {tensor.dtype}, expected float16, bfloat16, float32 or float64")
    if first is None:
        return
    if tensor.device != first.device:
        raise ValueError(f"{name}: got a tensor on {tensor.device}, expected {first.device}")
    if (tensor.dtype == torch.float64) != (first.dtype == torch.float64):
        raise ValueError(f"{name}: got {tensor.dtype} beside {first.dtype}: use float64 for all or for none")


def check_batch(name: str, tensor: Tensor) -> None:
    """ValueError unless `tensor` is floating and has a batch dimension."""
    check_tensor(name, tensor)
    if tensor.dim() == 0:
        raise ValueError(f"{name}: got a 0-d tensor, expected a batch (N, ...)")


def check_like(name: str, tensor: Tensor, first_name: str, first: Tensor) -> None:
    """ValueError unless `tensor` goes with `first` and has its shape."""
    check_tensor(name, tensor, first)
    if tensor.shape != first.shape:
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)}, expected that of {first_name}, {tuple(first.shape)}"
        )


def check_vector(name: str, values: Tensor, first: Tensor) -> None:
    """ValueError unless `values` is (N,) f32 (f64 too beside f64) for the N samples of `first`."""
    if not isinstance(values, Tensor):
        raise ValueError(f"{name}: got {type(values).__name__}, expected a float32 tensor ({first.shape[0]},)")
    if values.dtype != torch.float32 and not (values.dtype == torch.float64 == first.dtype):
        raise ValueError(f"{name}: got {values.dtype}, expected float32 (or float64 beside a float64 first argument)")
    if values.device != first.device:
        raise ValueError(f"{name}: got a tensor on {values.device}, expected {first.device}")
    if values.dim() != 1 or values.shape[0] != first.shape[0]:
        raise ValueError(f"{name}: got shape {tuple(values.shape)}, expected ({first.shape[0]},), one value a sample")


def check_parameter(name: str, parameter: Tensor, first: Tensor, size: int) -> None:
    """ValueError unless `parameter` goes with `first` and is a vector of `size` elements."""
    check_tensor(name, parameter, first)
    if parameter.shape != (size,):
        raise ValueError(f"{name}: got shape {tuple(parameter.shape)}, expected ({size},)")


def check_groups(num_groups: int, num_channels: int) -> None:
    """ValueError unless the channels divide into the groups."""
    if not isinstance(num_groups, (int, torch.SymInt)) or num_groups < 1 or num_channels % num_groups:
        raise ValueError(f"num_groups: got {num_groups}, expected a divisor of the {num_channels} channels")


def check_prediction_type(prediction_type: str) -> int:
    """The number operators take for a prediction type, or ValueError."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type: got {prediction_type!r}, expected one of {', '.join(PREDICTION_TYPES)}")
    return PREDICTION_TYPES.index(prediction_type)


NoiseArguments = tuple[Tensor | None, int, int, int, Tensor | None]


def noise_arguments(
    noise: Tensor | None,
    key: NoiseKey | None,
    sample_ids: Tensor | None,
    first_name: str,
    first: Tensor,
    required: bool,
) -> NoiseArguments:
    """Check noise, key and sample_ids, and return (noise, seed, step, stream, sample_ids) as operators take them.

    An operator tells the three cases by noise and sample_ids: at most one of the two is a tensor.
    """
    if noise is not None and key is not None:
        raise ValueError("noise and key: got both, expected one: noise as a tensor, or the key to draw it from")
    if noise is not None:
        check_like("noise", noise, first_name, first)
        return noise, 0, 0, 0, None
    if key is None:
        if required:
            raise ValueError("noise and key: got neither, expected noise as a tensor, or a key with sample_ids")
        return None, 0, 0, 0, None
    if not isinstance(key, NoiseKey):
        raise ValueError(f"key: got {type(key).__name__}, expected a NoiseKey")
    if sample_ids is None:
        raise ValueError("sample_ids: got None with a key, expected int64 positions (N,) in the step's global batch")
    check_sample_ids(sample_ids, first.shape[0])
    if sample_ids.device != first.device:
        raise ValueError(f"sample_ids: got a tensor on {sample_ids.device}, expected {first.device}")
    return None, *key_words(key), sample_ids


def check_ids_at(index: int) -> Callable[..., None]:
    """An operator's value check: the range of the sample ids, its argument number `index`."""
    return lambda *arguments: check_range(arguments[index])
