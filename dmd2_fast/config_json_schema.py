"""The JSON Schema (draft 2020-12) of a configuration file, for editors: completion, hover texts, marks under mistakes.

Made from what `load_config` reads: the annotations in config_schema.py, the texts under its fields, and the key names
in config_deepspeed.py. `configs/dmd2_fast.schema.json` is `schema_text()`, which a test asserts:

    dmd2-fast config --schema > configs/dmd2_fast.schema.json
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from dmd2_fast import config_schema
from dmd2_fast.config import UNET2D_ARGUMENTS
from dmd2_fast.config_deepspeed import (
    BATCH_KEYS,
    LISTED_VERSION,
    OFF_VALUES,
    REFUSED_KEYS,
    REFUSED_ZERO_KEYS,
    STAGE_3_KEYS,
    TOP_LEVEL_KEYS,
    ZERO_KEYS,
)
from dmd2_fast.config_parse import SCHEMA_KEY, SECTION, Length, Range, to_json
from dmd2_fast.config_schema import Section

Schema = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
DESCRIPTION = f"""
A configuration of dmd2_fast: DeepSpeed's own keys (those of {LISTED_VERSION}) and the section "{SECTION}". What this
schema refuses is refused at the start of a run too. The start refuses more, which no schema can say: settings that are
fine one by one and make no sense together, whole numbers written with a point, a batch that does not divide over the
ranks, and what DeepSpeed finds wrong inside its own keys. `dmd2-fast config --config FILE --ranks N` checks all of it.
"""
SCALARS: dict[type, Schema] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string", "minLength": 1},
}
RANGE_WORDS = (("ge", "minimum"), ("gt", "exclusiveMinimum"), ("le", "maximum"), ("lt", "exclusiveMaximum"))


@functools.cache
def field_texts() -> dict[tuple[str, str], str]:
    """(class, field) -> the text under the field in config_schema.py, on one line."""
    texts = {}
    for node in ast.parse(inspect.getsource(config_schema)).body:
        if isinstance(node, ast.ClassDef):
            for item, below in zip(node.body, node.body[1:], strict=False):
                if (
                    isinstance(item, ast.AnnAssign)
                    and isinstance(item.target, ast.Name)
                    and isinstance(below, ast.Expr)
                    and isinstance(below.value, ast.Constant)
                ):
                    texts[node.name, item.target.id] = " ".join(str(below.value.value).split())
    return texts


def _is_required(kind: Any, default: Any) -> bool:
    """Whether `parse` refuses an object without this field: a section may be left out if nothing in it is required."""
    if default is not MISSING:
        return False
    if not is_dataclass(kind):
        return True
    hints = get_type_hints(kind, include_extras=True)
    return any(_is_required(hints[item.name], item.default) for item in fields(kind))


def _object(properties: Schema, required: list[str] | None = None) -> Schema:
    names = {"required": required} if required else {}
    return {"type": "object", "properties": properties, **names, "additionalProperties": False}


def _dataclass(cls: Any, default: Any) -> Schema:
    """A section; `default` is the instance whose fields stand in for missing keys, as in `parse`."""
    hints, properties, required = get_type_hints(cls, include_extras=True), {}, []
    for item in fields(cls):
        fallback = item.default if default in (MISSING, None) else getattr(default, item.name)
        entry = {"description": field_texts()[cls.__name__, item.name], **schema_of(hints[item.name], fallback)}
        if fallback is not MISSING and not is_dataclass(fallback):
            entry["default"] = to_json(fallback)
        properties[item.name] = entry
        if _is_required(hints[item.name], fallback):
            required.append(item.name)
    if cls is config_schema.TeacherTrainingConfig:  # as load_config checks it: diffusers' names are no field's
        network = properties["network"]
        network.update(properties={name: {} for name in sorted(UNET2D_ARGUMENTS)}, additionalProperties=False)
    group = getattr(cls, "json_group", None)
    if group is None:
        return _object(properties, required)
    return _object({"type": properties.pop("type"), group: _object(properties, required)})


def schema_of(kind: Any, default: Any = MISSING) -> Schema:
    """The schema of what `config_parse.parse(kind, ...)` accepts."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        schema = schema_of(arguments[0], default)
        for limit in arguments[1:]:
            if isinstance(limit, Range):
                schema |= {word: bound for name, word in RANGE_WORDS if (bound := getattr(limit, name)) is not None}
            elif isinstance(limit, Length):
                schema["minItems" if schema["type"] == "array" else "minProperties"] = limit.minimum
        return schema
    if origin in (Union, types.UnionType):
        inner = next(item for item in arguments if item is not type(None))
        return {"anyOf": [schema_of(inner, default), {"type": "null"}]}
    if is_dataclass(kind):
        return _dataclass(kind, default)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return {"type": "array", "items": schema_of(arguments[0])}
        entries = [schema_of(item) for item in arguments]
        return {"type": "array", "prefixItems": entries, "items": False, "minItems": len(entries)}
    if origin is dict:
        return {"type": "object"}
    return dict(SCALARS[kind])


