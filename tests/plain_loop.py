"""The training run as one plain PyTorch process: plain modules, torch's AdamW, clipping and schedules written out here.

What the trainer on DeepSpeed is compared with. It shares the losses (dmd2_fast.distillation, which test_distillation.py
compares with the paper's formulas) and the random numbers; engines, data order, optimizers, clipping, learning rates,
the average and the update counters are its own.
"""

from __future__ import annotations

import copy
import json
import math
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from data_oracle import make_folder, random_pixels
from tiny import tiny_config, tiny_denoiser

from dmd2_fast.config import Config, load_config
from dmd2_fast.data import read_all
from dmd2_fast.data.batch import Batch
from dmd2_fast.distillation import Algorithm, FakeScore, Networks, fake_score_loss, generate, generator_loss
from dmd2_fast.f_divergence import Divergence
from dmd2_fast.heads import GANHeads
from dmd2_fast.networks import load_denoiser, save_denoiser
from dmd2_fast.random import NoiseKey, philox_uniform

NUM_IMAGES = 44  # five and a half batches of 8: an epoch ends inside a batch


@dataclass
class Trace:
    """What a run did. `gradients` and `weights`: network -> name -> tensor; `losses`: one dict an iteration."""

    losses: list[dict[str, float]] = field(default_factory=list)
    gradients: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """of the first update, before clipping"""
    weights: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """at the end: generator, fake_score, and ema where there is one"""
    start: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    updates: dict[str, list[int]] = field(default_factory=lambda: {"generator": [], "fake_score": []})


def prepare(folder: Path, schedule: str = "karras", prediction_type: str = "sample") -> None:
    """Data and a random teacher for tiny_config(folder)."""
    make_folder(folder / "data", random_pixels(NUM_IMAGES), samples_per_shard=20)
    save_denoiser(tiny_denoiser(3, schedule, prediction_type), folder / "teacher")


def write_config(
    folder: Path, name: str, world_size: int, deepspeed: dict | None = None, **section
) -> tuple[Path, Config]:
    """The file folder/NAME.json for a run in folder/NAME, and the configuration in it."""
    values = tiny_config(folder, **section)
    values["dmd2_fast"]["run"]["folder"] = str(folder / name)
    for key, value in (deepspeed or {}).items():
        values[key] = value
    path = folder / f"{name}.json"
    path.write_text(json.dumps(values))
    return path, load_config(path, (), world_size)


def read_samples(config: Config) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The whole training split: x0 (N, C, H, W) f32 and conditions (N, ...), in file order."""
    if config.data.kind != "latents":
        images, labels = read_all(config.data.path)
        return images, {"class_labels": labels}
    samples = []
    for shard in sorted(Path(config.data.path).glob("train-*.tar")):
        with tarfile.open(shard) as tar:
            files = (tar.extractfile(member) for member in tar if member.name.endswith(".safetensors"))
            samples += [safetensors.torch.load(file.read()) for file in files]
    fields = {name: torch.stack([sample[name].float() for sample in samples]) for name in samples[0]}
    return fields.pop("latents"), fields


def global_batch(
    x0: torch.Tensor, conditions: dict[str, torch.Tensor], size: int, iteration: int, seed: int, stream: int = 0
) -> Batch:
    """Sample by sample from the definition: position p reads entry p mod n of the permutation of epoch p // n."""
    n, orders, indices = len(x0), {}, []
    for position in range(iteration * size, (iteration + 1) * size):
        epoch = position // n
        if epoch not in orders:
            u = philox_uniform(torch.arange(n), (1,), NoiseKey(seed, step=epoch, stream=stream))[:, 0].tolist()
            orders[epoch] = sorted(range(n), key=u.__getitem__)
        indices.append(orders[epoch][position % n])
    condition = {name: value[indices] for name, value in conditions.items()}
    return Batch(x0[indices], condition, torch.arange(size))


def rate(settings, iteration: int, iterations: int) -> float:
    """Linear warm-up over the first w iterations, then constant, or half a cosine down to final_ratio."""
    schedule, peak = settings.lr_scheduler, settings.optimizer.lr
    w = schedule.warmup_iterations
    if iteration < w:
        return peak * (iteration + 1) / w
    if schedule.type == "constant":
        return peak
    low = peak * schedule.final_ratio
    return low + (peak - low) * (1 + math.cos(math.pi * (iteration - w) / (iterations - w))) / 2


