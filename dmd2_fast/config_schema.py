"""The `dmd2_fast` section as frozen dataclasses: every setting with its unit, range, default and where it comes from.

The annotations are the schema: `config_parse.parse` reads types, `Literal` choices and `Range` limits from them.
"Paper" is DMD2, arXiv 2405.14867. Iterations count fake-score updates; the generator moves every `ttur_ratio`-th.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from dmd2_fast.config_parse import Length, Range, to_json

Positive = Annotated[float, Range(gt=0)]
NonNegative = Annotated[float, Range(ge=0)]
Fraction = Annotated[float, Range(ge=0, le=1)]
Decay = Annotated[float, Range(ge=0, lt=1)]
Count = Annotated[int, Range(ge=1)]
CountOrZero = Annotated[int, Range(ge=0)]
Seed = Annotated[int, Range(ge=0, lt=2**63)]
Divergence = Literal["reverse_kl", "kl", "js", "softened_rkl", "neyman", "squared_hellinger", "jeffreys"]
Level = Literal["mid", "down.0", "down.1", "down.2", "down.3", "down.4", "down.5"]


@dataclass(frozen=True)
class OptimizerConfig:
    """`{"type": "AdamW", "params": {...}}`: everything but the type is written under `params`."""

    json_group: ClassVar[str] = "params"

    type: Literal["AdamW"] = "AdamW"
    """The optimizer: AdamW (decoupled weight decay), fused where the machine has it."""
    lr: Positive = 5e-7
    """Peak learning rate, > 0. Default: the paper's SDXL."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the first and second moment, each in [0, 1). Default: the paper; 0 for the first suits a GAN."""
    eps: Positive = 1e-8
    """Added to the root of the second moment, > 0."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay, >= 0. Default: the paper."""


@dataclass(frozen=True)
class LRSchedulerConfig:
    """`{"type": "constant" | "cosine", "params": {...}}`. Counts iterations, as the original does, not updates."""

    json_group: ClassVar[str] = "params"

    type: Literal["constant", "cosine"] = "constant"
    """After the linear warm-up: hold the rate, or a half cosine down to `final_ratio` at the last iteration."""
    warmup_iterations: CountOrZero = 500
    """Iterations of linear warm-up from 0, >= 0. Default: the paper."""
    final_ratio: Fraction = 0.1
    """Rate at the last iteration over the peak rate, in [0, 1]; for cosine only."""


@dataclass(frozen=True)
class TimeSamplingConfig:
    """Which noise levels are drawn: kinds that act on sigma / alpha, and so mean the same for every schedule."""

    kind: Literal["uniform", "log_normal", "shifted"] = "uniform"
    """uniform over the schedule's own time; log_normal: ln(sigma / alpha) ~ N(mean, std^2), which is EDM's for Karras
    and the logit-normal of rectified flow; shifted: uniform, then sigma / alpha times `shift` (Stable Diffusion 3)."""
    mean: float = -1.2
    """Mean of ln(sigma / alpha); for log_normal only. Default: EDM."""
    std: Positive = 1.2
    """Standard deviation of ln(sigma / alpha), > 0; for log_normal only. Default: EDM."""
    shift: Positive = 3.0
    """Factor of sigma / alpha, > 0; for shifted only. Default: Stable Diffusion 3."""


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters on one frozen copy of the weights, for the generator and the fake score (Hu et al. 2021)."""

    rank: Count = 64
    """Rank of the adapters, >= 1. Default: the original's SDXL recipe."""
    alpha: Count = 8
    """The adapter's output is scaled by alpha / rank, >= 1. Default: the original's SDXL recipe."""
    targets: Annotated[tuple[str, ...], Length(1)] = ("to_q", "to_k", "to_v", "to_out.0")
    """Ends of the names of the layers, linear or convolution, that get an adapter. Default: attention's projections;
    more: proj_in, proj_out, ff.net.0.proj, ff.net.2, conv1, conv2, conv_shortcut, time_emb_proj."""


@dataclass(frozen=True)
class ModelConfig:
    """The network that all three start from."""

    path: str
    """Folder of the teacher: a denoiser's (unet2d), or a diffusers pipeline's or its hub id (sd15, sdxl). Required."""
    kind: Literal["unet2d", "sd15", "sdxl"] = "unet2d"
    """A class-conditional UNet2DModel, or a UNet2DConditionModel with SD1.5's or SDXL's text conditions."""
    sample_size: Count | None = None
    """Side of the samples, latents for sd15 and sdxl, or null for the network's own (SDXL 128, SD1.5 64)."""
    activation_checkpointing: bool = False
    """Whether the trained networks keep block inputs alone and compute the rest again in backward."""
    fused_operators: bool = True
    """Whether GroupNorm + SiLU and attention in the networks are computed by fused operators; see networks/swap.py."""
    channels_last: bool = False
    """Whether feature maps lie in memory with the channels together: for GPUs' 16-bit convolutions."""
    compile: bool = False
    """Whether torch.compile compiles the networks' blocks; the first iterations then take minutes."""
    lora: LoRAConfig | None = None
    """Adapters that are trained instead of the weights, or null to train every weight."""


