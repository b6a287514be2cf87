"""FastGen's losses and schedule methods on our operators: values, gradients, dtypes, errors; swapped in and back out.

The truth is the papers' formulas, written here, in float64; the yardstick is what plain PyTorch makes of them in the
tested dtype (tests/fastgen_stand_in, a package of FastGen's module names and signatures).
"""

from __future__ import annotations

import abc
import contextlib
import doctest
import importlib
import inspect
import runpy
import sys
from collections import Counter
from types import ModuleType

import pytest
import torch
from oracles import assert_twice, random_tensor
from tiny import ROOT
from torch import Tensor

from dmd2_fast.compat import fastgen as compat
from dmd2_fast.errors import UserError

STAND_IN = ROOT / "tests" / "fastgen_stand_in"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = ((3, 5), (2, 3, 7), (2, 3, 5, 4), (2, 3, 4, 5, 2))
PRED_TYPES = ("x0", "eps", "v", "flow")
IMPORTERS = compat.IMPORTERS
T64 = {"dtype": torch.float64}


@pytest.fixture
def fastgen(monkeypatch):
    """The stand-in, imported afresh; whatever a test leaves swapped goes with it."""

    def forget() -> None:
        for name in [name for name in sys.modules if f"{name}.".startswith("fastgen.")]:
            del sys.modules[name]

    forget()
    monkeypatch.syspath_prepend(STAND_IN)
    yield importlib.import_module("fastgen")
    compat.undo()
    forget()


@pytest.fixture
def losses(fastgen):
    return importlib.import_module("fastgen.methods.common_loss")


@pytest.fixture
def schedules(fastgen):
    return importlib.import_module("fastgen.networks.noise_schedule")


def draw(shape, dtype, seed: int, layout: str = "contiguous") -> Tensor:
    return random_tensor(shape, dtype, seed, layout if len(shape) == 4 or layout == "strided" else "contiguous")


def times(*shape: int) -> Tensor:
    """float64 times well inside the schedule."""
    generator = torch.Generator().manual_seed(5)
    return (0.1 + 0.8 * torch.rand(shape, generator=generator, device="cpu", **T64)).to(torch.get_default_device())


def values_and_grads(function, inputs, *others, **named):
    """(result, gradients in the inputs or None), the result weighted by fixed random numbers."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    result = function(*inputs, *others, **named)
    weight = random_tensor(result.shape, torch.float32, 99).to(torch.bfloat16).to(result.dtype)
    return result.detach(), torch.autograd.grad(result, inputs, weight, allow_unused=True)


def check(ours, plain, exact, inputs, dtype) -> None:
    """Values and gradients of ours(*inputs) by the twice-PyTorch rule, dtypes as plain PyTorch has them."""
    result, grads = values_and_grads(ours, inputs)
    plain_result, plain_grads = values_and_grads(plain, inputs)
    exact_result, exact_grads = values_and_grads(exact, [tensor.double() for tensor in inputs])
    assert result.dtype == plain_result.dtype == dtype and result.shape == exact_result.shape
    assert_twice(result, plain_result, exact_result, "value")
    for i, (grad, plain_grad, exact_grad) in enumerate(zip(grads, plain_grads, exact_grads, strict=True)):
        assert (grad is None) == (exact_grad is None), f"gradient {i}"
        if grad is not None:
            assert grad.dtype == inputs[i].dtype
            # Two roundings: of what the loss keeps in 16 bits, and of the gradient.
            assert_twice(grad, plain_grad, exact_grad, f"gradient {i}", num_roundings=2)


# --- losses -----------------------------------------------------------------------------------------------------------


def exact_target(pred_type: str, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Of the rectified flow: alpha = 1 - t, sigma = t."""
    t = t.reshape(-1, *[1] * (x0.ndim - 1))
    return {"x0": x0, "eps": eps, "v": (1 - t) * eps - t * x0, "flow": eps - x0}[pred_type]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pred_type", PRED_TYPES)
