"""Which AdamW is taken, on stand-ins for the compiled ones; all of them compute AdamW's formula."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from dmd2_fast import optimization
from dmd2_fast.config import OptimizerConfig
from dmd2_fast.optimization import make_optimizer, optimizer_name

CONFIG = OptimizerConfig(lr=1e-2, betas=(0.7, 0.9), eps=1e-6, weight_decay=0.3)


class FusedAdam(torch.optim.Optimizer):
    """The arguments, defaults and formula of apex's and DeepSpeed's class, written out."""

    def __init__(
        self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=False,
        weight_decay=0.0, amsgrad=False, set_grad_none=True,
    ):  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.decoupled, self.corrected, self.steps = adam_w_mode, bias_correction, 0

    @torch.no_grad()
    def step(self):
        self.steps += 1
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                m, v = self.state[p].setdefault("m", torch.zeros_like(p)), self.state[p].setdefault("v", p * 0)
                gradient = p.grad if self.decoupled else p.grad + group["weight_decay"] * p
                m.mul_(b1).add_((1 - b1) * gradient)
                v.mul_(b2).add_((1 - b2) * gradient**2)
                c1, c2 = (1 - b1**self.steps, 1 - b2**self.steps) if self.corrected else (1, 1)
                update = (m / c1) / ((v / c2).sqrt() + group["eps"])
                p.sub_(group["lr"] * (update + group["weight_decay"] * p * self.decoupled))


def modules(*, apex: bool, built: bool) -> dict[str, ModuleType | None]:
    def module(name: str, **values) -> ModuleType:
        made = ModuleType(name)
        made.__dict__.update(values)
        return made

    compiled = module("apex.optimizers", FusedAdam=type("FusedAdam", (FusedAdam,), {"__module__": "apex.optimizers"}))
    own = type("FusedAdam", (FusedAdam,), {"__module__": "deepspeed.ops.adam"})
    return {
        "amp_C": module("amp_C") if apex else None,
        "apex": module("apex") if apex else None,
        "apex.optimizers": compiled if apex else None,
        "deepspeed.git_version_info": module("deepspeed.git_version_info", installed_ops={"fused_adam": built}),
        "deepspeed.ops.adam": module("deepspeed.ops.adam", FusedAdam=own),
    }


def install(monkeypatch, **which):
    for name, module in modules(**which).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(optimization, "_is_cuda", lambda parameter: True)


@pytest.mark.parametrize(
    ("apex", "built", "expected"), [(True, True, "apex"), (False, True, "deepspeed"), (False, False, "torch")]
)
def test_choice_on_cuda(monkeypatch, apex, built, expected):
    """Never DeepSpeed's where it would have to be compiled, and torch's wherever the f32 weights are on the CPU."""
    install(monkeypatch, apex=apex, built=built)
    parameters = [torch.nn.Parameter(torch.zeros(5))]
    optimizer = make_optimizer(parameters, CONFIG)
    assert optimizer_name(optimizer) == f"AdamW by {expected}"
    if expected != "torch":
        assert optimizer.decoupled and optimizer.corrected
    assert optimizer_name(make_optimizer(parameters, CONFIG, on_cpu=True)) == "AdamW by torch"


def test_all_compute_the_same(monkeypatch):
    start = torch.randn(7, generator=torch.Generator().manual_seed(0))
    ours, stand_in = (torch.nn.Parameter(start.clone()) for _ in range(2))
    pair = [make_optimizer([ours], CONFIG)]
    install(monkeypatch, apex=True, built=False)
    pair.append(make_optimizer([stand_in], CONFIG))
    assert optimizer_name(pair[0]) == "AdamW by torch" and pair[0].defaults["fused"]
    assert isinstance(pair[1], FusedAdam)
    for step in range(4):
        for parameter, optimizer in zip((ours, stand_in), pair, strict=True):
            parameter.grad = torch.randn(7, generator=torch.Generator().manual_seed(step + 1))
            optimizer.step()
    assert (ours - start).abs().max() > 1e-2
    torch.testing.assert_close(ours, stand_in, rtol=1e-5, atol=1e-6)
