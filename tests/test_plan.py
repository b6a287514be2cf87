"""`dmd2-fast plan`: published costs of SDXL, FLOPs and memory of real runs on the CPU, random draws, the command."""

from __future__ import annotations

import json
import math

import pytest
import torch
from pipelines import make_pipeline
from tiny import ROOT, random_batch, tiny_config, tiny_networks
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from dmd2_fast.cli import main
from dmd2_fast.config import ModelConfig, load_config
from dmd2_fast.data.batch import Batch
from dmd2_fast.distillation import Algorithm, Networks, fake_score_loss, generate, generator_loss
from dmd2_fast.engine import frozen
from dmd2_fast.plan import Machine, Planner
from dmd2_fast.plan_counts import Pass, count_updates, meta_batch
from dmd2_fast.plan_ledger import Ledger, flash_on_meta
from dmd2_fast.plan_networks import PUBLISHED, build, build_base, settings_of
from dmd2_fast.random import NoiseKey

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
PLAIN = ("model.activation_checkpointing=false", "train_micro_batch_size_per_gpu=1")


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """No hub, and nothing in its cache."""
    import huggingface_hub.constants as constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        yield


@pytest.fixture(scope="module")
def full_size():
    return Planner(lambda more, gpus: load_config(ROOT / "ds_sdxl.json", more, gpus), Machine(gpus=8))


def test_published_costs_of_a_pass(full_size):
    """REFERENCE: F 6.76 TFLOP, E/F .434, backward 1.99 F, encoder backward .864 F, for its input alone .479 F.

    The last is .4815 here: flash attention has gradients for keys and values of the prompt also where nothing asks.
    """
    plan = full_size.plan((*PLAIN, "passes=shared"))
    base = full_size._bases["sdxl", SDXL, None][0]
    batch, ledger = meta_batch(base, 1), Ledger()
    weights = list(base.parameters())
    ledger.ignore([*weights, *base.buffers(), batch.x0, batch.sample_ids, *batch.condition.values()])

    def flops(run) -> float:
        before = ledger.flops
        run()
        return ledger.flops - before

    def backward(x, encode: bool):
        prediction, (mid,) = base(x, batch.sample_ids, batch.condition, decode_rows=0 if encode else 1, levels=("mid",))
        output = mid if encode else prediction
        wanted = [w for w in weights if w.requires_grad] + [x] * x.requires_grad
        return flops(lambda: torch.autograd.grad(output.sum(), wanted, allow_unused=True))

    with flash_on_meta(), ledger:
        forward = flops(lambda: base(batch.x0, batch.sample_ids, batch.condition))
        encoder = flops(lambda: base.encode(batch.x0, batch.sample_ids, batch.condition))
        whole, encoder_alone = backward(batch.x0, False), backward(batch.x0, True)
        base.requires_grad_(False)
        to_input = backward(batch.x0.clone().requires_grad_(True), True)
        base.requires_grad_(True)
    assert forward == plan.counts.forward_flops == pytest.approx(6.76e12, rel=1e-3)
    assert encoder / forward == pytest.approx(0.434, abs=1e-3)
    assert whole / forward == pytest.approx(1.99, abs=5e-3)
    assert encoder_alone / forward == pytest.approx(0.864, abs=2e-3)
    assert to_input / forward == pytest.approx(0.479, abs=3e-3)


def test_published_costs_of_a_cycle(full_size):
    """REFERENCE: the original's cycle 46.3 F, with shared passes 39.4 F. Beyond that the plan counts

    the GAN heads, and with independent draws the encoder's backward of the generator's update for the rows of both
    draws, of which one gets no gradient (one batch through one forward): .479 F.
    """
    shared, independent = (full_size.plan((*PLAIN, f"passes={passes}")) for passes in ("shared", "independent"))
    assert shared.forwards("rollout") == independent.forwards("rollout") == 2.5
    # Multiply-adds of SDXL's head: 4x4 convolutions to 16, 8, 4 and 1 wide; the projection is nothing.
    head = 2 * 16 * 1280**2 * (256 + 64 + 16 + 1) / shared.counts.forward_flops
    # A generator update runs it once, forward and through to its input; a fake-score update for two rows, in full.
    heads = head * (2 + 5 * 2 * 3)
    cycles = [plan.counts.cycle(5).flops / plan.counts.forward_flops for plan in (shared, independent)]
    assert cycles[0] - heads == pytest.approx(39.4, abs=0.05)
    assert cycles[1] - heads - 0.4815 == pytest.approx(46.3, abs=0.06)