@dataclass(frozen=True)
class GeneratorConfig:
    """The few-step student."""

    steps: Annotated[tuple[NonNegative, ...], Length(1)]
    """The generator's noise levels, strictly decreasing, in the schedule's own unit: DDPM timesteps (999, 749, 499,
    249), Karras sigmas, rectified-flow times. One entry: a 1-step generator. Required."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Moves every `fake_score.ttur_ratio`-th iteration."""
    lr_scheduler: LRSchedulerConfig = LRSchedulerConfig()
    """Learning rate over iterations."""
    gradient_clipping: NonNegative = 10.0
    """Largest norm of the whole gradient, >= 0; 0 for no clipping. Default: the paper."""
    ema: Decay | None = 0.999
    """Decay of the averaged weights per generator update, in [0, 1), or null for none. Samples and exports use it."""
    input: Literal["backward_simulation", "noised_data", "mixed"] = "backward_simulation"
    """Where the input of a later step comes from: the generator's own chain, as at inference (paper, section 4.5);
    noised real samples, as FastGen has it; or either, sample by sample. The first step's is pure noise."""
    noised_data_share: Annotated[float, Range(gt=0, lt=1)] = 0.5
    """Share of the samples whose input is noised real data, in (0, 1); for mixed only."""
    rollout_index: Literal["batch", "sample"] = "batch"
    """The trained step: one index for the whole batch (the paper), or one per sample out of one full chain."""


@dataclass(frozen=True)
class FakeScoreConfig:
    """The score network of the generator's distribution, with the GAN head."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """Moves every iteration; it holds the GAN head too."""
    lr_scheduler: LRSchedulerConfig = LRSchedulerConfig()
    """Learning rate over iterations."""
    gradient_clipping: NonNegative = 10.0
    """Largest norm of the whole gradient, >= 0; 0 for no clipping. Default: the paper."""
    ttur_ratio: Count = 5
    """Two time-scale rule: fake-score updates per generator update, >= 1. Default: the paper, section 4.2."""
    t_range: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Range of noise levels of the denoising loss as fractions of the schedule, increasing. Default: the paper."""
    time_sampling: TimeSamplingConfig = TimeSamplingConfig()
    """How the denoising loss draws from that range."""


@dataclass(frozen=True)
class TeacherTrainingConfig:
    """How to train a small teacher from nothing (`dmd2-fast teacher`)."""

    network: Annotated[dict[str, Any], Length(1)]
    """Keyword arguments of diffusers' UNet2DModel, channels counted after the patches are folded. Required."""
    iterations: Count = 2000
    """Training steps, >= 1."""
    batch_size: Count = 64
    """Images a step, over all ranks, >= 1."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3)
    """Constant rate after a short warm-up and a cosine to the end, set by the teacher's trainer."""
    ema: Decay = 0.999
    """Decay of the averaged weights per step, in [0, 1): the averaged weights become the teacher."""
    label_dropout: Annotated[float, Range(ge=0, lt=1)] = 0.0
    """Probability that a label is replaced by the empty one, in [0, 1): classifier-free guidance needs it above 0."""
    seed: Seed = 0
    """Seed of weights, data order and noise, in [0, 2^63)."""
    schedule: Literal["karras", "ddpm", "rectified_flow"] = "karras"
    """The noise schedule; it fixes the unit of `generator.steps`."""
    sigma_data: Positive | None = None
    """Standard deviation of the data for the EDM preconditioning, > 0; null measures it on the training split."""
    prediction_type: Literal["epsilon", "sample", "v_prediction", "flow"] | None = None
    """What the network predicts, or null for the schedule's usual one: karras sample, ddpm epsilon, rectified_flow
    flow."""
    preconditioning: Literal["edm", "none"] | None = None
    """EDM's scaling around the network (karras with sample alone), or null for it where it is usual."""
    time_sampling: TimeSamplingConfig | None = None
    """How noise levels are drawn, or null for the usual: log_normal for karras (EDM), uniform for the others."""
    patch_size: Count = 2
    """Side of the pixel squares folded into channels before the network (pixel-unshuffle), >= 1."""