class _Updated:
    """A trained network, its optimizer and its settings."""

    def __init__(self, name: str, module: torch.nn.Module, settings):
        self.name, self.module, self.settings = name, module, settings
        optimizer = settings.optimizer
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps,
            weight_decay=optimizer.weight_decay, foreach=False,
        )  # fmt: skip

    def update(self, loss: torch.Tensor, lr: float, trace: Trace, skip: bool) -> float:
        parameters = dict(self.module.named_parameters())
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        trace.gradients.setdefault(self.name, {name: value.clone() for name, value in gradients.items()})
        norm = math.sqrt(sum(float(value.double().pow(2).sum()) for value in gradients.values()))
        limit = self.settings.gradient_clipping
        scale = min(1.0, limit / norm) if limit else 1.0
        for name, parameter in parameters.items():
            parameter.grad = gradients[name] * scale
        self.optimizer.param_groups[0]["lr"] = lr
        if not skip:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


def regression_term(generator, config: Config, pairs, iteration: int, parts: int = 1) -> torch.Tensor:
    """Mean squared error of G's sample of the pairs' noise, in a forward of its own, from what the teacher made of it.

    `pairs`: (noise, samples, conditions) of all pairs, unit noise; an EDM generator predicts the sample itself, Stable
    Diffusion's the noise.
    """
    noise, samples, conditions = pairs
    batch = global_batch(noise, conditions, config.global_batch_size, iteration, config.run.seed, stream=13)
    wanted = global_batch(samples, conditions, config.global_batch_size, iteration, config.run.seed, stream=13).x0
    terms = [
        _distance(generator, config, part, target)
        for part, target in zip(split(batch, parts), wanted.chunk(parts), strict=True)
    ]
    return sum(terms) / parts


def _distance(generator, config: Config, batch: Batch, wanted: torch.Tensor) -> torch.Tensor:
    first = config.generator.steps[0]
    if config.model.kind == "unet2d":
        prediction, _ = generator(first * batch.x0, torch.full((len(wanted),), first), batch.condition)
        return (prediction - wanted).pow(2).mean()
    prediction, _ = generator(batch.x0, torch.full((len(wanted),), int(first)), batch.condition)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = float((1 - betas).log().cumsum(0)[int(first)].exp())
    x0 = (batch.x0 - math.sqrt(1 - abar) * prediction) / math.sqrt(abar)
    return (x0 - wanted).pow(2).mean()


