"""DeepSpeed's part of the configuration: its key names, what we refuse of it, and its three batch keys."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any

from dmd2_fast.config_parse import SECTION, show, suggestion
from dmd2_fast.errors import ConfigError

LISTED_VERSION = "0.19.8"
"""The DeepSpeed release the two lists below were taken from; another installed release is asked for its own names."""

_TOP_LEVEL_KEYS = """
activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type compile
csv_monitor data_efficiency data_types dataloader_drop_last datastates_ckpt disable_allgather disable_python_gc
dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping
gradient_predivide_factor hybrid_engine log_level managed_gradient_accumulation memory_breakdown optimizer pipeline
prescale_gradients scheduler seq_parallel_communication_data_type sequence_parallel_size steps_per_print
tensor_parallel tensorboard timers torch_autocast train_batch_size train_micro_batch_size_per_gpu
use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb weight_quantization
zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
"""
TOP_LEVEL_KEYS = frozenset(_TOP_LEVEL_KEYS.split())

_ZERO_KEYS = """
allgather_bucket_size allgather_partitions allgather_sequential compute_grad_norm contiguous_gradients cpu_offload
cpu_offload_param cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks
gather_16bit_weights_on_model_save ignore_unused_parameters leaf_module legacy_stage1 load_from_fp32_weights
log_trace_cache_warnings max_live_parameters max_reuse_distance memory_efficient_linear model_persistence_threshold
module_granularity_threshold offload_optimizer offload_param overlap_comm override_module_apply
param_persistence_threshold parameter_alignment pipeline_loading_checkpoint prefetch_bucket_size reduce_bucket_size
reduce_scatter round_robin_gradients save_muon_momentum_buffer_in_memory stage stage3_allgather_sequential
stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save stage3_max_live_parameters
stage3_max_reuse_distance stage3_model_persistence_threshold stage3_module_granularity_threshold
stage3_param_persistence_threshold stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params sub_group_size
use_all_reduce_for_fetch_params use_multi_rank_bucket_allreduce zenflow zero_hpz_partition_size
zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights
"""
ZERO_KEYS = frozenset(_ZERO_KEYS.split())

_STAGE_3_KEYS = """
allgather_sequential gather_16bit_weights_on_model_save leaf_module log_trace_cache_warnings max_live_parameters
max_reuse_distance memory_efficient_linear model_persistence_threshold module_granularity_threshold offload_param
override_module_apply param_persistence_threshold pipeline_loading_checkpoint prefetch_bucket_size
save_muon_momentum_buffer_in_memory sub_group_size use_all_reduce_for_fetch_params zero_quantized_gradients
"""
STAGE_3_KEYS = frozenset(_STAGE_3_KEYS.split()) | {key for key in ZERO_KEYS if key.startswith("stage3_")}
"""Keys of `zero_optimization` that act on sharded weights alone: DeepSpeed ignores them at stages 1 and 2."""

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

_OURS = "it would serve every network alike: put it in {section}.generator and {section}.fake_score"
_DATA_PARALLEL = "the noise and the data order are keyed for ranks that split the batch, and nothing else"

REFUSED_KEYS: dict[str, str] = {
    "optimizer": _OURS.format(section=SECTION),
    "scheduler": _OURS.format(section=SECTION) + " as lr_scheduler",
    "gradient_clipping": _OURS.format(section=SECTION),
    "tensor_parallel": _DATA_PARALLEL,
    "expert_parallel": _DATA_PARALLEL,
    "sequence_parallel_size": _DATA_PARALLEL,
    "pipeline": _DATA_PARALLEL,
    "hybrid_engine": "it wraps language models for text generation",
    "autotuning": "it measures one training engine, and here three run together",
}
"""Keys that DeepSpeed knows and this program refuses, with the reason."""

OFFLOAD_KEYS = ("offload_param", "offload_optimizer")
REFUSED_ZERO_KEYS = (
    "cpu_offload",
    "cpu_offload_param",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_hpz_partition_size",
    "zenflow",
)
"""The same inside `zero_optimization`: refused unless they are switched off."""
OFF_VALUES: tuple[Any, ...] = (None, False, 1, {"device": "none"}, {"device": None})
"""Values that switch such a key off; a partition of 1 is none."""


def _installed_version() -> str | None:
    try:
        return metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        return None


class _Recorder(dict[str, Any]):
    """A dict that notes every key it is asked for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> _Recorder:
        return self