def test_states_of_sdxl(full_size):
    """On 8 GPUs: by hand from 2.567 B weights, 104.9 M of them in the head's own network."""
    plan = full_size.plan(PLAIN)
    generator, fake = plan.sizes["generator"], plan.sizes["fake_score"]
    assert generator == plan.sizes["teacher"] == pytest.approx(2.567e9, abs=0.5e6)
    assert fake - generator == pytest.approx(4 * (16 * 1280**2 + 3 * 1280) + 1281, abs=0)
    states = plan.memory.states
    assert states["optimizer (f32 masters, two moments)"] == pytest.approx((generator + fake) / 8 * 12, rel=1e-4)
    assert states["EMA"] == pytest.approx(generator / 8 * 4, rel=1e-4)
    assert states["weights"] == pytest.approx((2 * generator + fake) / 8 * 2, rel=0.01)  # small ones are whole
    assert full_size.plan(PLAIN, 64).memory.at_rest < plan.memory.at_rest / 3


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """folder, and a function: overrides of ds_sdxl.json for a small pipeline -> configuration on one rank."""
    folder = make_pipeline(tmp_path_factory.mktemp("plan") / "model")

    def load(*overrides: str, ranks: int = 1):
        first = (
            f"model.path={folder}", "train_batch_size=4", "train_micro_batch_size_per_gpu=4", "bf16.enabled=false",
            "fake_score.ttur_ratio=2",
        )  # fmt: skip
        return load_config(ROOT / "ds_sdxl.json", (*first, *overrides), ranks)

    return load


def real_updates(config):
    """The generator's and the fake score's update on the CPU, with weights; gradients dropped as they come."""
    base, _ = build_base(config.model)
    networks = build(config, base)
    for module in networks.owners.values():
        module.to_empty(device="cpu")
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    for weight in [w for group in networks.parameters.values() for w in group if w.requires_grad]:
        weight.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    called = Networks(
        networks.generator, networks.fake_score, networks.teacher, base.schedule, base.prediction_type,
        base.unconditional,
    )  # fmt: skip
    like = meta_batch(base, config.micro_batch_size)
    condition = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in like.condition.items()}
    batch = Batch(torch.zeros(like.x0.shape), condition, torch.arange(len(like)))
    algorithm = Algorithm.from_config(config)

    def generator(step: int) -> None:
        with frozen(networks.fake_score):
            generator_loss(called, algorithm, batch, NoiseKey(0, step=step))[0].backward()

    def fake_score(step: int) -> None:
        fake_score_loss(called, algorithm, batch, batch.x0, NoiseKey(0, step=step))[0].backward()

    return generator, fake_score


def _products(query, key) -> int:
    """FLOPs of scores and weighted values for shapes (N, heads, L, D)."""
    (n, heads, length, width), context = query, key[2]
    return 2 * 2 * n * heads * length * context * width


ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *_, **__: _products(q, k),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, q, k, *__, **___: (
        2 * _products(q, k)
    ),
}


def test_flops_of_real_updates(small):
    """PyTorch's own counter around real updates, recompute and R1 included: exact."""
    config = small('adversarial.r1={"kind": "approximate", "interval": 2}', "generator.rollout_index=sample")
    counts = count_updates(config, build(config, build_base(config.model)[0]))
    generator, fake_score = real_updates(config)

    def flops(*runs) -> float:
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            for run, step in runs:
                run(step)
        return counter.get_total_flops()

    assert counts.generator.flops == flops((generator, 0))
    assert counts.fake_score.flops == flops((fake_score, 0), (fake_score, 1)) / 2


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_as_the_allocator_sees_them(small, checkpointing, bf16):
    """The most bytes that PyTorch's CPU allocator has handed out at once in a real update: within 15 %, here 5 %."""
    config = small(
        f"model.activation_checkpointing={json.dumps(checkpointing)}", f"bf16.enabled={json.dumps(bf16)}",
        "generator.rollout_index=sample",
    )  # fmt: skip
    counts = count_updates(config, build(config, build_base(config.model)[0]))
    for run, cost in zip(real_updates(config), (counts.generator, counts.fake_score), strict=True):
        run(0)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run(0)
        assert cost.peak_bytes == pytest.approx(peak_of(profiler), rel=0.05)