def plain_run(
    config: Config, iterations: int, skip: set[tuple[str, int]] = frozenset(), trained=None, pairs=None, parts: int = 1
) -> Trace:
    """Iterations on the global batch; `skip` holds the updates, (network, iteration), that are not taken.

    `parts`: each loss is the mean over so many parts of the batch: the same numbers, but for the order of additions.
    `trained`: the generator and the fake score's denoiser, where they are not copies of the teacher.
    """
    algorithm, trace = Algorithm.from_config(config), Trace()
    divergence = Divergence.of(algorithm)
    teacher = load_denoiser(config.model).eval()
    generator, fake = trained or (load_denoiser(config.model).eval() for _ in range(2))
    if config.run.start_from is not None:
        for name, denoiser in (("generator", generator), ("fake_score", fake)):
            weights = safetensors.torch.load_file(Path(config.run.start_from) / f"{name}.safetensors")
            denoiser.network.unet.load_state_dict(weights)
    heads = None
    if algorithm.adversarial:
        torch.manual_seed(config.run.seed)
        heads = GANHeads(tuple(teacher.network.feature_shape(level) for level in algorithm.levels))
    fake_score = FakeScore(fake if algorithm.keeps_fake_score else None, heads, algorithm.own_levels)
    teacher.requires_grad_(False)
    networks = Networks(
        generator, fake_score, teacher, teacher.schedule, teacher.prediction_type, teacher.unconditional
    )
    updated = {"generator": _Updated("generator", generator, config.generator)}
    updated["fake_score"] = _Updated("fake_score", fake_score, config.fake_score)
    average = copy.deepcopy(generator.state_dict())
    trace.start = {name: copy.deepcopy(item.module.state_dict()) for name, item in updated.items()}
    x0, conditions = read_samples(config)

    for i in range(iterations):
        batch = global_batch(x0, conditions, config.global_batch_size, i, config.run.seed)
        key, record = NoiseKey(config.run.seed, step=i), {}

        def step(name, loss, i=i, record=record):
            lr = rate(updated[name].settings, i, config.run.iterations)
            record[f"{name}/lr"] = lr
            norm = updated[name].update(loss, lr, trace, (name, i) in skip)
            if (name, i) not in skip:
                record[f"{name}/grad_norm"] = norm
                trace.updates[name].append(i)

        def move_average(i=i):
            if config.generator.ema is not None and ("generator", i) not in skip:
                for name, value in generator.state_dict().items():
                    average[name] = config.generator.ema * average[name] + (1 - config.generator.ema) * value

        if i < config.regression.warmup_iterations:
            loss = regression_term(generator, config, pairs, i, parts)
            record["generator/regression"] = loss.item()
            step("generator", loss)
            move_average()
            trace.losses.append(record)
            continue
        if i % config.fake_score.ttur_ratio == 0:
            fake_score.requires_grad_(False)
            options = {"divergence": divergence}
            results = [generator_loss(networks, algorithm, part, key, **options) for part in split(batch, parts)]
            loss, x, metrics = _mean(results)
            if config.regression.weight:
                term = regression_term(generator, config, pairs, i, parts)
                loss = loss + config.regression.weight * term
                metrics |= {"generator/regression": term.detach(), "generator/loss": loss.detach()}
            record |= {name: float(value) for name, value in metrics.items()}
            step("generator", loss)
            fake_score.requires_grad_(True)
            move_average()
        else:
            with torch.no_grad():
                x = generate(networks, algorithm, batch, key)
        chunks = zip(split(batch, parts), x.chunk(parts), strict=True)
        loss, metrics = _mean([fake_score_loss(networks, algorithm, part, chunk, key) for part, chunk in chunks])
        record |= {name: float(value) for name, value in metrics.items()}
        step("fake_score", loss)
        trace.losses.append(record)
    trace.weights = {name: copy.deepcopy(item.module.state_dict()) for name, item in updated.items()}
    if config.generator.ema is not None:
        trace.weights["ema"] = average
    return trace


def split(batch: Batch, parts: int) -> list[Batch]:
    return batch.split(len(batch) // parts)


def _mean(results: list[tuple]) -> tuple:
    """Of the parts of a batch: their mean loss, their samples one after another where there are any, mean metrics."""
    losses, *samples, metrics = zip(*results, strict=True)
    means = {name: sum(part[name] for part in metrics) / len(metrics) for name in metrics[0]}
    return sum(losses) / len(losses), *[torch.cat(part) for part in samples], means


def relative(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm, over all tensors; infinite where the names differ."""
    if got.keys() != expected.keys():
        return math.inf
    difference = sum(float((got[name].double() - value.double()).pow(2).sum()) for name, value in expected.items())
    return math.sqrt(difference / sum(float(value.double().pow(2).sum()) for value in expected.values()))


def split_noise(config: Config, whole: Trace) -> float:
    """How far first gradients of plain PyTorch are from its own, the batch in two or four parts: f32 tells no more."""
    splits = [plain_run(config, 1, parts=parts).gradients for parts in (2, 4)]
    return max(relative(other[name], value) for other in splits for name, value in whole.gradients.items())


def moved(weights: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value - start[name] for name, value in weights.items()}


def worst_loss(got: list[dict], expected: list[dict]) -> float:
    """The largest relative difference of any loss, norm or logit over the iterations; infinite where one is missing."""
    worst = 0.0
    for mine, theirs in zip(got, expected, strict=True):
        for name, value in theirs.items():
            if name not in mine:
                return math.inf
            worst = max(worst, abs(mine[name] - value) / max(abs(value), 1e-2))
    return worst
