"""The tables of docs/scaling.md: `python tools/scaling_table.py` prints them, from ds_sdxl.json, in a minute or two."""

from __future__ import annotations

from dmd2_fast.config import load_config
from dmd2_fast.plan import GB, Machine, Planner

SMALL_BUCKET = "zero_optimization.reduce_bucket_size=50000000"
ONE = "train_micro_batch_size_per_gpu=1"
OFFLOAD = 'zero_optimization.offload_optimizer={"device": "cpu"}'
NO_RECOMPUTE = "model.activation_checkpointing=false"
LORA = 'model.lora={"rank": 64, "alpha": 8}'
ROWS = [
    ("4-step", 1, (ONE, SMALL_BUCKET)),
    ("4-step", 1, (ONE, SMALL_BUCKET, OFFLOAD)),
    ("4-step", 2, (SMALL_BUCKET,)),
    ("4-step", 8, ("run.gather=rollout",)),
    ("4-step", 8, ("run.gather=rollout", NO_RECOMPUTE)),
    ("4-step", 64, ("run.gather=rollout", NO_RECOMPUTE)),
    ("LoRA", 1, (LORA, SMALL_BUCKET)),
    ("LoRA", 2, (LORA, SMALL_BUCKET, "run.gather=network")),
    ("LoRA", 8, (LORA, SMALL_BUCKET, "run.gather=network", NO_RECOMPUTE)),
    ("LoRA", 64, (LORA, SMALL_BUCKET, "run.gather=network", NO_RECOMPUTE)),
]


def main() -> None:
    planner = Planner(lambda more, gpus: load_config("ds_sdxl.json", more, gpus), Machine(gpus=1))
    print("| recipe | GPUs | micro x accumulated | `--set` | states | activations | gathered | total | fits 80 GB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    work = []
    for recipe, gpus, overrides in ROWS:
        plan = planner.plan(overrides, gpus)
        memory, config = plan.memory, plan.config
        phase = max(memory.phases.values(), key=lambda item: item.peak)
        host = f" + {memory.host / GB:.0f} on the host" if memory.host else ""
        print(
            f"| {recipe} | {gpus} | {config.micro_batch_size} x {config.gradient_accumulation_steps} "
            f"| {', '.join(f'`{item}`' for item in overrides)} | {memory.at_rest / GB:.1f}{host} "
            f"| {phase.activations / GB:.1f} | {phase.gathered / GB:.1f} | {memory.total / GB:.1f} "
            f"| {'yes' if plan.fits else 'no'} |",
            flush=True,
        )
        arithmetic, communication = plan.seconds
        cycle = plan.counts.cycle(config.fake_score.ttur_ratio).flops
        cycle /= plan.counts.forward_flops * config.micro_batch_size
        work.append(
            f"| {recipe} | {gpus} | {plan.forwards('generator'):.2f} | {plan.forwards('fake_score'):.2f} | {cycle:.1f} "
            f"| {plan.traffic['gathered'] / GB:.0f} | {plan.traffic['reduced'] / GB:.1f} | {arithmetic:.1f} "
            f"| {communication:.1f} |"
        )
    print(
        "\n| recipe | GPUs | generator, F | fake score, F | cycle, F | gathered, GB | reduced, GB | arithmetic, s ",
        end="",
    )
    print("| communication, s |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(work))


if __name__ == "__main__":
    main()
