"""docs/results.md says the means of what the runs' summaries hold."""

import pytest

from dmd2_fast import results
from dmd2_fast.results import COLUMNS, find, page


def summary(seed):
    def row(network, evaluations, fd):
        return {"network": network, "evaluations": evaluations, **dict.fromkeys(COLUMNS, 1.0), "fd": fd}

    rows = [row("teacher", 35, 0.4), row("teacher", 4, 1.0), row("generator", 4, 0.5 + 0.1 * seed)]
    return {
        "floor_row": dict.fromkeys(COLUMNS[:-1], 0.25),
        "rows": rows,
        "machine": {"cpu": "some CPU", "threads": 2},
        "versions": {"torch": "2", "deepspeed": "0", "diffusers": "1"},
        "time": {"distil": 60.0 * (seed + 1)},
    }


def test_page_holds_means_ranges_and_ratios():
    text = page({"4-step": [summary(seed) for seed in range(3)]})
    generator = next(line for line in text.splitlines() if line.startswith("| generator"))
    assert "0.600 (0.500-0.700)" in generator
    assert "at 35 evaluations: 1.50; at 4: 0.600" in text
    assert "took 2.0 minutes a run" in text and "some CPU, 2 threads" in text
    assert "| floor: training digits | | 0.250" in text


def test_find_picks_the_row():
    assert find(summary(0), "teacher", 4)["fd"] == 1.0
    with pytest.raises(StopIteration):
        find(summary(0), "teacher", 8)


def test_each_script_rewrites_its_own_part(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "OUT", tmp_path / "docs" / "results.md")
    results.write_above("# Results\n\nfirst\n")
    assert results.OUT.read_text() == "# Results\n\nfirst\n"
    results.write_below("## Ablations\n\nsecond\n")
    whole = f"# Results\n\nfirst\n\n{results.MARKER}\n## Ablations\n\nsecond\n"
    assert results.OUT.read_text() == whole
    results.write_above("# Results\n\nthird\n")
    assert results.OUT.read_text() == whole.replace("first", "third")
    results.write_below("## Ablations\n\nfourth\n")
    results.write_below("## Ablations\n\nfourth\n")
    assert results.OUT.read_text() == whole.replace("first", "third").replace("second", "fourth")
