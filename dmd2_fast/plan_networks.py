"""The networks of a configuration on the meta device: real modules without memory, for the plan to run."""

from __future__ import annotations

import copy
from typing import Any

import torch

from .config import Config, ModelConfig
from .config_deepspeed import is_bf16
from .denoiser import Denoiser
from .distillation import Algorithm, FakeScore
from .errors import UserError
from .heads import GANHeads
from .networks import build_without_weights, prepare_network
from .networks.source import PIPELINE_KINDS, is_hub_id, open_source
from .plan_counts import PROMPT_LENGTH, MetaNetworks
from .plan_ledger import META

_SD: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "stabilityai/stable-diffusion-xl-base-1.0": {
        **_SD,
        "sample_size": 128,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {
        **_SD,
        "sample_size": 64,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
}
"""Published UNets by hub id: for a plan where the hub cannot be reached and its cache has nothing."""


def settings_of(model: ModelConfig) -> tuple[dict[str, Any], str]:
    """What `build_denoiser` takes, and where it is from. `UserError` when nothing says what the network is."""
    if model.kind in PIPELINE_KINDS and is_hub_id(model.path):
        cached = _cached(model.path)
        if cached is None and model.path in PUBLISHED:
            network: dict[str, Any] = {"kind": "unet2d_condition", "config": PUBLISHED[model.path]}
            if model.sample_size is not None:
                network["sample_size"] = model.sample_size
            schedule = {"schedule": {"kind": "ddpm"}, "prediction_type": "epsilon", "preconditioning": "none"}
            return {"network": network, **schedule}, f"the table of published networks ({model.path} is not on disk)"
    return open_source(model).settings, model.path


def _cached(hub_id: str) -> str | None:
    """The file that says what a hub id's UNet is, where it has been fetched before. Nothing is fetched for a plan."""
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(hub_id, "unet/config.json")
    return found if isinstance(found, str) else None


def build_base(model: ModelConfig) -> tuple[Denoiser, str]:
    """The teacher's denoiser on meta, and where its settings are from."""
    settings, source = settings_of(model)
    return build_without_weights(settings).eval(), source


def build(config: Config, base: Denoiser) -> MetaNetworks:
    """Generator, fake score with its head and teacher as the trainer builds them, from copies of `base`."""
    algorithm = Algorithm.from_config(config)
    dtype = torch.bfloat16 if is_bf16(config.deepspeed) else torch.float32
    teacher = copy.deepcopy(base).to(dtype)
    prepare_network(teacher.network, config.model)
    if config.model.kind == "sd15" and teacher.network.null_prompt_embeds is None:
        width = teacher.network.unet.config.cross_attention_dim
        teacher.network.null_prompt_embeds = torch.empty(PROMPT_LENGTH, width, device=META)
    heads = None
    if algorithm.adversarial:
        try:
            with META:
                heads = GANHeads(tuple(teacher.network.feature_shape(level) for level in algorithm.levels)).to(dtype)
        except ValueError as error:
            raise UserError(f"adversarial.levels: {error}") from None
    if config.model.lora is not None:
        return _with_adapters(config, teacher, heads, algorithm)
    generator = copy.deepcopy(teacher)
    fake = copy.deepcopy(teacher) if algorithm.keeps_fake_score else None
    teacher.requires_grad_(False)
    fake_score = FakeScore(fake, heads, algorithm.own_levels)
    owners = {"generator": generator, "fake_score": fake_score, "teacher": teacher}
    parameters = {name: list(module.parameters()) for name, module in owners.items()}
    unets = [denoiser.network.unet for denoiser in (generator, fake, teacher) if denoiser is not None]
    return MetaNetworks(generator, fake_score, teacher, teacher, unets, owners, parameters)


def _with_adapters(config: Config, base: Denoiser, heads: GANHeads | None, algorithm: Algorithm) -> MetaNetworks:
    from .networks.lora import ADAPTERS, AdaptedDenoiser, SharedBase

    lora = config.model.lora
    assert lora is not None
    own = list(base.requires_grad_(False).parameters())
    kept = ADAPTERS if algorithm.keeps_fake_score else ADAPTERS[:1]
    shared, dtype = SharedBase(base, lora, kept), own[0].dtype
    with META:
        shared.inject()
    base.to(dtype)
    generator = AdaptedDenoiser(shared, "generator")
    fake = AdaptedDenoiser(shared, "fake_score") if algorithm.keeps_fake_score else None
    fake_score = FakeScore(fake, heads, algorithm.own_levels)

    def teacher(*arguments: Any, **options: Any) -> Any:
        return shared(None, *arguments, **options)

    parameters = {
        "generator": list(generator.parameters()), "fake_score": list(fake_score.parameters()),
        "teacher": own,
    }  # fmt: skip
    owners = {"generator": generator, "fake_score": fake_score, "teacher": base}
    return MetaNetworks(generator, fake_score, teacher, base, [base.network.unet], owners, parameters)