def installed_top_level_keys() -> frozenset[str]:
    """The top-level keys that the installed DeepSpeed reads: its own parser is watched, since it keeps no list."""
    from deepspeed.runtime import config as deepspeed_config

    watched = _Recorder({"train_batch_size": 1})
    deepspeed_config.DeepSpeedConfig(watched)
    removed = getattr(deepspeed_config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {})
    # Read by a test on the argument before the parsed copy exists, so the watcher may not see it.
    return frozenset(watched.asked - set(removed)) | {"sequence_parallel_size"}


def installed_zero_keys() -> frozenset[str]:
    """The keys of `zero_optimization` that the installed DeepSpeed accepts, aliases included."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    model_fields = DeepSpeedZeroConfig.model_fields
    return frozenset(model_fields) | {item.alias for item in model_fields.values() if item.alias}


def _check_names(
    given: dict[str, Any],
    listed: frozenset[str],
    ask: Callable[[], frozenset[str]],
    where: str,
    own_sections: Iterable[str] = (),
) -> None:
    unknown = [key for key in given if key not in listed]
    if unknown and _installed_version() not in (None, LISTED_VERSION):
        # Whatever a foreign release raises, the static list still answers.
        with contextlib.suppress(Exception):
            listed = listed | ask()
        unknown = [key for key in given if key not in listed]
    if unknown:
        key = unknown[0]
        path = f"{where}.{key}" if where else key
        near = suggestion(key, listed if where else {*listed, SECTION, *own_sections})
        raise ConfigError(
            f'unknown key "{path}"{near}. '
            f'DeepSpeed would ignore or refuse it; keys of this program go into the section "{SECTION}".'
        )


def check_deepspeed(section: dict[str, Any], own_sections: Iterable[str] = ()) -> None:
    """Refuse what DeepSpeed does not know and what this program does not run with. Raises ConfigError.

    `own_sections` are the names inside the dmd2_fast section, for the suggestion.
    """
    _check_names(section, TOP_LEVEL_KEYS, installed_top_level_keys, "", own_sections)
    for key in section:
        if key in REFUSED_KEYS:
            raise ConfigError(f'"{key}" at DeepSpeed\'s top level is refused: {REFUSED_KEYS[key]}.')
    zero = section.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"zero_optimization is {show(zero)}: expected an object {{...}}.")
    _check_names(zero, ZERO_KEYS, installed_zero_keys, "zero_optimization")
    for key in REFUSED_ZERO_KEYS:
        if key in zero and (zero[key] is True or zero[key] not in OFF_VALUES):
            raise ConfigError(
                f"zero_optimization.{key} {show(zero[key])} is not supported: the averaged weights and the networks "
                "gathered for a pass are made from each rank's own plain shards. To offload, write "
                '"offload_param" and "offload_optimizer".'
            )
    for key in OFFLOAD_KEYS:
        _check_offload(key, zero.get(key))
    for name in ("fp16", "bf16", "bfloat16", "torch_autocast"):
        _check_precision(name, section.get(name, {}))
    _check_stage(section, zero)


def _check_stage(section: dict[str, Any], zero: dict[str, Any]) -> None:
    """Raises ConfigError for a stage without an optimizer of ZeRO's, and for keys that mean nothing at a stage."""
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        missing = "" if "stage" in zero else " (DeepSpeed's default)"
        raise ConfigError(
            f"zero_optimization.stage is {show(stage)}{missing}: expected 3 (weights, gradients and optimizer states "
            "are divided over the ranks), 2 (gradients and states) or 1 (states). Stage 0 keeps no f32 weights to "
            'average. Write "zero_optimization": {"stage": 3}; on one rank it costs nothing.'
        )
    if stage == 3:
        return
    meaningless = sorted(STAGE_3_KEYS & zero.keys())
    if meaningless:
        key = meaningless[0]
        raise ConfigError(
            f"zero_optimization.{key} {show(zero[key])} acts on weights that are divided over the ranks, and at stage "
            f"{stage} every rank has all of them: leave it out, or use stage 3. "
            f"--set 'zero_optimization={{\"stage\": {stage}}}' replaces all keys at once."
        )
    if zero.get("compute_grad_norm") is False:
        raise ConfigError(
            "zero_optimization.compute_grad_norm is false: the norm is what tells all ranks to skip a step whose "
            "gradients are not finite. Leave it out."
        )
    if stage == 1 and is_bf16(section):
        raise ConfigError(
            "zero_optimization.stage is 1 and bf16 is enabled: DeepSpeed has another optimizer for the two together, "
            "which keeps all gradients in f32 on every rank and is not supported. Use stage 2, which keeps less."
        )


