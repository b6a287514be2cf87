"""Functions and methods of another package replaced by ours of the same signature, and put back again."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

Function = Callable[..., Any]


@dataclass(frozen=True)
class Report:
    """Where ours are now, and what was left alone."""

    swapped: tuple[str, ...]
    """Places as module.name or module.Class.name."""
    left: dict[str, str]
    """The reason, by place."""

    def __str__(self) -> str:
        lines = [f"swapped  {place}" for place in self.swapped]
        return "\n".join(lines + [f"left     {place}: {reason}" for place, reason in self.left.items()])


class Patches:
    """What is replaced in one package. Functions are found by identity in all its modules, methods in their classes."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.functions: dict[str, tuple[Function, Function]] = {}
        self.methods: dict[tuple[type, str], tuple[Function, Function]] = {}
        self.left: dict[str, str] = {}

    def add_function(self, module: ModuleType, name: str, ours: Function) -> None:
        """Replace what `module` has under `name`, wherever the package holds the same object."""
        original, known = getattr(module, name, None), self.functions.get(name)
        if known and original is known[1]:
            return
        if reason := mismatch(original, ours):
            self.left[f"{module.__name__}.{name}"] = reason
        else:
            assert original is not None
            self.functions[name] = original, ours

    def add_methods(self, module: ModuleType, name: str, ours: Function) -> None:
        """Replace the method in every class of the module that defines it itself."""
        for kind in {value: None for value in vars(module).values() if isinstance(value, type)}:
            original, known = vars(kind).get(name), self.methods.get((kind, name))
            if original is None or (known and original is known[1]):
                continue
            if reason := mismatch(original, ours):
                self.left[place(kind, name)] = reason
            else:
                self.methods[kind, name] = original, ours

    def apply(self, left: dict[str, str]) -> Report:
        """Replace all that was added; `left` is what the caller has left alone."""
        self._replace(self.functions.values())
        for (kind, name), (_, ours) in self.methods.items():
            setattr(kind, name, ours)
        ours_of = {id(ours) for _, ours in self.functions.values()}
        swapped = [f"{module.__name__}.{name}" for module, name, value in self._names() if id(value) in ours_of]
        return Report((*swapped, *(place(*key) for key in self.methods)), {**left, **self.left})

    def undo(self) -> None:
        """Put every original back where ours is."""
        self._replace((ours, original) for original, ours in self.functions.values())
        for (kind, name), (original, ours) in self.methods.items():
            if vars(kind).get(name) is ours:
                setattr(kind, name, original)

    def _replace(self, pairs: Iterable[tuple[Function, Function]]) -> None:
        by_id = {id(old): new for old, new in pairs}
        for module, name, value in list(self._names()):
            if id(value) in by_id:
                setattr(module, name, by_id[id(value)])

    def _names(self) -> Iterator[tuple[ModuleType, str, Any]]:
        """(module, name, value) of everything in the package's modules."""
        for path, module in sorted(sys.modules.items()):
            if isinstance(module, ModuleType) and f"{path}.".startswith(f"{self.package}."):
                yield from ((module, name, value) for name, value in list(vars(module).items()))


def place(kind: type, name: str) -> str:
    """module.Class.name."""
    return f"{kind.__module__}.{kind.__qualname__}.{name}"


def mismatch(original: Any, ours: Function) -> str:
    """Why ours cannot stand in for the original; "" where it can."""
    if original is None:
        return "there is none"
    if not inspect.isfunction(original) or getattr(original, "__isabstractmethod__", False):
        return "not a plain function"
    names, expected = (", ".join(inspect.signature(function).parameters) for function in (original, ours))
    return "" if names == expected else f"takes ({names}), ours ({expected})"


def import_all(names: Iterable[str]) -> dict[str, str]:
    """Import modules; the reasons of those that do not."""
    reasons = {}
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # without a GPU, packages that modules import raise all kinds
            reasons[name] = f"does not import: {type(error).__name__}: {error}"
    return reasons
