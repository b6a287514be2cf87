"""`make ablations`: which runs there are and how long, what the page says of their figures, what a failure leaves."""

import json
import shutil
from dataclasses import replace

import pytest
from tiny import ROOT, tiny_denoiser

from dmd2_fast import ablations, results
from dmd2_fast.ablations import COMMON, ROWS, Run, collect, execute_all, main, make_plan, of_length
from dmd2_fast.ablations_page import Comparison, Outcome, Row, section, sentence, table
from dmd2_fast.config import load_config
from dmd2_fast.errors import RunFolderError
from dmd2_fast.networks import save_denoiser
from dmd2_fast.runs import load_run_config

TTUR_OFF, GAN_OFF = (
    next(row for row in ROWS["4-step"] if row.name == f"{name} off") for name in ("two time-scale rule", "GAN")
)


def figures(fd=0.3, **others):
    return {"fd": fd, "fd_pixels": 1.0, "precision": 0.9, "recall": 0.8, "cpu": 10.0, **others}


def outcome(row, fds, **others):
    return Outcome(row, 80.0, 400, 1.0, {seed: figures(fd, **others) for seed, fd in enumerate(fds)})


DEFAULT = outcome(Row("default"), [0.3, 0.4, 0.5])


# --- the runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ROWS)
def test_every_row_is_a_configuration(kind):
    for row in ROWS[kind]:
        config = load_config(ROOT / results.CONFIGS[kind], [*COMMON, *row.overrides])
        assert (config == load_config(ROOT / results.CONFIGS[kind], COMMON)) == (row == ablations.DEFAULT)
    assert len({row.name for row in ROWS[kind]}) == len(ROWS[kind])


def test_schedules_keep_their_share_of_the_run():
    """Half the updates: half the warm-up, and an average that forgets twice as fast; a fifth of the iterations at
    ratio 1 for the same updates."""
    full = load_config(ROOT / "ds_digits.json")
    half = load_config(ROOT / "ds_digits.json", of_length(full, 100, 500))
    assert half.run.iterations == 500
    assert half.generator.lr_scheduler.warmup_iterations == half.fake_score.lr_scheduler.warmup_iterations == 25
    assert half.generator.ema == pytest.approx(0.985**2, rel=1e-6)
    short = load_config(ROOT / "ds_digits.json", of_length(full, 200, 200))
    assert short.generator.lr_scheduler.warmup_iterations == 10
    assert short.generator.ema == pytest.approx(0.985, rel=1e-6)


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """A current folder in which the defaults' configurations are, and a small teacher where they have theirs."""
    shutil.copy(ROOT / "ds_digits.json", tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    save_denoiser(tiny_denoiser(), tmp_path / "runs/digits-teacher")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_budgets(digits, monkeypatch):
    """Equal updates, and equal FLOPs where they differ: the rows of a cycle at ratio 1 are part of those at ratio 5."""
    monkeypatch.setattr(
        ablations, "ROWS", {"4-step": (ablations.DEFAULT, TTUR_OFF, GAN_OFF, Row("same", ("run.seed=7",)))}
    )
    planned = {(item.outcome.row.name, item.budget): item for item in make_plan("4-step", seeds=(0, 1))}
    names = [("DMD2 (default)", "updates"), (TTUR_OFF.name, "updates"), (TTUR_OFF.name, "compute")]
    assert list(planned) == [*names, (GAN_OFF.name, "updates"), (GAN_OFF.name, "compute"), ("same", "updates")]
    updates = ablations.UPDATES["4-step"]
    default, short, long = (planned[name].outcome for name in names)
    assert (default.iterations, default.flops) == (5 * updates, 1) and short.iterations == updates
    # R - 1 = 4 rollouts of 3 forwards and 4 updates of the fake score are missing: more than two thirds of the cycle.
    assert 0.2 < short.flops < 1 / 3
    assert long.flops == pytest.approx(1) and long.updates == pytest.approx(updates / short.flops)
    assert long.iterations == round(long.updates)
    for item in planned.values():
        for seed, run in item.runs.items():
            config = load_config(run.config, run.overrides)
            assert (config.run.seed, config.run.folder) == (seed, str(run.folder))
            assert config.run.iterations == item.outcome.iterations


# --- running them ----------------------------------------------------------------------------------------------------


@pytest.fixture
def two_runs(world, monkeypatch):
    """The default on tiny networks, and a row that cannot be trained; half of the default's run is there already."""
    monkeypatch.setattr(results, "OUT", world / "docs" / "results.md")
    for module in (ablations, results):
        monkeypatch.setattr(module, "CONFIGS", {"4-step": "c.json"})
    monkeypatch.setattr(ablations, "UPDATES", {"4-step": 2})
    rows = (ablations.DEFAULT, Row("broken", ("data.path=nowhere", "run.seed=1")))
    monkeypatch.setattr(ablations, "ROWS", {"4-step": rows})
    monkeypatch.setattr(ablations, "COMMON", ("run.progress=false", "run.sample_interval=0", "run.num_samples=40"))
    plan = ablations.make_plan
    monkeypatch.setattr(ablations, "make_plan", lambda kind: plan(kind, seeds=(3,)))
    return world


def test_a_failing_run_costs_the_others_nothing(two_runs, capsys):
    """The exit code and a message tell; the page has what there is. A second call runs only what is missing."""
    (two_runs / "docs").mkdir()
    (two_runs / "docs/results.md").write_text("# Results\n")
    assert main([]) == 1
    folder = two_runs / "runs/ablations/4-step-dmd2-default-updates-seed3"
    summary = json.loads((folder / "summary.json").read_text())
    assert [row["network"] for row in summary["rows"]] == ["generator"] and 0 < summary["time"]["cpu"] < 100
    assert load_run_config(folder).run.iterations == 10
    text = (two_runs / "docs/results.md").read_text()
    assert text.startswith("# Results\n\n<!-- Below") and f"{summary['rows'][0]['fd']:.3f} (" in text
    assert "| broken | 2 | 10 | 1.00 | no run" in text
    error = capsys.readouterr().err
    assert "4-step-broken-updates-seed3: training ended with exit code 2" in error
    assert "nowhere" in (two_runs / "runs/ablations/4-step-broken-updates-seed3.log").read_text()

    before = (folder / "generator.safetensors").stat().st_mtime_ns
    other = Run(folder.name, "c.json", (f"run.folder={folder}", "run.iterations=11"))
    with pytest.raises(RunFolderError, match=r"run\.iterations"):
        execute_all([other])
    assert (folder / "generator.safetensors").stat().st_mtime_ns == before


def test_without_a_teacher(tmp_path, monkeypatch, capsys):
    shutil.copy(ROOT / "ds_digits.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main([]) == 2
    assert "`make ablations` trains it first" in capsys.readouterr().err


def test_collect_reads_what_is_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "FOLDER", tmp_path)
    runs = {seed: Run(f"r{seed}", "c.json", ()) for seed in (0, 1)}
    (tmp_path / "r1").mkdir()
    rows = [{"network": "teacher", "fd": 9.0}, {"network": "generator", "fd": 0.5}]
    (tmp_path / "r1/summary.json").write_text(json.dumps({"rows": rows, "time": {"cpu": 7.0}}))
    planned = ablations.Planned("4-step", "updates", replace(DEFAULT, figures={}), runs)
    ((found,),) = (budgets["updates"] for budgets in collect([planned]).values())
    assert set(found.figures) == {1} and (found.figures[1]["fd"], found.figures[1]["cpu"]) == (0.5, 7.0)


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("fd", [0.2, 0.5, 0.5], (1, 1, 3)),
        ("fd", [0.2, 0.2], (2, 0, 2)),
        ("fd", [], (0, 0, 0)),
        ("recall", [0.7, 0.9, 0.7], (1, 2, 3)),
    ],
)
def test_comparison_is_seed_by_seed(column, values, expected):
    mine = Outcome(Row("x"), 1.0, 1, 1.0, {seed: figures(**{column: value}) for seed, value in enumerate(values)})
    assert Comparison.of(mine, DEFAULT, column) == Comparison(*expected)


