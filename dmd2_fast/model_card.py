"""README.md of an exported folder: what it is, and the code that samples it right."""

from __future__ import annotations

from typing import Any

from .networks.source import is_hub_id

PIPELINES = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
FOLDER = "path/to/this/folder"
"""Stands for the exported folder in the card's code."""


def model_card(name: str, metadata: dict[str, Any], *, baked: bool, full: bool) -> str:
    """The whole file. `baked`: LCMScheduler takes the steps by itself; `full`: the folder is a whole pipeline."""
    model, steps = metadata["model"], metadata["steps"]
    base = [f"base_model: {model['path']}"] if is_hub_id(model["path"]) else []
    lines = ["---", "library_name: diffusers", *base, "---", ""]
    lines += [f"# {name}", "", f"A {len(steps)}-step generator, distilled from `{model['path']}` by dmd2_fast."]
    trained = [f"{metadata[key]} {word}" for key, word in (("iteration", "iterations"),) if key in metadata]
    trained += [f"averaged weights (decay {metadata['ema']})"] if metadata.get("ema") is not None else []
    lines += ["", f"Trained for {', '.join(trained)}."] if trained else []
    if model["kind"] in PIPELINES:
        lines += ["", *_text_usage(metadata, baked=baked, full=full)]
    else:
        lines += ["", *_class_usage(steps)]
    return "\n".join(lines) + "\n"


def _class_usage(steps: list[float]) -> list[str]:
    return [
        f"Steps: {', '.join(f'{step:g}' for step in steps)}, in the unit of the schedule in denoiser.json. `unet/` "
        "is a UNet2DModel of diffusers; no scheduler of diffusers samples it, and this does:",
        "",
        "```python",
        "import torch",
        "",
        "from dmd2_fast.export import load_generator",
        "",
        f'generator = load_generator("{FOLDER}")',
        "images = generator.sample(torch.arange(10), seed=0)  # labels -> (10, C, H, W) in [-1, 1]",
        "```",
    ]


def _text_usage(metadata: dict[str, Any], *, baked: bool, full: bool) -> list[str]:
    model, steps = metadata["model"], [int(step) for step in metadata["steps"]]
    pipeline = PIPELINES[model["kind"]]
    is_lora = metadata["weights"] == "lora"
    names = [pipeline] if full else ["LCMScheduler", pipeline, *([] if is_lora else ["UNet2DConditionModel"])]
    code = [f"from diffusers import {', '.join(names)}", ""]
    if full:
        code += [f'pipeline = {pipeline}.from_pretrained("{FOLDER}")']
    elif is_lora:
        code += [
            f'pipeline = {pipeline}.from_pretrained("{model["path"]}")',
            f'pipeline.load_lora_weights("{FOLDER}", weight_name="pytorch_lora_weights.safetensors")',
        ]
    else:
        code += [
            f'unet = UNet2DConditionModel.from_pretrained("{FOLDER}", subfolder="unet")',
            f'pipeline = {pipeline}.from_pretrained("{model["path"]}", unet=unet)',
        ]
    if not full:
        code += [f'pipeline.scheduler = LCMScheduler.from_pretrained("{FOLDER}", subfolder="scheduler")']
    which = f"num_inference_steps={len(steps)}" if baked else f"timesteps={steps}"
    size = _size(metadata) if is_lora else ""
    code += [f'image = pipeline("a photo of a cat", {which}, guidance_scale=0{size}).images[0]']
    told = ", ".join(map(str, steps))
    if baked:
        why = (
            f"Timesteps: {told}. They are written into `scheduler/`: with that scheduler and "
            f"`num_inference_steps={len(steps)}` nothing else has to be passed. Another scheduler, or LCMScheduler's "
            "own defaults, would sample at other timesteps."
        )
    else:
        why = (
            f"Timesteps: {told}. LCMScheduler has no setting that gives them: pass `timesteps={steps}` to every call. "
            f"`num_inference_steps={len(steps)}` would sample at other timesteps."
        )
    guidance = "`guidance_scale=0`: the teacher's guidance is in the weights, and the generator wants none."
    return [why, "", guidance, "", "```python", *code, "```"]


def _size(metadata: dict[str, Any]) -> str:
    """The size of the images as arguments of a call, where it is not the pipeline's own."""
    if "sample_size" not in metadata["network"]:
        return ""
    from .pipeline import latent_shape

    side = metadata["network"]["sample_size"]
    pixels = 4096
    factor = pixels // latent_shape(metadata["model"]["path"], pixels)[1]
    return f", height={factor * side}, width={factor * side}"
