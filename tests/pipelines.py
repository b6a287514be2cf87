"""Tiny real diffusers pipeline folders, shaped as SDXL's and SD1.5's, and folders of images with captions.

Everything is random and seeded: the same call writes the same tensors. The classes are diffusers' and transformers'
own; only widths are small.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

WORDS = ("photo", "of", "red", "green", "blue", "small", "cat", "dog", "house", "tree", "under", "the", "sky", "night")
CAPTIONS = ("a red cat", "a photo of the night sky", "small house under the tree", "blue dog, green house")
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
}
UNET_SDXL = {
    **UNET,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [16, 32, 32],
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [2, 2, 4],  # numbers of heads, as SDXL's own config has it
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
}
UNET_SD15 = {
    **UNET,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [16, 32, 32],
    "layers_per_block": 1,
    "attention_head_dim": 2,
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 32,
}
FACTOR = 2
"""Pixels a latent, each way."""


def make_pipeline(folder: str | Path, kind: str = "sdxl", *, sample_size: int = 16, seed: int = 0) -> Path:
    """Write a pipeline folder that StableDiffusionXLPipeline ("sdxl") or StableDiffusionPipeline ("sd15") loads.

    Latents are (4, sample_size, sample_size), images twice as wide; prompts take 77 tokens of width 32, pooled 16.
    """
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        EulerDiscreteScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )

    folder = Path(folder)
    sdxl = {"sdxl": True, "sd15": False}[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**{**(UNET_SDXL if sdxl else UNET_SD15), "sample_size": sample_size})
        scaling = {"scaling_factor": 0.13025, "force_upcast": True} if sdxl else {"scaling_factor": 0.18215}
        vae = AutoencoderKL(**VAE, **scaling)
        tokenizers = [make_tokenizer(folder / "tokenizer", "<|endoftext|>")]
        if sdxl:
            tokenizers.append(make_tokenizer(folder / "tokenizer_2", "!"))
        width = UNET["cross_attention_dim"] // len(tokenizers)
        encoders = [_text_encoder(len(tokenizer), width, second) for second, tokenizer in enumerate(tokenizers)]
    if sdxl:
        pipeline = StableDiffusionXLPipeline(
            vae, encoders[0], encoders[1], *tokenizers, unet, EulerDiscreteScheduler(**SCHEDULER),
            force_zeros_for_empty_prompt=True, add_watermarker=False,
        )  # fmt: skip
    else:
        scheduler = DDIMScheduler(**SCHEDULER, clip_sample=False, set_alpha_to_one=False)
        pipeline = StableDiffusionPipeline(
            vae, encoders[0], tokenizers[0], unet, scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def make_tokenizer(folder: Path, padding: str):
    """CLIP's byte-pair tokenizer over letters and the words of WORDS; SDXL's second one pads with "!"."""
    from transformers import CLIPTokenizer

    # CLIP writes the bytes as printable characters, "!" to "~" for themselves; others are not needed here.
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    vocabulary, merges = letters + [letter + "</w>" for letter in letters], []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair, parts = parts[:2], [parts[0] + parts[1], *parts[2:]]
            if parts[0] not in vocabulary:
                vocabulary.append(parts[0])
                merges.append(" ".join(pair))
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return CLIPTokenizer.from_pretrained(folder, pad_token=padding, model_max_length=77)


def _text_encoder(vocabulary: int, width: int, second: int):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=16,
        hidden_act="gelu" if second else "quick_gelu",
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=0 if second else vocabulary - 1,
    )
    return (CLIPTextModelWithProjection if second else CLIPTextModel)(config).eval()


def write_images(
    folder: str | Path, num: int = 6, size: tuple[int, int] = (40, 48), *, captions: str = "txt", seed: int = 0
) -> Path:
    """`num` smooth random images, PNG and JPEG in turn, of about (height, width) `size`, with captions.

    captions: "txt" (NAME.txt beside each image) or "jsonl" (metadata.jsonl, as Hugging Face's imagefolder has it).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = np.random.default_rng(seed), []
    for index in range(num):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        image = coarse.resize((size[1] + index, size[0]), Image.Resampling.BICUBIC)
        name, caption = f"image-{index:03d}.{'jpg' if index % 2 else 'png'}", CAPTIONS[index % len(CAPTIONS)]
        image.save(folder / name)
        if captions == "txt":
            (folder / name).with_suffix(".txt").write_text(caption + "\n")
        lines.append(json.dumps({"file_name": name, "text": caption}))
    if captions == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder
