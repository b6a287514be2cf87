"""A loss with exact R1 through a whole fake score, and its gradients: in plain PyTorch, and as an engine gives them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tiny import NETWORK, random_batch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dmd2_fast.denoiser import Denoiser
from dmd2_fast.engine import make_engine
from dmd2_fast.fake_score import FakeScore
from dmd2_fast.heads import GANHeads
from dmd2_fast.networks.unet2d import UNet2D
from dmd2_fast.schedules import make_schedule

NUM = 8


class Penalised(nn.Module):
    """A fake score whose forward ends with the squared gradient of its logits with respect to their input, (N,).

    Inside of the forward: on an engine's outputs lie the hooks by which DeepSpeed notices its backward.
    """

    def __init__(self, fake_score: FakeScore):
        super().__init__()
        self.fake_score = fake_score

    def forward(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        x_t = x_t.detach().requires_grad_(True)
        prediction, logits, _ = self.fake_score(x_t, t, condition)
        (slope,) = torch.autograd.grad(logits.sum(), x_t, create_graph=True)
        return prediction, logits, slope.flatten(1).square().sum(1)


def network() -> Penalised:
    """Attention in its middle, PyTorch's own operators, the head on its features."""
    torch.manual_seed(0)
    settings = {**NETWORK, "add_attention": True, "attention_head_dim": 8}
    denoiser = Denoiser(UNet2D.from_config(settings, patch_size=2), make_schedule("karras"), "sample", "edm").eval()
    heads = GANHeads((denoiser.network.feature_shape("mid"),))
    return Penalised(FakeScore(denoiser, heads, ("mid",)))


def batch(part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(x_t, t, condition) of one of equal parts of eight samples."""
    whole, t = random_batch(NUM), torch.linspace(2, 6, NUM)
    labels = whole.condition["class_labels"].chunk(parts)[part]
    return whole.x0.chunk(parts)[part], t.chunk(parts)[part], {"class_labels": labels}


def loss(prediction: Tensor, logits: Tensor, squared_slope: Tensor) -> Tensor:
    return prediction.square().mean() + F.softplus(-logits).mean() + 0.5 * squared_slope.mean()


def plain_gradients(penalty: bool = True) -> dict[str, Tensor]:
    """Of the whole batch's loss; without the penalty's, to see that it counts."""
    model = network()
    with sdpa_kernel(SDPBackend.MATH):
        prediction, logits, squared = model(*batch())
        loss(prediction, logits, squared * penalty).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def engine_gradients(config, rank: int, world_size: int) -> list[dict[str, Tensor]]:
    """Of two updates that leave the weights as they are, each over this rank's part in the config's micro-batches."""
    from deepspeed.utils import safe_get_full_grad

    model, steps, found = network(), config.gradient_accumulation_steps, []
    engine = make_engine(config, model, config.fake_score)
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    for _ in range(2):
        for i in range(steps):
            with sdpa_kernel(SDPBackend.MATH):
                engine.backward(loss(*engine(*batch(rank * steps + i, world_size * steps))))
            if engine.is_gradient_accumulation_boundary():
                found.append({name: safe_get_full_grad(p).clone() for name, p in model.named_parameters()})
            engine.step()
    return found