def _switch(**enabled: Any) -> Schema:
    return {"type": "object", "properties": {"enabled": enabled or {"type": "boolean"}}}


def _offload(devices: list[Any], **more: Any) -> Schema:
    target = {"type": "object", "properties": {"device": {"enum": devices}, **more}}
    return {"anyOf": [target, {"type": "null"}]}


def _zero_optimization() -> Schema:
    """`zero_optimization` as `check_deepspeed` takes it."""
    keys: Schema = {key: {} for key in sorted(ZERO_KEYS)}
    for key in REFUSED_ZERO_KEYS:
        # 0 and 0.0 equal false in Python, and 1 equals true: only JSON's own true is refused.
        keys[key] = {"description": "Not supported: off only.", "enum": [*OFF_VALUES, 0]}
    divided = (
        "Divided over the ranks: at 3 weights, gradients and optimizer states, at 2 the last two, at 1 the states."
    )
    keys["stage"] = {"description": divided, "enum": [1, 2, 3]}
    keys["offload_param"] = _offload([None, "none", "cpu", "nvme"])
    keys["offload_param"]["anyOf"][0] |= {
        "if": {"properties": {"device": {"const": "nvme"}}, "required": ["device"]},
        "then": {"properties": {"nvme_path": {"type": "string"}}, "required": ["nvme_path"]},
    }
    keys["offload_optimizer"] = _offload([None, "none", "cpu"], ratio={"const": 1})
    whole = {
        "properties": {**dict.fromkeys(sorted(STAGE_3_KEYS), False), "compute_grad_norm": {"not": {"const": False}}}
    }
    below_3 = {"if": {"properties": {"stage": {"enum": [1, 2]}}, "required": ["stage"]}, "then": whole}
    return {"description": "DeepSpeed's ZeRO.", **_object(keys, ["stage"]), **below_3}


BATCH_TEXTS = {
    "train_batch_size": "Samples of one update over all ranks.",
    "train_micro_batch_size_per_gpu": "Samples of one forward on one rank.",
    "gradient_accumulation_steps": "Forwards of each rank that make one update; left out, it follows from the others.",
}


def config_schema_document() -> Schema:
    """The schema of a whole configuration file."""
    deepspeed: Schema = {key: {"description": "DeepSpeed's."} for key in sorted(TOP_LEVEL_KEYS - REFUSED_KEYS.keys())}
    for key in BATCH_KEYS:
        count = {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]}
        deepspeed[key] = {"description": BATCH_TEXTS[key], **count}
    deepspeed["zero_optimization"] = _zero_optimization()
    for key in ("bf16", "bfloat16"):
        deepspeed[key] = {"description": "Networks in bf16, losses and masters in f32.", **_switch()}
    for key in ("fp16", "torch_autocast"):
        deepspeed[key] = {"description": "Not supported: use bf16.", **_switch(const=False)}
    section = {"description": "Everything that is not DeepSpeed's.", **schema_of(Section)}
    named = {SCHEMA_KEY: {"description": "This schema, for editors."}, **deepspeed, SECTION: section}
    given = [{"properties": {key: {"type": "integer"}}, "required": [key]} for key in BATCH_KEYS[:2]]
    return {
        SCHEMA_KEY: DIALECT,
        "title": "dmd2_fast",
        "description": " ".join(DESCRIPTION.split()),
        **_object(named, ["zero_optimization", SECTION]),
        "anyOf": given,
    }


def schema_text() -> str:
    """The schema as the file that is shipped."""
    return json.dumps(config_schema_document(), indent=1) + "\n"