def peak_of(profiler) -> int:
    """From the allocator's own events, above what was allocated before."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    ("steps", "index", "rollouts", "alone"),
    [("[999,749,499,249]", "batch", 1.5, 2.5), ("[999,749,499,249]", "sample", 3, 4), ("[399]", "batch", 0, 1)],
)
def test_rollouts_are_averaged_over_the_index(small, steps, index, rollouts, alone):
    config = small(f"generator.steps={steps}", f"generator.rollout_index={index}")
    counts = count_updates(config, build(config, build_base(config.model)[0]))
    chain = Pass("rollout", 4, 4)
    assert counts.generator.passes.get(chain, 0) == pytest.approx(rollouts)
    assert counts.rollout.passes == {chain: pytest.approx(alone)}
    assert counts.rollout.flops == pytest.approx(alone * 4 * counts.forward_flops)
    assert counts.generator.passes[Pass("generator", 4, 4, 4, 4)] == 1
    assert counts.generator.passes[Pass("teacher", 8, 8)] == 1
    assert counts.cycle(2).flops == pytest.approx(
        counts.generator.flops + counts.rollout.flops + 2 * counts.fake_score.flops
    )


def test_adapters(small):
    """LoRA: states of the adapters and the heads, one copy of the weights."""
    config = small('model.lora={"rank": 4, "alpha": 2}')
    plain = Planner(lambda more, gpus: small(*more, ranks=gpus), Machine(1)).plan()
    plan = Planner(lambda more, gpus: small('model.lora={"rank": 4, "alpha": 2}', *more, ranks=gpus), Machine(1)).plan()
    unet = build_base(config.model)[0].network.unet
    shapes = [
        module.weight.shape
        for name, module in unet.named_modules()
        if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))
    ]
    adapter = sum(4 * sum(shape) for shape in shapes)
    heads = plain.sizes["fake_score"] - plain.sizes["generator"]
    assert plan.sizes == {
        "generator": adapter, "fake_score": adapter + heads, "teacher": plain.sizes["teacher"]
    }  # fmt: skip
    assert plan.memory.states["EMA"] == 4 * adapter
    assert plan.counts.forward_flops == plain.counts.forward_flops
    assert plan.memory.at_rest < plain.memory.at_rest


def test_settings_without_a_hub():
    settings, source = settings_of(ModelConfig(SDXL, "sdxl", sample_size=64))
    assert "table of published networks" in source and settings["network"]["sample_size"] == 64
    for name, kind, size in ((SDXL, "sdxl", 2.567e9), ("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd15", 0.860e9)):
        if kind == "sd15":  # the full-size tests have built the other
            base, _ = build_base(ModelConfig(name, kind))
            assert sum(p.numel() for p in base.parameters()) == pytest.approx(size, abs=0.5e6)
        assert name in PUBLISHED


def test_command(world, capsys):
    command = ["plan", "--config", "c.json", "--gpus", "2"]
    assert main([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    memory = plan["memory"]
    needed = max(u["gathered"] + u["gradients"] + max(u["activations"], u["step"]) for u in memory["updates"].values())
    assert memory["total"] == sum(memory["states"].values()) + needed + memory["reserve"] and memory["fits"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "fits in 80.0" in shown and f"{plan['cycle']['forwards_per_sample']:.2f}" in shown
    assert main([*command, "--peak-tflops", "1", "--efficiency", "1", "--json"]) == 0
    cycle = json.loads(capsys.readouterr().out)["cycle"]
    assert cycle["arithmetic_seconds"] == pytest.approx(cycle["flops"] / 1e12)
    assert cycle["communication_seconds"] == pytest.approx((cycle["gathered"] + cycle["reduced"]) / 2 / 100e9)


def test_a_plan_that_cannot_fit(world, capsys):
    assert main(["plan", "--config", "c.json", "--gpus", "2", "--gpu-memory", "2GB"]) == 2
    shown = capsys.readouterr()
    assert "DOES NOT FIT" in shown.out and "reduce_bucket_size" in shown.out
    assert shown.err.startswith("dmd2-fast: error: the plan does not fit: ") and shown.err.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["plan", "--config", "c.json", "--gpu-memory", "much"])
    assert "expected one such as 80GB" in capsys.readouterr().err


def test_rows_of_plain_networks(world):
    """The class-conditional network, R1 and teacher features: what the losses do with plain modules, counted there."""
    values = tiny_config(world, adversarial={"features": "teacher", "r1": {"kind": "approximate"}})
    (world / "t.json").write_text(json.dumps(values))
    config = load_config(world / "t.json")
    counts = count_updates(config, build(config, build_base(config.model)[0]))
    networks, batch, seen = tiny_networks(Algorithm.from_config(config)), random_batch(config.micro_batch_size), []
    for network in (networks.teacher, networks.fake_score.denoiser):
        network.network.unet.down_blocks[0].register_forward_hook(lambda _, x, __: seen.append(len(x[0])))
    with torch.no_grad():
        x = generate(networks, Algorithm.from_config(config), batch, NoiseKey(0))
    fake_score_loss(networks, Algorithm.from_config(config), batch, x, NoiseKey(0))
    assert sorted(seen) == sorted(item.encoder for item in counts.fake_score.passes)
    assert math.isfinite(counts.forward_flops)