def test_denoising_score_matching_loss(losses, schedules, pred_type, dtype):
    schedule = schedules.RFNoiseSchedule()
    for shape, layout in zip(SHAPES, ("strided", "contiguous", "channels_last", "strided"), strict=True):
        net_pred, x0, eps = (draw(shape, dtype, seed, layout) for seed in (1, 2, 3))
        t = times(shape[0])
        given = {"x0": x0, "eps": eps, "noise_scheduler": schedule, "t": t}
        check(
            lambda net_pred, given=given: compat.denoising_score_matching_loss(pred_type, net_pred, **given),
            lambda net_pred, given=given: losses.denoising_score_matching_loss(pred_type, net_pred, **given),
            lambda net_pred, x0=x0, eps=eps, t=t: (
                (net_pred - exact_target(pred_type, x0.double(), eps.double(), t)).square().mean()
            ),
            [net_pred],
            dtype,
        )


def test_denoising_score_matching_loss_needs_only_its_arguments():
    net_pred, x0, eps = (draw((2, 3), torch.float32, seed).requires_grad_() for seed in (1, 2, 3))
    loss = compat.denoising_score_matching_loss("x0", net_pred, x0=x0)
    loss = loss + compat.denoising_score_matching_loss("eps", net_pred, eps=eps)
    loss = loss + compat.denoising_score_matching_loss("flow", net_pred, x0, eps)
    loss.backward()
    assert x0.grad is None and eps.grad is None and net_pred.grad is not None


def test_targets_are_constants(schedules):
    """Where net_pred or gen_data has no graph, neither has the loss, whatever has one beside it."""
    plain, (x0, eps, scale) = torch.ones(2, 3), torch.rand(3, 2, 3).requires_grad_().unbind()
    given = {"x0": x0, "eps": eps, "noise_scheduler": schedules.RFNoiseSchedule(), "t": torch.rand(2, **T64)}
    losses = [compat.denoising_score_matching_loss(pred_type, plain, **given) for pred_type in PRED_TYPES]
    losses.append(compat.variational_score_distillation_loss(plain, x0, eps, scale[:, 0]))
    assert not any(loss.requires_grad for loss in losses)


@pytest.mark.parametrize("missing", ["x0", "eps", "noise_scheduler", "t"])
@pytest.mark.parametrize("pred_type", PRED_TYPES)
def test_denoising_score_matching_loss_missing_arguments(losses, schedules, pred_type, missing):
    x = torch.zeros(2, 3)
    given = {"x0": x, "eps": x, "noise_scheduler": schedules.RFNoiseSchedule(), "t": torch.ones(2, **T64)}
    del given[missing]
    outcomes = []
    for function in (losses.denoising_score_matching_loss, compat.denoising_score_matching_loss):
        try:
            outcomes.append(function(pred_type, x + 1, **given).shape)
        except AssertionError:
            outcomes.append("AssertionError")
    assert outcomes[0] == outcomes[1]


def test_denoising_score_matching_loss_refuses_other_types():
    with pytest.raises(NotImplementedError, match="'epsilon', expected one of x0, eps, v, flow"):
        compat.denoising_score_matching_loss("epsilon", torch.zeros(2, 3), eps=torch.zeros(2, 3))


def exact_vsd(gen: Tensor, teacher: Tensor, fake: Tensor, scale: Tensor | None) -> Tensor:
    """Half the mean of G^2 with gradient G / numel, sample by sample: DMD's equations 7 and 8."""
    total = gen.new_zeros(())
    for i in range(len(gen)):
        weight = 1 / ((gen[i] - teacher[i]).abs().mean() + 1e-6)
        G = (fake[i] - teacher[i]) * weight.detach() * (1 if scale is None else scale.flatten()[i])
        total = total + 0.5 * (G**2).sum().detach() + (G * (gen[i] - gen[i].detach())).sum()
    return total / gen.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_variational_score_distillation_loss(losses, dtype, scaled):
    for shape, layout in zip(SHAPES, ("strided", "contiguous", "channels_last", "strided"), strict=True):
        gen, teacher, fake = (draw(shape, dtype, seed, layout) for seed in (1, 2, 3))
        scale = torch.rand(shape[0], generator=torch.Generator().manual_seed(4)) + 0.5 if scaled else None
        check(
            lambda gen, teacher=teacher, fake=fake, scale=scale: compat.variational_score_distillation_loss(
                gen, teacher, fake, scale
            ),
            lambda gen, teacher=teacher, fake=fake, scale=scale: losses.variational_score_distillation_loss(
                gen, teacher, fake, scale
            ),
            lambda gen, teacher=teacher, fake=fake, scale=scale: exact_vsd(
                gen, teacher.double(), fake.double(), None if scale is None else scale.double()
            ),
            [gen],
            dtype,
        )