def _check_offload(key: str, value: Any) -> None:
    """Raises ConfigError for a device that is none, or NVMe without a folder."""
    where = f"zero_optimization.{key}"
    if value is None:
        return
    if not isinstance(value, dict):
        raise ConfigError(f'{where} is {show(value)}: expected an object such as {{"device": "cpu"}}.')
    device = value.get("device")
    if device not in (None, "none", "cpu", "nvme"):
        raise ConfigError(f'{where}.device is {show(device)}: expected "cpu", "nvme" or "none".')
    if device == "nvme" and key == "offload_optimizer":
        raise ConfigError(
            f'{where}.device is "nvme": DeepSpeed {LISTED_VERSION} then updates weights with other gradients than it '
            'computed (plain DeepSpeed differs from itself without it from the second step on). Offload it to "cpu"; '
            "offload_param may go to NVMe."
        )
    if device == "nvme" and not isinstance(value.get("nvme_path"), str):
        raise ConfigError(
            f"{where}.nvme_path is {show(value.get('nvme_path'))}: expected a folder on a local NVMe disk."
        )
    if key == "offload_optimizer" and value.get("ratio", 1.0) != 1.0:
        raise ConfigError(
            f"{where}.ratio is {show(value['ratio'])}: expected 1. Splitting the optimizer between devices takes two "
            "optimizers, which DeepSpeed makes from its own Adam alone."
        )


def _check_async_io(zero: dict[str, Any]) -> None:
    """Raises ConfigError where NVMe is asked for and DeepSpeed cannot reach it."""
    keys = [key for key in OFFLOAD_KEYS if offloaded_to(zero, key) == "nvme"]
    if not keys:
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        raise ConfigError(
            f'zero_optimization.{keys[0]}.device is "nvme", which DeepSpeed reaches through libaio, and libaio or its '
            'headers are missing: install libaio-dev (libaio-devel), or offload to "cpu".'
        )


def offloaded_to(zero: dict[str, Any], key: str) -> str | None:
    """ "cpu", "nvme" or None: where an offload key of a checked `zero_optimization` puts things."""
    device = (zero.get(key) or {}).get("device")
    return None if device == "none" else device


def shards_weights(section: dict[str, Any]) -> bool:
    """Whether each rank keeps its part of the weights alone (ZeRO-3), of a checked section."""
    return section["zero_optimization"]["stage"] == 3


def is_bf16(section: dict[str, Any]) -> bool:
    """Whether networks are kept in bf16."""
    return any(section.get(name, {}).get("enabled", False) for name in ("bf16", "bfloat16"))