@dataclass(frozen=True)
class SkipLayerGuidanceConfig:
    """Guidance away from the teacher with some of its layers left out (as in Stable Diffusion 3.5)."""

    scale: Positive = 1.0
    """s in teacher + s (conditional - conditional without the layers), > 0."""
    layers: Annotated[tuple[str, ...], Length(1)] = ("mid_block",)
    """Paths in the UNet of modules that give back what they got: mid_block, down_blocks.1.attentions.0, ..."""


@dataclass(frozen=True)
class TeacherConfig:
    """The frozen network that knows the real distribution."""

    guidance_scale: NonNegative = 1.0
    """Classifier-free guidance: uncond + scale (cond - uncond); 1 runs no unconditional pass. SDXL 8, SD1.5 1.75."""
    skip_layer_guidance: SkipLayerGuidanceConfig | None = None
    """A further guidance of the teacher, beside or instead of the classifier-free one, or null for none."""
    training: TeacherTrainingConfig | None = None
    """How `dmd2-fast teacher` makes the teacher, or null when it comes from elsewhere."""


@dataclass(frozen=True)
class RatioHistogramConfig:
    """Normalisation of f-distill's density ratio by its running mean at each noise level (arXiv 2502.15681)."""

    num_bins: Count = 10
    """Equal parts of the schedule, each with its own mean, >= 1. Default: f-distill."""
    decay: Decay = 0.9
    """Share of the old mean that an update keeps, in [0, 1)."""


@dataclass(frozen=True)
class DistributionMatchingConfig:
    """The DMD gradient."""

    weight: NonNegative = 1.0
    """Weight of the loss in the generator's, >= 0; 0 for a GAN alone."""
    divergence: Divergence = "reverse_kl"
    """The f-divergence that is minimised; reverse KL is DMD2, the others are f-distill: each sample's gradient is
    weighted by a function of the density ratio that the GAN head's logits at its noised sample tell."""
    ratio_histogram: RatioHistogramConfig | None = None
    """Normalisation of the density ratio at each noise level, or null for none; not read by reverse_kl."""
    t_range: tuple[Fraction, Fraction] = (0.02, 0.98)
    """Range of noise levels as fractions of the schedule, increasing. Default: the paper."""
    time_sampling: TimeSamplingConfig = TimeSamplingConfig()
    """How the loss draws from that range."""


@dataclass(frozen=True)
class RegressionConfig:
    """The distance of the generator's samples from a teacher's own of the same noise (DMD; one-step SDXL's warm-up)."""

    weight: NonNegative = 0.0
    """Weight in the generator's loss beside the others, after the warm-up, >= 0; 0 for none."""
    path: str | None = None
    """Folder of the teacher's noise-image pairs, which `dmd2-fast pairs` writes, or null for no regression."""
    warmup_iterations: CountOrZero = 0
    """First iterations, in which the generator learns from the pairs alone and nothing else is updated, >= 0."""
    loss: Literal["mse", "lpips"] = "mse"
    """Mean squared error (of latents, for sd15 and sdxl), or LPIPS of images, with the package lpips."""

    @property
    def is_on(self) -> bool:
        """Whether any iteration reads pairs."""
        return self.weight > 0 or self.warmup_iterations > 0


@dataclass(frozen=True)
class R1Config:
    """The gradient penalty of the GAN head on noised real samples."""

    kind: Literal["none", "approximate", "exact", "fastgen_compat"] = "none"
    """approximate: ((D(x_t) - D(x_t + s n)) / s)^2 at the same t and condition, without a double backward; exact:
    |grad D(x_t)|^2, which the former tends to; fastgen_compat: (D(x_t) - D(x0 + s n))^2 at t, which is another thing,
    for comparisons with runs of FastGen."""
    input: Literal["sample", "features"] = "sample"
    """What the gradient is taken in: the noised sample, through the network that the head reads, or that network's
    features, through the head alone. Not read by fastgen_compat."""
    weight: Positive = 1.0
    """Weight of the penalty in the fake score's loss, > 0 (half of the usual gamma)."""
    std: Positive = 0.1
    """Size s of the perturbation as a fraction of each sample's root mean square (fastgen_compat: as it is), > 0."""
    interval: Count = 1
    """Every how many iterations the penalty is taken, >= 1 (lazy regularisation)."""


