"""Strict reading of JSON into dataclasses: every message names the dotted key, what came and what was expected."""

from __future__ import annotations

import copy
import difflib
import json
import math
import types
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from dmd2_fast.errors import ConfigError

SECTION = "dmd2_fast"
SCHEMA_KEY = "$schema"
"""Names the JSON Schema to editors, at the top of a file; nothing else reads it, and nothing is different for it."""

MAX_DIGITS = 40
"""More than any setting needs; Python refuses to read some thousands."""


@dataclass(frozen=True)
class Range:
    """Limits of a number, for `Annotated`."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def __str__(self) -> str:
        pairs = ((">=", self.ge), (">", self.gt), ("<=", self.le), ("<", self.lt))
        return " and ".join(f"{sign} {_number(limit)}" for sign, limit in pairs if limit is not None)

    def holds(self, value: float) -> bool:
        """Whether the value lies inside."""
        return not (
            (self.ge is not None and value < self.ge)
            or (self.gt is not None and value <= self.gt)
            or (self.le is not None and value > self.le)
            or (self.lt is not None and value >= self.lt)
        )


@dataclass(frozen=True)
class Length:
    """Fewest entries of a list or object, for `Annotated`."""

    minimum: int


def _number(value: float) -> str:
    return "2^63" if value == 2**63 else f"{value:g}"


def show(value: Any) -> str:
    """A value as JSON, cut to a length that fits a message."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def suggestion(name: str, known: Iterable[str]) -> str:
    """` (did you mean "x"?)`, or nothing where no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f' (did you mean "{near[0]}"?)' if near else ""


def field_names(cls: type) -> list[str]:
    """The keys of a section's JSON object."""
    return [item.name for item in fields(cls)]


