"""diffusers inference with the fused operators: the same pipeline, the same images, and how long each way takes.

    python examples/diffusers_inference.py [FOLDER] [--prompt "a photo of a cat"] [--steps 4] [--output images/]

FOLDER: a text-to-image pipeline that diffusers loads: SD1.5, SDXL, or what `dmd2-fast export --format diffusers --full`
wrote. Without one, a tiny pipeline of SD1.5's shape with random weights shows that all of it runs.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from dmd2_fast.compat.diffusers import fuse_scheduler, optimize_unet, restore_unet


def tiny_pipeline() -> tuple[Any, dict[str, Any]]:
    """SD1.5's shape with random weights, and random embeddings in place of a prompt: there is no text encoder."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
    )
    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4, sample_size=16)
    pipeline = StableDiffusionPipeline(
        vae,
        None,
        None,
        unet,
        LCMScheduler(steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline, {"prompt_embeds": torch.randn(1, 77, 32)}


def load_pipeline(folder: Path, prompt: str) -> tuple[Any, dict[str, Any]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
    if not isinstance(pipeline.scheduler, LCMScheduler):
        pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    return pipeline, {"prompt": prompt}


def make_images(pipeline: Any, inputs: dict[str, Any], steps: int) -> tuple[Tensor, float]:
    """Images (N, 3, H, W) in [0, 1], and the seconds of the second call: the first one sets things up."""
    for _ in range(2):
        start = time.perf_counter()
        images = pipeline(
            **inputs,
            num_inference_steps=steps,
            guidance_scale=1.0,  # a few-step generator has the teacher's guidance in its weights
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        images = images.float().cpu()  # waits for a GPU
    return images, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Sample a diffusers pipeline with and without the fused operators.")
    parser.add_argument(
        "folder", nargs="?", type=Path, help="a pipeline's folder (default: a tiny one, random weights)"
    )
    parser.add_argument("--prompt", default="a photo of a cat")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output", type=Path, help="folder to write the images to")
    args = parser.parse_args()

    pipeline, inputs = load_pipeline(args.folder, args.prompt) if args.folder else tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    plain, seconds = make_images(pipeline, inputs, args.steps)
    print(f"diffusers: {seconds:.3f} s")

    pipeline.scheduler = fuse_scheduler(pipeline.scheduler)
    swapped, kept = optimize_unet(pipeline.unet)
    images, seconds = make_images(pipeline, inputs, args.steps)
    print(f"dmd2_fast: {seconds:.3f} s, with {len(swapped)} operators swapped and {len(kept)} kept")
    print(f"largest difference of a pixel: {(images - plain).abs().max():.1e}")
    restore_unet(pipeline.unet)

    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(images):
            pixels = (255 * image).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(args.output / f"{index:03d}.png")


if __name__ == "__main__":
    main()
