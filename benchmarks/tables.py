"""The tables of the benchmarks, made from records: one a measurement, as conftest.py writes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.harness import duration, markdown

OTHERS = {"reference": "reference", "compiled": "torch.compile", "dmd2": "DMD2 eager", "fastgen": "FastGen eager"}
HOW = (
    "Shortest time a call; vs x: how many times faster ours is than x. Limit: a memory copy of the least bytes that\n"
    "have to move, or where noise is drawn from a key the random numbers alone, measured in this run."
)


def environment_line(records: Iterable[dict[str, Any]]) -> str:
    """Device, threads and versions of the records, each value that occurs."""
    keys = {"device": "", "threads": "threads ", "torch": "torch ", "triton": "triton ", "dmd2_fast": "dmd2_fast "}
    parts = []
    for key, prefix in keys.items():
        values = dict.fromkeys(str(record.get(key) or "none") for record in records)
        parts.append(prefix + " / ".join(values))
    return ", ".join(parts)


def by_case(records: Iterable[dict[str, Any]]) -> dict[tuple[str, ...], dict[str, dict[str, Any]]]:
    """{(operator, size, dtype, direction): {contestant: record}}, in the order met."""
    cases: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for record in records:
        key = tuple(record[name] for name in ("operator", "size", "dtype", "direction"))
        cases.setdefault(key, {})[record["contestant"]] = record
    return cases


def summary(records: list[dict[str, Any]]) -> str:
    """One line a case: ours, its share of the limit, and how many times faster than each other contestant it is."""
    rows = []
    for key, contestants in by_case(records).items():
        ours = contestants.get("ours")
        if ours is None:
            continue
        ratios = []
        for name in OTHERS:
            other = contestants.get(name)
            ratios.append(f"{other['seconds'] / ours['seconds']:.2f}" if other else "")
        cells = [duration(ours["seconds"]), f"{ours['GB/s']:.1f}", f"{ours['share_of_limit']:.0%}"]
        rows.append([*key, ours["backend"], *cells, *ratios])
    header = ["operator", "size", "dtype", "direction", "backend", "ours", "GB/s", "of limit"]
    header += map("vs {}".format, OTHERS.values())
    return "\n".join([markdown(header, rows), "", HOW, environment_line(records)])