def test_the_gradient_survives_a_small_difference(losses):
    """Where fake and teacher are close, the target in bf16 is gen itself to a rounding; ours has the gradient."""
    gen, teacher, noise = (draw((2, 3, 8, 8), torch.bfloat16, seed) for seed in (1, 2, 3))
    fake = teacher + 0.01 * noise
    _, (exact,) = values_and_grads(exact_vsd, [gen.double()], teacher.double(), fake.double(), None)
    _, (ours,) = values_and_grads(compat.variational_score_distillation_loss, [gen], teacher, fake)
    _, (plain,) = values_and_grads(losses.variational_score_distillation_loss, [gen], teacher, fake)
    errors = [((grad.double() - exact).norm() / exact.norm()).item() for grad in (ours, plain)]
    assert errors[0] < 0.01 and errors[1] > 0.1, errors


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 1, 1, 1), (1,), ()])
def test_additional_scale_shapes(shape):
    gen, teacher, fake = (draw((3, 2, 4, 4), torch.float32, seed) for seed in (1, 2, 3))
    scale = torch.full(shape, 2.0, dtype=torch.float64, requires_grad=True)
    plain, scaled = (compat.variational_score_distillation_loss(gen, teacher, fake, s) for s in (None, scale))
    torch.testing.assert_close(scaled, 4 * plain)
    assert not scaled.requires_grad
    with pytest.raises(RuntimeError, match="size"):
        compat.variational_score_distillation_loss(gen, teacher, fake, torch.ones(2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gan_losses(losses, dtype):
    fake, real = draw((5, 3), dtype, 1, "strided") * 4, draw((4, 2), dtype, 2) * 4
    check(
        compat.gan_loss_generator,
        losses.gan_loss_generator,
        lambda fake: -torch.log(torch.sigmoid(fake)).mean(),
        [fake],
        dtype,
    )
    check(
        compat.gan_loss_discriminator,
        losses.gan_loss_discriminator,
        lambda real, fake: -torch.log(torch.sigmoid(real)).mean() - torch.log(1 - torch.sigmoid(fake)).mean(),
        [real, fake],
        dtype,
    )


@pytest.mark.parametrize("shape", [(), (3,), (3, 1, 1)])
def test_gan_losses_of_other_ranks(shape):
    wrong, right = torch.zeros(shape), torch.zeros(3, 1)
    with pytest.raises(AssertionError, match="fake_logits: got shape"):
        compat.gan_loss_generator(wrong)
    with pytest.raises(AssertionError, match="fake_logits: got shape"):
        compat.gan_loss_discriminator(right, wrong)
    with pytest.raises(AssertionError, match="real_logits: got shape"):
        compat.gan_loss_discriminator(wrong, right)


def calls_of_losses(module, a: Tensor, b: Tensor, c: Tensor):
    """Every loss on (N, M) tensors of three dtypes."""
    yield module.denoising_score_matching_loss("x0", a, x0=b)
    yield module.denoising_score_matching_loss("eps", a, eps=c)
    yield module.denoising_score_matching_loss("flow", a, x0=b, eps=c)
    yield module.variational_score_distillation_loss(a, b, c)
    yield module.gan_loss_discriminator(a, b)
    yield module.gan_loss_generator(c)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mixed", [DTYPES[:3], DTYPES[1:], DTYPES[:0:-1], [torch.bfloat16] * 3])
def test_losses_of_mixed_dtypes(losses, mixed, autocast):
    tensors = [draw((4, 3), dtype, seed) for seed, dtype in enumerate(mixed)]
    with torch.autocast("cpu", enabled=autocast):
        for ours, plain in zip(calls_of_losses(compat, *tensors), calls_of_losses(losses, *tensors), strict=True):
            assert ours.dtype == plain.dtype
            torch.testing.assert_close(ours, plain, rtol=0.02, atol=0.01)


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_losses_broadcast_and_fail_as_pytorch_does(losses):
    x, one, wrong = draw((3, 4), torch.float32, 1), draw((1, 4), torch.float32, 2), torch.zeros(2, 4)
    for module in (losses, compat):
        with pytest.raises(RuntimeError, match="size"):
            module.denoising_score_matching_loss("x0", x, x0=wrong)
        with pytest.raises(RuntimeError, match="size"):
            module.variational_score_distillation_loss(x, wrong, wrong)
    for ours, plain in zip(*(list(calls_of_losses(module, x, one, x)) for module in (compat, losses)), strict=True):
        torch.testing.assert_close(ours, plain)


# --- schedules --------------------------------------------------------------------------------------------------------


def exact_coefficients(name: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of the three schedules, in float64."""
    if name == "sd":
        roots = [0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5) for i in range(1000)]
        kept = torch.tensor([1 - root**2 for root in roots], **T64).cumprod(0)[(t * 999).round().long()]
        return kept.sqrt(), (1 - kept).sqrt()
    return (1 - t, t) if name == "rf" else (torch.ones_like(t), t)


def exact_methods(alpha: Tensor, sigma: Tensor):
    return {
        "forward_process": lambda x, eps: alpha * x + sigma * eps,
        "eps_to_x0": lambda xt, eps: (xt - sigma * eps) / alpha,
        "x0_to_eps": lambda xt, x0: (xt - alpha * x0) / sigma,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", compat.METHODS)
@pytest.mark.parametrize("name", ["edm", "sd", "rf"])
def test_schedule_methods(schedules, name, method, dtype):
    schedule = schedules.get_noise_schedule(name)
    for shape, layout in zip(SHAPES, ("strided", "contiguous", "channels_last", "strided"), strict=True):
        t = times(shape[0])
        alpha, sigma = (c.reshape(-1, *[1] * (len(shape) - 1)) for c in exact_coefficients(name, t))
        check(
            lambda a, b, t=t: getattr(compat, method)(schedule, a, b, t),
            lambda a, b, t=t: getattr(schedule, method)(a, b, t),
            exact_methods(alpha, sigma)[method],
            [draw(shape, dtype, 1, layout), draw(shape, dtype, 2, layout)],
            dtype,
        )


VIDEO, SQUARE = (2, 3, 4, 5, 2), (2, 3, 3, 2, 2)
TIMES = (  # shape of the images, shape of t, how it broadcasts, whether operators compute it
    (VIDEO, (), (1, 1, 1, 1, 1), True),
    (VIDEO, (1,), (1, 1, 1, 1, 1), True),
    (VIDEO, (2,), (2, 1, 1, 1, 1), True),
    (VIDEO, (2, 1, 1, 1, 1), (2, 1, 1, 1, 1), True),
    (VIDEO, (2, 3), (2, 3, 1, 1, 1), True),
    (VIDEO, (2, 3, 4), (2, 3, 4, 1, 1), True),
    (VIDEO, (2, 4), (2, 1, 4, 1, 1), False),
    (VIDEO, (2, 1, 4, 1, 1), (2, 1, 4, 1, 1), False),
    (VIDEO, (1, 1, 4), (1, 1, 4, 1, 1), False),
    (SQUARE, (2, 3), (2, 3, 1, 1, 1), True),
    ((1, 3, 4), (1,), (1, 1, 1), True),
    ((0, 3), (0,), (0, 1), True),
    ((), (), (), False),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", compat.METHODS)
def test_times_of_every_shape(schedules, method, dtype, monkeypatch):
    """One time, times of samples, of frames first, of frames of a video, of positions: as they broadcast."""
    schedule, name = schedules.RFNoiseSchedule(), "add_noise" if method == "forward_process" else "predict_x0"
    operator, used = getattr(compat, name), []
    monkeypatch.setattr(compat, name, lambda *args, **named: used.append(1) or operator(*args, **named))
    for shape, t_shape, broadcast, is_operator in TIMES:
        x, y, t = draw(shape, dtype, 1), draw(shape, dtype, 2), times(*t_shape)
        exact = exact_methods(1 - t.reshape(broadcast), t.reshape(broadcast))[method]
        used.clear()
        result = getattr(compat, method)(schedule, x, y, t)
        assert bool(used) == is_operator and result.shape == shape, t_shape
        _, grads = values_and_grads(lambda a, b, t=t: getattr(compat, method)(schedule, a, b, t), (x, y))
        _, exact_grads = values_and_grads(exact, (x.double(), y.double()))
        for ours, truth in zip((result, *grads), (exact(x.double(), y.double()), *exact_grads), strict=True):
            if ours.numel():
                assert_twice(ours, truth.to(dtype), truth, f"t {t_shape}")
        if method == "forward_process" and result.numel() > 1:
            loss = compat.denoising_score_matching_loss("v", x, x0=y, eps=x, noise_scheduler=schedule, t=t)
            time, (pred, x0) = t.reshape(broadcast), (x.double(), y.double())
            exact_loss = (pred - (1 - time) * pred + time * x0).square().mean()
            assert_twice(loss, exact_loss.to(dtype), exact_loss, f"velocity, t {t_shape}")


@pytest.mark.parametrize("method", compat.METHODS)
def test_images_broadcast_and_fail_as_pytorch_does(schedules, method):
    schedule, t, x = schedules.RFNoiseSchedule(), times(3), draw((3, 4), torch.float32, 1)
    for other in (draw((1, 4), torch.float32, 2), draw((4,), torch.float32, 2)):
        ours, plain = (function(x, other, t) for function in (bound(method, schedule), getattr(schedule, method)))
        torch.testing.assert_close(ours, plain)
    with pytest.raises(RuntimeError, match="size"):
        bound(method, schedule)(x, draw((2, 4), torch.float32, 2), t)
    with pytest.raises(RuntimeError, match="size"):
        bound(method, schedule)(x, x, times(2))


def bound(method: str, schedule):
    """Ours as a method of the schedule."""
    return getattr(compat, method).__get__(schedule)


def test_pure_noise_and_data_stay_finite(schedules):
    """Divisors are held at clamp_min, where the schedule has one."""
    schedule, x, y = schedules.RFNoiseSchedule(), draw((2, 3), torch.float32, 1), draw((2, 3), torch.float32, 2)
    for method, t in (("eps_to_x0", torch.ones(2, **T64)), ("x0_to_eps", torch.zeros(2, **T64))):
        torch.testing.assert_close(getattr(compat, method)(schedule, x, y, t), getattr(schedule, method)(x, y, t))
    del schedules.BaseNoiseSchedule.clamp_min
    assert not compat.eps_to_x0(schedule, x, y, torch.ones(2, **T64)).isfinite().any()


@pytest.mark.parametrize("method", compat.METHODS)
def test_schedule_methods_of_mixed_dtypes(schedules, method):
    """The result has the first tensor's dtype, and float64 arithmetic where one is float64."""
    schedule = schedules.RFNoiseSchedule()
    t = times(2)
    for first in DTYPES:
        for second in DTYPES:
            a, b = draw((2, 3), first, 1), draw((2, 3), second, 2)
            result = getattr(compat, method)(schedule, a, b, t)
            exact = exact_methods(1 - t[:, None], t[:, None])[method](a.double(), b.double())
            assert result.dtype == first
            assert_twice(result, exact.to(first), exact)


@pytest.mark.parametrize("method", compat.METHODS)
def test_forward_mode_and_transforms(schedules, method):
    """jvp and dual numbers, as consistency models use them, where operators would give tangents of 0; vmap and grad."""
    schedule, x, y = schedules.RFNoiseSchedule(), draw((2, 3), torch.float32, 1), draw((2, 3), torch.float32, 2)
    t = times(2)
    function = getattr(compat, method)
    expected = exact_methods(1 - t[:, None], t[:, None])[method](torch.ones_like(x), torch.zeros_like(y))
    _, tangent = torch.func.jvp(lambda x: function(schedule, x, y, t), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, expected, check_dtype=False)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(function(schedule, dual, y, t)).tangent
    torch.testing.assert_close(tangent, expected, check_dtype=False)
    batched = torch.func.vmap(lambda x: function(schedule, x, y, t))(torch.stack([x, x + 1]))
    torch.testing.assert_close(batched[1], function(schedule, x + 1, y, t))
    gradient = torch.func.grad(lambda x: function(schedule, x, y, t).sum())(x)
    torch.testing.assert_close(gradient, expected, check_dtype=False)


def test_compiles_whole(schedules):
    schedule, t = schedules.RFNoiseSchedule(), torch.tensor([0.2, 0.7], **T64)
    x, y = draw((2, 3, 4, 4), torch.bfloat16, 1), draw((2, 3, 4, 4), torch.bfloat16, 2)

    def step(x, y, t):
        x_t = compat.forward_process(schedule, x, y, t)
        return compat.variational_score_distillation_loss(x, compat.eps_to_x0(schedule, x_t, y, t), x_t)

    targets: list[str] = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x, y, t), step(x, y, t))
    for name in ("add_noise", "predict_x0", "dmd_loss"):
        assert f"dmd2_fast.{name}.default" in targets


# --- apply and undo ---------------------------------------------------------------------------------------------------


def held(package: str = "fastgen") -> dict[str, object]:
    """Everything that modules and schedule classes of the package hold, by place."""
    places = {}
    for path, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and f"{path}.".startswith(f"{package}."):
            for name, value in vars(module).items():
                places[f"{path}.{name}"] = value
                if isinstance(value, type):
                    places |= {f"{path}.{name}.{attribute}": v for attribute, v in vars(value).items()}
    return places


def changed(before: dict[str, object], after: dict[str, object]) -> set[str]:
    return {place for place in before if after[place] is not before[place]}


def import_stand_in() -> None:
    for name in IMPORTERS:
        importlib.import_module(f"fastgen.methods.distribution_matching.{name}")
    importlib.import_module("fastgen.networks.noise_schedule")


SWAPPED = {
    *(f"methods.common_loss.{name}" for name in compat.LOSSES),
    *(f"methods.distribution_matching.dmd2.{name}" for name in compat.LOSSES),
    "methods.distribution_matching.f_distill.variational_score_distillation_loss",
    "methods.distribution_matching.f_distill.gan_loss_generator",
    "methods.distribution_matching.ladd.gan_loss_generator",
    "methods.distribution_matching.ladd.gan_loss_discriminator",
    "methods.distribution_matching.causvid.dsm",
    "methods.distribution_matching.self_forcing.variational_score_distillation_loss",
    *(f"networks.noise_schedule.BaseNoiseSchedule.{name}" for name in compat.METHODS),
    "networks.noise_schedule.RFNoiseSchedule.forward_process",
}


def test_apply_swaps_and_undo_restores(fastgen):
    import_stand_in()
    before = held()
    report = compat.apply()
    places = {f"fastgen.{place}" for place in SWAPPED}
    assert changed(before, held()) == places == set(report.swapped) and not report.left
    assert all(f"swapped  {place}" in str(report) for place in places)
    for place in places:
        original, ours = before[place], held()[place]
        assert ours is getattr(compat, original.__name__)
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(original).parameters)
    again = compat.apply()
    assert again == report and changed(before, held()) == places
    compat.undo()
    assert not changed(before, held())
    compat.undo()
    assert not changed(before, held())