def test_table_has_means_ranges_and_signs():
    lines = table([DEFAULT, outcome(Row("x"), [0.2, 0.5, 0.8], recall=0.7)], DEFAULT)
    assert "| default | 80 | 400 | 1.00 | 0.400 (0.300-0.500) |" in lines[2] and "/" not in lines[2]
    assert "| 0.500 (0.200-0.800) 1/2 | 0.900 (0.900-0.900) 0/0 | 0.700 (0.700-0.700) 0/3 |" in lines[3]
    assert lines[3].endswith("| 10 (10-10) |")
    assert len({line.count("|") for line in lines}) == 1


def test_sentences_follow_the_signs():
    """Whether a paper is confirmed is said only where all seeds agree."""
    worse, better, mixed = Comparison(0, 3, 3), Comparison(3, 0, 3), Comparison(1, 2, 3)
    row = Row("r", (), "worse", "DMD2")
    assert sentence(row, {"updates": worse, "compute": better}) == (
        "- r: worse in 3 of 3 seeds at equal generator updates, as in DMD2; "
        "better in 3 of 3 seeds at equal compute, against DMD2."
    )
    assert sentence(row, {"updates": mixed}) == (
        "- r: better in 1 and worse in 2 of 3 seeds at equal generator updates and compute (DMD2: worse)."
    )
    assert (
        sentence(Row("r"), {"updates": worse}) == "- r: worse in 3 of 3 seeds at equal generator updates and compute."
    )


def test_section_marks_what_was_not_run_again():
    rows = [Row("a", ("x.y=1",)), Row("b", ("x.y=2",))]
    first = [DEFAULT, *(outcome(row, [0.2, 0.2, 0.2]) for row in rows)]
    again = replace(outcome(rows[1], [0.9, 0.9, 0.9]), iterations=555)
    summary = {
        "machine": {"cpu": "some CPU", "threads": 1},
        "versions": {"torch": "2", "deepspeed": "0", "diffusers": "1"},
    }
    text = section({"4-step": {"updates": first, "compute": [again]}}, {"4-step": "c.json"}, summary)
    at_updates, at_compute = text.split("At equal generator updates:")[1].split("At equal compute (")
    assert "| a | 80 | 400" in at_updates and "| a = | 80 | 400" in at_compute and "| b | 80 | 555" in at_compute
    assert "| default | 80" in at_compute and "seeds 0, 1, 2" in text and "some CPU" in text
    assert "- b: better in 3 of 3 seeds at equal generator updates; worse in 3 of 3 seeds at equal compute." in text
    assert "- a: better in 3 of 3 seeds at equal generator updates and compute." in text
    assert "| b | `x.y=2` |" in text
