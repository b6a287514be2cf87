"""Distribution matching distillation (DMD2): fused operators, and a trainer on DeepSpeed built from them."""

from dmd2_fast.dispatch import backends, use_backend
from dmd2_fast.ops.denoising import denoising_loss
from dmd2_fast.ops.dmd import dmd_loss
from dmd2_fast.ops.gan import gan_discriminator_loss, gan_generator_loss, gan_head_loss
from dmd2_fast.ops.noise import add_noise, predict_x0, renoise
from dmd2_fast.ops.norm import group_norm_silu
from dmd2_fast.ops.r1 import r1_penalty, r1_perturb
from dmd2_fast.random import NoiseKey, philox_normal, philox_uniform

__version__ = "0.1.0"

__all__ = [
    "NoiseKey",
    "add_noise",
    "backends",
    "denoising_loss",
    "dmd_loss",
    "gan_discriminator_loss",
    "gan_generator_loss",
    "gan_head_loss",
    "group_norm_silu",
    "philox_normal",
    "philox_uniform",
    "predict_x0",
    "r1_penalty",
    "r1_perturb",
    "renoise",
    "use_backend",
]