def test_modules_imported_in_between_are_restored(fastgen, losses, monkeypatch):
    originals = {name: getattr(losses, name) for name in compat.LOSSES}
    monkeypatch.setattr(compat, "IMPORTERS", ())
    assert not any("distribution_matching" in place for place in compat.apply().swapped)
    import_stand_in()
    dmd2 = sys.modules["fastgen.methods.distribution_matching.dmd2"]
    assert all(getattr(dmd2, name) is getattr(compat, name) for name in compat.LOSSES)
    assert len(compat.apply().swapped) == len(SWAPPED)
    compat.undo()
    assert all(getattr(dmd2, name) is original for name, original in originals.items())


def test_already_imported_modules_and_aliases(fastgen, losses):
    """Any module of the package that holds the object, under any name; a function of the same name is another's."""
    original = losses.gan_loss_generator
    other = ModuleType("fastgen.trainer")
    other.alias, other.gan_loss_discriminator = original, lambda real, fake: None
    own = other.gan_loss_discriminator
    sys.modules["fastgen.trainer"] = other
    stranger = sys.modules["fastgenerator"] = ModuleType("fastgenerator")
    stranger.gan_loss_generator = original
    try:
        compat.apply()
        assert other.alias is compat.gan_loss_generator and other.gan_loss_discriminator is own
        assert stranger.gan_loss_generator is original
        compat.undo()
        assert other.alias is original
    finally:
        del sys.modules["fastgenerator"]


