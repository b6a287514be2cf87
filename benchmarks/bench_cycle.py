"""A 1:5 cycle on the digits' network, ours and its rivals': see benchmarks/cycle.py, which counts and compares too."""

from __future__ import annotations

import pytest

from benchmarks import cycle

SIZE = 4


@pytest.mark.parametrize("contestant", ["ours", "theirs"])
@pytest.mark.parametrize("rival", cycle.STEPS)
def test_cycle(benchmark, rival, contestant):
    batch = cycle.make_batch(cycle.make_networks("digits")[0][0], SIZE)
    made = cycle.Ours("digits", rival) if contestant == "ours" else cycle.make_rival("digits", rival)
    benchmark.group = f"1:5 cycle, digits, batch {SIZE}, f32, against {rival}"
    rounds = (1, 0) if benchmark.disabled else (5, 1)
    benchmark.pedantic(
        made.cycle, args=(batch, cycle.indices(cycle.STEPS[rival])), rounds=rounds[0], warmup_rounds=rounds[1]
    )