@dataclass(frozen=True)
class AdversarialConfig:
    """The diffusion GAN."""

    generator_weight: NonNegative = 5e-3
    """Weight of softplus(-D(fake)) in the generator's loss, >= 0. Default: the paper's SDXL."""
    discriminator_weight: NonNegative = 1e-2
    """Weight of the discriminator's loss in the fake score's, >= 0. Default: the paper."""
    features: Literal["fake_score", "teacher"] = "fake_score"
    """Whose features the head reads: the fake score's, which the GAN then trains too (paper), or the teacher's."""
    levels: Annotated[tuple[Level, ...], Length(1)] = ("mid",)
    """The feature maps that get a head each; mid is the bottleneck (paper), down.i what down block i gives (LADD)."""
    t_range: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Range of noise levels as fractions of the schedule, increasing. Default: the paper. Not read by shared passes."""
    time_sampling: TimeSamplingConfig = TimeSamplingConfig()
    """How the GAN draws from that range. Not read by shared passes."""
    r1: R1Config = R1Config()
    """The gradient penalty."""


@dataclass(frozen=True)
class DataConfig:
    """The real samples."""

    path: str
    """Folder with train-*.tar and test-*.tar. Required."""
    kind: Literal["webdataset", "latents"] = "webdataset"
    """WebDataset shards of labelled images, or those of latents and text embeddings that `dmd2-fast prepare` writes."""
    loader: Literal["auto", "dali", "plain"] = "auto"
    """DALI pipeline, plain PyTorch reader (the same batches), or DALI where it is installed."""
    num_threads: Count = 2
    """Threads that decode, per rank, >= 1."""


@dataclass(frozen=True)
class RunConfig:
    """The run itself."""

    folder: str
    """Where everything is written; an existing folder of the same configuration is resumed. Required."""
    iterations: Count = 20000
    """Fake-score updates in all, >= 1."""
    seed: Seed = 0
    """Seed of every random draw, in [0, 2^63)."""
    start_from: str | None = None
    """Folder of a finished run whose generator and fake score this one starts from, as a second stage does, instead of
    the teacher's weights; optimizers, averages and the GAN head start anew. Or null."""
    log_interval: Count = 10
    """Iterations between lines of metrics.jsonl, >= 1: the only times the device is read."""
    checkpoint_interval: Count = 250
    """Iterations between checkpoints, >= 1; the last iteration always writes one."""
    keep_checkpoints: Count = 2
    """Newest checkpoints that are kept, >= 1."""
    sample_interval: CountOrZero = 100
    """Iterations between grids of fixed-noise samples, >= 0; 0 for none."""
    sample_prompts: tuple[str, ...] = ()
    """What the grids of sd15 and sdxl show, one image a prompt; default: conditions of the first training samples."""
    num_samples: Annotated[int, Range(ge=4)] = 2000
    """Samples of the final evaluation, >= 4: the scores look at the third nearest neighbour."""
    progress: bool = True
    """Whether a progress bar is shown."""
    gather: Literal["module", "rollout", "network"] = "module"
    """How passes that do not update a network get at its sharded weights: module by module through ZeRO-3's hooks
    (least memory); the same, but for the generator's rollout, whose forwards share one copy gathered for them (one
    network in 16 bits, gone before the trained forward); or each network whole, without hooks (fast for small ones)."""


@dataclass(frozen=True)
class Section:
    """The whole `dmd2_fast` section."""

    model: ModelConfig
    """The network that all three start from."""
    generator: GeneratorConfig
    """The few-step student."""
    data: DataConfig
    """The real samples."""
    run: RunConfig
    """The run itself."""
    fake_score: FakeScoreConfig = FakeScoreConfig()
    """The score network of the generator's distribution."""
    teacher: TeacherConfig = TeacherConfig()
    """The frozen network."""
    distribution_matching: DistributionMatchingConfig = DistributionMatchingConfig()
    """The DMD gradient."""
    adversarial: AdversarialConfig = AdversarialConfig()
    """The diffusion GAN."""
    regression: RegressionConfig = RegressionConfig()
    """The distance from the teacher's samples of the same noise."""
    passes: Literal["independent", "shared"] = "independent"
    """The GAN's own noise level and noise (the paper), or its logits at the draws of the DMD and denoising losses, from
    passes that run anyway: another estimator of the same expectation, and fewer forwards."""


@dataclass(frozen=True)
class Config(Section):
    """A checked configuration: our sections, DeepSpeed's part and the batch it comes to on this many ranks."""

    deepspeed: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed's own keys, as they were given."""
    micro_batch_size: int = 1
    """Samples of one forward on one rank."""
    gradient_accumulation_steps: int = 1
    """Forwards of each rank that make one update."""
    world_size: int = 1
    """Ranks the batch was worked out for."""

    @property
    def global_batch_size(self) -> int:
        """Samples of one update over all ranks."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.world_size

    def to_dict(self) -> dict[str, Any]:
        """The JSON this configuration can be loaded from again, every default written out. Ranks do not change it."""
        return {**self.deepspeed, "dmd2_fast": to_json(self, Section)}