def test_undo_leaves_what_others_put_there(fastgen, losses, schedules):
    def own(*args):
        return args

    compat.apply()
    losses.gan_loss_generator = schedules.RFNoiseSchedule.forward_process = own
    compat.undo()
    assert losses.gan_loss_generator is own and schedules.RFNoiseSchedule.forward_process is own


def test_what_does_not_fit_is_left_and_reported(fastgen, losses, schedules, monkeypatch):
    def gan_loss_generator(fake_logits, weight):
        return weight

    class Swapped(schedules.BaseNoiseSchedule):
        def forward_process(self, x, t, eps):
            return x

        x0_to_eps = staticmethod(lambda self, xt, x0, t: x0)

        @abc.abstractmethod
        def eps_to_x0(self, xt, eps, t): ...

    losses.gan_loss_generator = gan_loss_generator
    del losses.gan_loss_discriminator
    schedules.Swapped = Swapped
    before = dict(vars(Swapped))
    monkeypatch.setitem(sys.modules, "fastgen.methods.distribution_matching.ladd", None)
    report = compat.apply()
    prefix = f"{Swapped.__module__}.{Swapped.__qualname__}"
    assert report.left["fastgen.methods.common_loss.gan_loss_generator"] == (
        "takes (fake_logits, weight), ours (fake_logits)"
    )
    assert report.left["fastgen.methods.common_loss.gan_loss_discriminator"] == "there is none"
    assert report.left[f"{prefix}.forward_process"] == "takes (self, x, t, eps), ours (self, x, eps, t)"
    assert report.left[f"{prefix}.x0_to_eps"] == report.left[f"{prefix}.eps_to_x0"] == "not a plain function"
    for name in ("dmd2", "ladd", "causvid", "self_forcing"):  # they import what is gone, or are not there
        assert report.left[f"fastgen.methods.distribution_matching.{name}"].startswith("does not import: ")
    assert "fastgen.methods.distribution_matching.f_distill" not in report.left
    assert losses.gan_loss_generator is gan_loss_generator and dict(vars(Swapped)) == before
    assert "fastgen.networks.noise_schedule.BaseNoiseSchedule.forward_process" in report.swapped
    assert f"left     {prefix}.x0_to_eps: not a plain function" in str(report)