def parse(kind: Any, value: Any, path: str, default: Any = MISSING) -> Any:
    """`value`, read from JSON, as `kind`.

    `default` is the instance whose fields stand in for missing keys of a dataclass. Raises ConfigError with `path`.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        parsed = parse(arguments[0], value, path, default)
        for limit in arguments[1:]:
            _check_limit(limit, parsed, path)
        return parsed
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return parse(next(item for item in arguments if item is not type(None)), value, path, default)
    if kind is None or kind is type(None):
        if value is not None:
            raise ConfigError(f"{path} is {show(value)}: this release has only null here.")
        return None
    if is_dataclass(kind):
        return _parse_dataclass(kind, value, path, default)
    if origin is Literal:
        return _parse_choice(arguments, value, path)
    if origin is tuple:
        return _parse_list(arguments, value, path)
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{path} is {show(value)}: expected an object {{...}}.")
        return copy.deepcopy(value)
    return _parse_scalar(kind, value, path)


def _check_limit(limit: Any, value: Any, path: str) -> None:
    if isinstance(limit, Range) and value is not None and not limit.holds(value):
        raise ConfigError(f"{path} is {show(value)}: expected a value {limit}.")
    if isinstance(limit, Length) and len(value) < limit.minimum:
        raise ConfigError(f"{path} is empty: expected at least {limit.minimum} entry.")


def _parse_scalar(kind: type, value: Any, path: str) -> Any:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{path} is {show(value)}: expected {names[kind]}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path} is {value}: expected a finite number.")
    if kind is str and not value:
        raise ConfigError(f"{path} is empty: expected a string with something in it.")
    if isinstance(value, str) and ("\0" in value or _has_surrogates(value)):
        raise ConfigError(f"{path} is {value!r}: expected text that can be written to a file.")
    return value


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _parse_choice(choices: Sequence[Any], value: Any, path: str) -> Any:
    if not isinstance(value, str) or value not in choices:
        listed = " or ".join(f'"{item}"' for item in choices)
        near = suggestion(value, choices) if isinstance(value, str) and len(choices) > 1 else ""
        raise ConfigError(f"{path} is {show(value)}: expected {listed}{near}.")
    return value


def _parse_list(arguments: Sequence[Any], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{path} is {show(value)}: expected a list.")
    if arguments[-1] is Ellipsis:
        kinds: Sequence[Any] = [arguments[0]] * len(value)
    else:
        kinds = arguments
        if len(value) != len(kinds):
            raise ConfigError(f"{path} is {show(value)}: expected a list of {len(kinds)} entries.")
    return tuple(parse(kind, item, f"{path}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _parse_dataclass(cls: Any, value: Any, path: str, default: Any) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is {show(value)}: expected an object {{...}}.")
    group = getattr(cls, "json_group", None)
    names = field_names(cls)
    if group is not None:
        value = _ungroup(names, group, value, path)
    hints = get_type_hints(cls, include_extras=True)
    result: dict[str, Any] = {}
    for name in value:
        if name not in names:
            raise ConfigError(f'unknown key "{path}.{name}"{suggestion(name, names)}. Known here: {", ".join(names)}.')
    for item in fields(cls):
        fallback = getattr(default, item.name) if default is not MISSING and default is not None else item.default
        inside = f"{path}.{group}.{item.name}" if group and item.name != "type" else f"{path}.{item.name}"
        if item.name in value:
            result[item.name] = parse(hints[item.name], value[item.name], inside, fallback)
        elif fallback is not MISSING:
            result[item.name] = fallback
        elif is_dataclass(hints[item.name]):
            # A required section that is left out: name the keys inside it that are missing.
            result[item.name] = parse(hints[item.name], {}, inside)
        else:
            raise ConfigError(f"{inside} is missing: it has no default.")
    return cls(**result)


def _ungroup(names: list[str], group: str, value: dict[str, Any], path: str) -> dict[str, Any]:
    """`{"type": ..., "params": {...}}` as one flat object."""
    for name in value:
        if name not in ("type", group):
            hint = f" (it goes into {path}.{group})" if name in names else suggestion(name, ("type", group))
            raise ConfigError(f'unknown key "{path}.{name}"{hint}. Known here: type, {group}.')
    params = value.get(group, {})
    if not isinstance(params, dict):
        raise ConfigError(f"{path}.{group} is {show(params)}: expected an object {{...}}.")
    inner = [name for name in names if name != "type"]
    for name in params:
        if name not in inner:
            raise ConfigError(
                f'unknown key "{path}.{group}.{name}"{suggestion(name, inner)}. Known here: {", ".join(inner)}.'
            )
    return {**({"type": value["type"]} if "type" in value else {}), **params}


def to_json(value: Any, cls: type | None = None) -> Any:
    """The JSON that `parse` reads back to the same value; `cls` cuts a dataclass to the fields of a base class."""
    if is_dataclass(value) and not isinstance(value, type):
        flat = {item.name: to_json(getattr(value, item.name)) for item in fields(cls or type(value))}
        group = getattr(value, "json_group", None)
        return flat if group is None else {"type": flat.pop("type"), group: flat}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    return value


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ConfigError(f'the key "{key}" stands twice in one object: only one of the two values can be meant.')
        result[key] = value
    return result


def _refuse_non_finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ConfigError(f"{text} is no finite number: expected one that fits a 64-bit float.")
    return value


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ConfigError(f"{text[:MAX_DIGITS]}... has {len(text)} digits: no setting takes a number that large.")
    return int(text)


def loads(text: str) -> Any:
    """JSON with duplicate keys and non-finite numbers refused (ConfigError; malformed text as json.JSONDecodeError)."""
    return json.loads(
        text,
        object_pairs_hook=_refuse_duplicates,
        parse_constant=_refuse_non_finite,
        parse_int=_whole,
        parse_float=_refuse_non_finite,
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError with line and column for malformed text."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file. Is the path right from the current folder?") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the configuration cannot be read: {error}.") from None
    try:
        value = loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}.") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply to be a configuration.") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds {show(value)}: expected an object {{...}}.")
    return value


def apply_overrides(raw: dict[str, Any], overrides: Iterable[str], own_sections: Iterable[str]) -> dict[str, Any]:
    """A copy of `raw` with `dotted.key=value` written in; the `dmd2_fast.` prefix may be left out.

    The value is JSON, or else the text itself. Raises ConfigError for a text without "=" and for a path through a
    value that is no object.
    """
    result = copy.deepcopy(raw)
    own = set(own_sections)
    for text in overrides:
        key, equals, value_text = text.partition("=")
        names = key.strip().split(".")
        if not equals or not all(names):
            raise ConfigError(f'--set {text}: expected dotted.key=value, such as "--set run.iterations=500".')
        try:
            value = loads(value_text)
        except json.JSONDecodeError:
            value = value_text
        except ConfigError as error:
            raise ConfigError(f"--set {text}: {error}") from None
        if names[0] in own:
            names = [SECTION, *names]
        target = result
        for depth, name in enumerate(names[:-1]):
            if target.get(name) is None:
                target[name] = {}
            target = target[name]
            if not isinstance(target, dict):
                raise ConfigError(f"--set {text}: {'.'.join(names[: depth + 1])} is {show(target)}, not an object.")
        target[names[-1]] = value
    return result
