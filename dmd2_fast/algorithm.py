"""The settings of the losses: one frozen record, in which every variant is a setting beside the others.

DMD2, DMD, f-distill, LADD, a GAN alone and distribution matching alone are values of the same fields; docs/methods.md
has the table.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .schedules import TimeSampling

UNIFORM = TimeSampling()


@dataclass(frozen=True)
class Algorithm:
    """The settings the losses need; `from_config` reads them from a run's config, which documents each."""

    steps: tuple[float, ...]
    """the generator's step list in the schedule's units"""
    rollout_index: str = "batch"
    """"batch" or "sample": one trained step index a batch, or one for each sample"""
    input: str = "backward_simulation"
    """where the generator's input comes from: "backward_simulation", "noised_data" or "mixed" """
    noised_data_share: float = 0.5
    """of a mixed input"""
    guidance_scale: float = 1.0
    """classifier-free guidance of the teacher"""
    skip_scale: float = 0.0
    """skip-layer guidance of the teacher; 0: none"""
    skip_layers: tuple[str, ...] = ()
    dmd_weight: float = 1.0
    """weight of the distribution matching loss; 0: none"""
    divergence: str = "reverse_kl"
    """the f-divergence that is matched: one of f_divergence.WEIGHTS"""
    ratio_bins: int = 0
    """bins of the density ratio's running means; 0: none"""
    ratio_decay: float = 0.9
    dmd_t_range: tuple[float, float] = (0.02, 0.98)
    dmd_sampling: TimeSampling = UNIFORM
    denoising_t_range: tuple[float, float] = (0.0, 1.0)
    denoising_sampling: TimeSampling = UNIFORM
    generator_weight: float = 5e-3
    """weight of the generator's adversarial loss; 0: none"""
    discriminator_weight: float = 1e-2
    """weight of the head's loss beside the denoising loss; 0: no head"""
    features: str = "fake_score"
    """whose features the head reads: "fake_score" (DMD2) or "teacher" (FastGen, LADD: only the head is trained)"""
    levels: tuple[str, ...] = ("mid",)
    gan_t_range: tuple[float, float] = (0.0, 1.0)
    gan_sampling: TimeSampling = UNIFORM
    r1_kind: str = "none"
    """"none", "approximate", "exact" or "fastgen_compat" """
    r1_input: str = "sample"
    """what the gradient is taken in: "sample" (x_t) or "features" (of the network that the head reads)"""
    r1_weight: float = 1.0
    r1_std: float = 0.1
    """standard deviation of the R1 perturbation as a share of the RMS of what is perturbed; fastgen_compat: itself"""
    r1_interval: int = 1
    regression_weight: float = 0.0
    """weight of the regression on a teacher's pairs, where they are given"""
    passes: str = "independent"
    """"independent": the GAN draws its own times and noise (paper); "shared": it reads the passes that run anyway"""

    @property
    def adversarial(self) -> bool:
        """Whether there is a GAN head."""
        return self.discriminator_weight > 0

    @property
    def matching(self) -> bool:
        """Whether the generator learns from the two scores."""
        return self.dmd_weight > 0

    @property
    def generator_logits(self) -> bool:
        """Whether the generator's loss reads the head."""
        return self.adversarial and (self.generator_weight > 0 or self.divergence != "reverse_kl")

    @property
    def keeps_fake_score(self) -> bool:
        """Whether there is a fake score: for its score, or for its features. LADD has the head alone."""
        return self.matching or self.features == "fake_score"

    @property
    def own_levels(self) -> tuple[str, ...]:
        """Feature levels the fake score itself must return."""
        return self.levels if self.adversarial and self.features == "fake_score" else ()

    @property
    def gan_draws(self) -> tuple[tuple[float, float], TimeSampling]:
        """Range and sampling of the times of real samples: as the logits of fake ones have them."""
        if self.passes == "shared":
            return self.denoising_t_range, self.denoising_sampling
        return self.gan_t_range, self.gan_sampling

    @classmethod
    def from_config(cls, config: Any) -> Algorithm:
        generator, fake_score, teacher = config.generator, config.fake_score, config.teacher
        adversarial, matching = config.adversarial, config.distribution_matching
        histogram, skip, r1 = matching.ratio_histogram, teacher.skip_layer_guidance, adversarial.r1
        return cls(
            steps=tuple(generator.steps),
            rollout_index=generator.rollout_index,
            input=generator.input,
            noised_data_share=generator.noised_data_share,
            guidance_scale=teacher.guidance_scale,
            skip_scale=0.0 if skip is None else skip.scale,
            skip_layers=() if skip is None else tuple(skip.layers),
            dmd_weight=matching.weight,
            divergence=matching.divergence,
            ratio_bins=0 if histogram is None else histogram.num_bins,
            ratio_decay=cls.ratio_decay if histogram is None else histogram.decay,
            dmd_t_range=tuple(matching.t_range),
            dmd_sampling=_sampling(matching),
            denoising_t_range=tuple(fake_score.t_range),
            denoising_sampling=_sampling(fake_score),
            generator_weight=adversarial.generator_weight,
            discriminator_weight=adversarial.discriminator_weight,
            features=adversarial.features,
            levels=tuple(adversarial.levels),
            gan_t_range=tuple(adversarial.t_range),
            gan_sampling=_sampling(adversarial),
            r1_kind=r1.kind,
            r1_input=r1.input,
            r1_weight=r1.weight,
            r1_std=r1.std,
            r1_interval=r1.interval,
            regression_weight=config.regression.weight,
            passes=config.passes,
        )


def _sampling(section: Any) -> TimeSampling:
    return TimeSampling(**asdict(section.time_sampling))