def test_applied_is_a_block(fastgen, losses):
    original = losses.gan_loss_generator
    with compat.applied() as report:
        assert losses.gan_loss_generator is compat.gan_loss_generator and report.swapped
        with compat.applied():
            pass
        assert losses.gan_loss_generator is compat.gan_loss_generator
    assert losses.gan_loss_generator is original
    with pytest.raises(ZeroDivisionError), compat.applied():
        _ = 1 / 0
    assert losses.gan_loss_generator is original


def test_no_fastgen(monkeypatch):
    with pytest.raises(UserError, match=r"no_such_fastgen cannot be used: .*pip install git\+https://") as caught:
        compat.apply("no_such_fastgen")
    assert isinstance(caught.value, ImportError)
    monkeypatch.setitem(sys.modules, "fastgen", ModuleType("fastgen"))  # the one on PyPI
    with pytest.raises(compat.FastGenNotFoundError, match="on PyPI is another project"):
        compat.apply()

    def fail(name):
        raise ImportError("cannot import name 'this' from 'that'")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(compat.FastGenNotFoundError, match="cannot be used: cannot import name 'this' from 'that'"):
        compat.apply()


@contextlib.contextmanager
def counted(functions):
    """Counter of the calls of plain functions, by name, while it is open."""
    codes = {function.__code__: function.__name__ for function in functions}
    count: Counter[str] = Counter()

    def profile(frame, event, argument):
        if event == "call" and frame.f_code in codes:
            count[codes[frame.f_code]] += 1

    sys.setprofile(profile)
    try:
        yield count
    finally:
        sys.setprofile(None)


