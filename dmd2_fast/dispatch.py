"""The operator library "dmd2_fast": one schema an operator, and the choice of the backend that runs it.

An operator is registered once, for CPU and CUDA, with a Python function that picks its backend at call time:

    reference   plain PyTorch on any device and dtype: the oracle and the fallback
    cpp         the C++ extension, CPU tensors (and CUDA tensors for r1_perturb, where it was built with nvcc)
    triton      Triton kernels: CUDA tensors, and CPU tensors too when asked for by name (interpreter)

f64 always runs on the reference. A fallback is never silent: it is logged once, and backends() gives the reason.
Adding an operator is one name in STEMS.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger("dmd2_fast")

# The file in kernels/ that has each operator's launcher. Launchers and C++ operators have the operator's own name, take
# the arguments of its schema and return what its fake says.
STEMS: dict[str, tuple[str, ...]] = {
    "noise": (
        "philox_normal",
        "philox_uniform",
        "add_noise",
        "add_noise_drawing",
        "add_noise_backward",
        "predict_x0",
        "predict_x0_backward",
        "renoise",
    ),
    "dmd": ("dmd_loss", "dmd_loss_backward"),
    "denoising": ("denoising_loss", "denoising_loss_backward"),
    "gan": (
        "gan_generator_loss",
        "gan_generator_loss_backward",
        "gan_discriminator_loss",
        "gan_discriminator_loss_backward",
        "gan_head_loss",
        "gan_head_loss_backward",
    ),
    "r1": ("r1_perturb", "r1_perturb_out", "r1_perturb_backward", "r1_penalty", "r1_penalty_backward"),
    "norm": ("group_norm_silu", "group_norm_silu_backward"),
}
STEM_OF = {name: stem for stem, names in STEMS.items() for name in names}
BACKENDS = ("reference", "cpp", "triton")
AUTO = {"cpu": "cpp", "cuda": "triton"}
REBUILD = "run `pip install --no-build-isolation .` in the repository"
# DMD2_FAST_EXTENSION names another build of it, as tools/sanitize.sh does.
EXTENSION = Path(os.environ.get("DMD2_FAST_EXTENSION") or Path(__file__).with_name("_C.abi3.so"))

LIBRARY = torch.library.Library("dmd2_fast", "DEF")
OPERATORS: dict[str, "Operator"] = {}

_requested = "auto"
_logged: set[str] = set()


class Choice(NamedTuple):
    """What runs an operator on one kind of device, and why."""

    backend: str
    reason: str


def log_once(level: int, message: str) -> None:
    """Log a message the first time it comes up in this process."""
    if message not in _logged:
        _logged.add(message)
        logger.log(level, message)


@functools.cache
def _load_extension() -> str:
    """Load the C++ extension; "" when that worked, else the reason why not and what to do."""
    if not EXTENSION.is_file():
        return f"the C++ extension is not built: with a C++ compiler and CMake present, {REBUILD}"
    try:
        torch.ops.load_library(str(EXTENSION))
    except OSError as error:
        return f"the C++ extension does not load ({error}): {REBUILD}"
    if hasattr(torch.ops.dmd2_fast_cpp, "instruction_set"):
        torch.ops.dmd2_fast_cpp.instruction_set()  # RuntimeError where DMD2_FAST_ISA asks for what does not exist
    return ""


@functools.cache
def _find_triton() -> str:
    """ "" where triton can be imported, else what to do."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: `pip install dmd2_fast[gpu]`"
    return ""


def missing(backend: str) -> str:
    """Why a backend cannot be used in this process at all, and how to get it; "" where it can."""
    if backend == "cpp":
        return _load_extension()
    return _find_triton() if backend == "triton" else ""


@functools.cache
def _fast(name: str, backend: str) -> Callable[..., Any] | str:
    """The implementation of an operator in an installed backend, or the reason why there is none."""
    if backend == "cpp":
        if not hasattr(torch.ops.dmd2_fast_cpp, name):
            return f"the C++ extension was built without {name}: {REBUILD}"
        return getattr(torch.ops.dmd2_fast_cpp, name)
    module = f"dmd2_fast.kernels.{STEM_OF[name]}"
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        return f"{module} has no {name} ({error})"


def _has_cuda(name: str) -> bool:
    """Whether the extension has the operator for CUDA tensors: r1_perturb, where it was built with nvcc."""
    is_built = hasattr(torch.ops.dmd2_fast_cpp, name)
    return is_built and torch._C._dispatch_has_kernel_for_dispatch_key(f"dmd2_fast_cpp::{name}", "CUDA")


@functools.cache
def _choose(name: str, device: str, requested: str) -> tuple[Choice, Callable[..., Any] | None]:
    """The choice for an operator on "cpu" or "cuda", with the function to call (None: the reference)."""
    if requested == "reference":
        return Choice("reference", "asked for"), None
    asked = "auto" if requested == "auto" else "asked for"
    backend = AUTO.get(device, "reference") if requested == "auto" else requested
    if backend == "reference":
        return Choice("reference", f"no other backend for {device} tensors"), None
    if reason := missing(backend):
        return Choice("reference", reason), None
    if backend == "cpp" and device != "cpu" and not _has_cuda(name):
        return Choice("reference", f"the cpp backend takes CPU tensors, not {device}"), None
    function = _fast(name, backend)
    if isinstance(function, str):
        return Choice("reference", function), None
    return Choice(backend, asked), function