def _check_precision(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ConfigError(f'{name} is {show(value)}: expected an object such as {{"enabled": false}}.')
    enabled = value.get("enabled", False)
    if not isinstance(enabled, bool):
        raise ConfigError(f"{name}.enabled is {show(enabled)}: expected true or false.")
    if name == "fp16" and enabled:
        raise ConfigError(
            "fp16.enabled is true: per-element gradients of the losses lie near 1e-5, below f16's normal range. "
            "Use bf16, or leave both out for f32."
        )
    if name == "torch_autocast" and enabled:
        raise ConfigError(
            "torch_autocast.enabled is true: it rounds inside the losses, whose small differences need f32. Use bf16, "
            "which rounds the networks alone."
        )


def resolve_batch(section: dict[str, Any], world_size: int) -> tuple[int, int]:
    """(micro batch, accumulation steps) from any consistent subset of DeepSpeed's three batch keys.

    Raises ConfigError, with numbers that would work, where they do not come out even on `world_size` ranks.
    """
    given: dict[str, int | None] = {}
    for key in BATCH_KEYS:
        value = section.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{key} is {show(value)}: expected a whole number >= 1.")
        given[key] = value
    total, micro, accumulation = (given[key] for key in BATCH_KEYS)
    if total is None:
        if micro is None:
            raise ConfigError(
                "no batch size: give train_batch_size (samples of one update over all ranks) or "
                "train_micro_batch_size_per_gpu (samples of one forward on one rank)."
            )
        return micro, accumulation or 1
    if micro is not None and accumulation is not None:
        if micro * accumulation * world_size != total:
            raise ConfigError(
                f"train_batch_size {total} is not train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps "
                f"{accumulation} x {_ranks(world_size)} = {micro * accumulation * world_size}: "
                "leave one of the three out and it is worked out."
            )
        return micro, accumulation
    known_key, known = (BATCH_KEYS[1], micro) if micro is not None else (BATCH_KEYS[2], accumulation or 1)
    divisor = known * world_size
    if total % divisor:
        raise ConfigError(_does_not_divide(total, known_key if given[known_key] else None, known, world_size))
    other = total // divisor
    return (micro, other) if micro is not None else (other, known)


def _ranks(world_size: int) -> str:
    return "1 rank" if world_size == 1 else f"{world_size} ranks"


def _does_not_divide(total: int, key: str | None, known: int, world_size: int) -> str:
    divisor = known * world_size
    below, above = total // divisor * divisor, -(-total // divisor) * divisor
    totals = f"{above}" if below == 0 else f"{below} or {above}"
    ranks = [n for n in range(1, 2 * world_size + 1) if total % (known * n) == 0]
    other = f", or {' or '.join(map(_ranks, ranks[-4:]))}" if ranks else ""
    by = f"{key} {known} x {_ranks(world_size)} = {divisor}" if key else _ranks(world_size)
    return f"train_batch_size {total} does not divide by {by}: {totals} would work{other}."


def validate_with_deepspeed(section: dict[str, Any], world_size: int = 1) -> None:
    """Let the installed DeepSpeed read its own part, so that a wrong type in it is a message and not a stack trace.

    `check_deepspeed` needs no DeepSpeed; this imports it, which the trainer does anyway. Raises ConfigError.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    micro_batch_size, _ = resolve_batch(section, world_size)
    _check_async_io(section.get("zero_optimization", {}))
    # DeepSpeed knows the number of ranks only once they are connected; the batch has been checked above.
    alone = {key: value for key, value in section.items() if key not in BATCH_KEYS}
    try:
        DeepSpeedConfig({**alone, "train_micro_batch_size_per_gpu": micro_batch_size})
    except (ValueError, TypeError, AssertionError, AttributeError, KeyError) as error:
        lines = [line.strip() for line in str(error).splitlines() if "further information" not in line]
        raise ConfigError(f"DeepSpeed refuses its part of the configuration: {' '.join(lines)}") from None
    except Exception as error:  # DeepSpeed's own error class derives from Exception directly
        if type(error).__name__ != "DeepSpeedConfigError":
            raise
        raise ConfigError(f"DeepSpeed refuses its part of the configuration: {error}") from None