def run_methods(dtype=torch.float32) -> list[Tensor]:
    """Losses and gradients of what the method modules of the stand-in do."""
    modules = {name: importlib.import_module(f"fastgen.methods.distribution_matching.{name}") for name in IMPORTERS}
    schedule = importlib.import_module("fastgen.networks.noise_schedule").RFNoiseSchedule()
    x, real, eps = (draw((3, 2, 4, 4), dtype, seed).requires_grad_() for seed in (1, 2, 3))
    t = times(3)
    scale, bias = torch.tensor(0.8, requires_grad=True), torch.tensor(0.3, requires_grad=True)

    def teacher(x_t):
        return x_t * 0.9

    def fake_score(x_t):
        return x_t * scale + 0.1

    def head(x_t):
        return x_t.flatten(2).mean(2) * 3 + bias

    model = modules["dmd2"].DMD2Model(schedule)
    total = model.student_update(x, eps.detach(), t, teacher, fake_score, head)
    total = total + model.fake_score_update(x.detach(), real.detach(), eps.detach(), t, fake_score, head)
    total = total + modules["f_distill"].student_update(x, real.detach(), eps.detach(), head(x)[:, :1])
    total = total + modules["ladd"].losses(head(real), head(x))
    frames = model.noise_scheduler.column(times(3, 2), x)
    total = total + modules["causvid"].CausVidModel(schedule).velocity_loss(x * scale, real.detach(), eps, frames)
    total = total + modules["self_forcing"].SelfForcingModel(schedule).student_loss(x, real.detach(), eps.detach())
    return [total.detach(), *torch.autograd.grad(total, [x, real, scale, bias])]