PLAIN = (Tensor, torch.nn.Parameter)


def _is_watched() -> bool:
    """Whether a dispatch mode (fake tensors, profilers of operators) or a functorch transform is on."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None


class Operator:
    """One operator of the library: its reference, and the call-time choice among the backends.

    A call goes through PyTorch's dispatcher where anything may want to see it there (torch.compile, functorch, dispatch
    modes, tensor subclasses). Otherwise that would cost some 10 us forward and 40 us with gradients, as much as a small
    operator itself: plain tensors go straight to the backend, or to an autograd.Function with the same formula.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        check: Callable[..., None] | None,
        setup_context: Callable[..., None] | None,
        backward: Callable[..., Any],
    ) -> None:
        self.name = name
        self.reference = reference
        self.check = check
        self.overload: Any = None

        class Direct(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                output = self.run(*inputs)
                if setup_context is not None:
                    setup_context(ctx, inputs, output)
                return output

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return backward(ctx, *grads)

        self.direct = Direct.apply

    def __call__(self, *arguments: Any) -> Any:
        """The operator on these arguments, differentiably."""
        if torch.compiler.is_compiling() or _is_watched():
            return self.overload(*arguments)
        wants_grad = False
        for argument in arguments:
            if isinstance(argument, Tensor):
                if type(argument) not in PLAIN:
                    return self.overload(*arguments)
                wants_grad = wants_grad or argument.requires_grad
        if wants_grad and torch.is_grad_enabled():
            return self.direct(*arguments)
        return self.run(*arguments)

    def run(self, *arguments: Any) -> Any:
        """Runs the implementation for these arguments, without a graph: what the dispatcher comes down to."""
        if self.check is not None:
            self.check(*arguments)
        device, is_double = "cpu", False
        for argument in arguments:
            if isinstance(argument, Tensor):
                if not argument.is_cpu:  # naming the device of each tensor would take longer than all else here
                    device = argument.device.type
                is_double = is_double or argument.dtype is torch.float64
            elif argument is torch.float64:
                is_double = True
        choice, function = _choose(self.name, device, _requested)
        if function is None:
            self.log(choice, device)
            return self.reference(*arguments)
        if is_double:
            if _requested != "auto":
                log_once(logging.WARNING, f"{self.name}: {choice.backend} takes no float64, reference runs instead")
            return self.reference(*arguments)
        return function(*arguments)

    def log(self, choice: Choice, device: str) -> None:
        """Say once that the reference stands in; louder where a backend was asked for by name."""
        if _requested == "reference":
            return
        if _requested == "auto":
            log_once(logging.INFO, f"{self.name} on {device}: reference backend ({choice.reason})")
        else:
            log_once(
                logging.WARNING, f"{self.name} on {device}: {_requested} asked for, reference runs: {choice.reason}"
            )


def define(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    check: Callable[..., None] | None = None,
) -> Operator:
    """Register an operator, and return it to be called.

    schema: what follows the name. reference, fake and check take the schema's arguments in order; check looks at
    values, at call time, whatever the backend. setup_context and backward are those of torch.library.register_autograd;
    backward through an operator without them raises RuntimeError (PyTorch would warn and leave the gradient out).
    """
    backward = backward or functools.partial(_refuse, name)
    operator = OPERATORS[name] = Operator(name, reference, check, setup_context, backward)
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, operator.run, key)
    qualified = f"dmd2_fast::{name}"
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    if "!" not in schema:  # the dispatcher takes no autograd formula for an operator that writes into an argument
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=LIBRARY)
    operator.overload = getattr(torch.ops.dmd2_fast, name).default
    return operator


def _refuse(name: str, *_: Any) -> None:
    raise RuntimeError(
        f"{name} is not differentiable: where a second derivative is needed (exact R1), build that part of the network "
        "from PyTorch's own operators"
    )


class use_backend:  # noqa: N801 - reads as a function, like torch.no_grad
    """Choose the backend: `use_backend("cpp")` from here on, `with use_backend("cpp"):` for a block.

    name: "auto" (cpp for CPU tensors, triton for CUDA tensors, reference where they lack the operator), "reference",
    "cpp" or "triton"; "triton" hands CPU tensors to the Triton kernels too, for TRITON_INTERPRET=1. The choice holds
    for the process and at call time: a backward pass outside the block runs on the choice that holds there.

    Raises ValueError for another name, RuntimeError for a backend that is not installed, with the way to get it.
    """

    def __init__(self, name: str) -> None:
        global _requested
        if name not in ("auto", *BACKENDS):
            raise ValueError(f'use_backend: got {name!r}, expected "auto", "reference", "cpp" or "triton"')
        if name != "auto" and (reason := missing(name)):
            raise RuntimeError(f"use_backend({name!r}): {reason}")
        self._previous = _requested
        _requested = name

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _requested
        _requested = self._previous


def backends() -> dict[str, dict[str, Choice]]:
    """What each operator runs on now: {operator: {"cpu": Choice, "cuda": Choice}}, Choice = (backend, reason).

    Operators named *_backward compute the gradients. f64 tensors run on the reference whatever stands here.
    """
    return {
        name: {device: _choose(name, device, _requested)[0] for device in ("cpu", "cuda")} for name in sorted(OPERATORS)
    }