def test_every_swapped_function_is_reached(fastgen, backend):
    expected = run_methods()
    ours = [getattr(compat, name) for name in (*compat.LOSSES, *compat.METHODS)]
    with counted(ours) as count:
        run_methods()
    assert not count
    with compat.applied(), counted(ours) as count:
        results = run_methods()
    assert set(count) == {*compat.LOSSES, *compat.METHODS}
    for result, plain in zip(results, expected, strict=True):
        torch.testing.assert_close(result, plain, rtol=1e-5, atol=1e-6)


# --- example and documentation ----------------------------------------------------------------------------------------


def run_example(capsys) -> tuple[int, list[str], list[str]]:
    """Exit code and the lines on stdout and stderr."""
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / "examples" / "fastgen_swap.py"), run_name="__main__")
    out, err = capsys.readouterr()
    return exit.value.code, out.splitlines(), err.splitlines()


def test_example(fastgen, capsys):
    code, out, err = run_example(capsys)
    assert code == 0 and not err
    assert {line.split()[1] for line in out[:-1]} == {f"fastgen.{place}" for place in SWAPPED}
    assert out[-1].startswith("largest relative difference") and 0 < float(out[-1].split()[-1]) < 1e-5


def test_example_without_fastgen(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastgen", None)
    code, out, err = run_example(capsys)
    assert code == 2 and not out
    assert len(err) == 1 and "pip install git+https://github.com/NVlabs/FastGen" in err[0]


def test_documented_lines_run(fastgen):
    text = (ROOT / "docs" / "drop_in.md").read_text()
    section = text.split("## FastGen\n")[1].split("\n## ")[0]
    test = doctest.DocTestParser().get_doctest(section, {}, "FastGen", "docs/drop_in.md", 0)
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0
