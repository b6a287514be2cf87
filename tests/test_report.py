"""report.html: the page a browser shows, its numbers, what happens when parts are missing, and the text table."""

import html
import itertools
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from dmd2_fast.report import duration, format_table, render_report, write_report
from dmd2_fast.report_svg import (
    MAX_POINTS,
    Axis,
    Curve,
    Guide,
    line_chart,
    number,
    share_bar,
    smooth,
    thin,
    value_axis,
)

HOSTILE = '</pre><script>document.title = "owned"</script><img src=x onerror="document.title=\'owned\'">'

ROWS = [
    ("teacher", 35, 0.381, 11.2, 0.971, 0.882, 0.903, 2.31, 14.6),
    ("teacher", 8, 0.912, 12.9, 0.962, 0.861, 0.874, 2.35, 3.31),
    ("teacher", 4, 1.583, 15.1, 0.951, 0.812, 0.821, 2.44, 1.67),
    ("teacher", 1, 5.911, 41.0, 0.712, 0.313, 0.204, 3.10, 0.42),
    ("undistilled", 4, 3.210, 28.8, 0.861, 0.655, 0.512, 2.80, 1.68),
    ("generator", 4, 0.524, 12.0, 0.982, 0.921, 0.803, 2.22, 1.66),
]
KEYS = ("network", "evaluations", "fd", "fd_pixels", "accuracy", "precision", "recall", "nearest_training", "seconds")
FLOOR = {"fd": 0.271, "fd_pixels": 9.8, "accuracy": 0.985, "precision": 0.93, "recall": 0.94, "nearest_training": 2.27}


def make_summary():
    return {
        "floor": FLOOR["fd"],
        "floor_row": FLOOR,
        "rows": [dict(zip(KEYS, row, strict=True)) for row in ROWS],
        "seed": 0,
        "iterations": 1000,
        "machine": {"cpu": "An imaginary processor", "cores": 2, "gpu": None},
        "versions": {"python": "3.12.1", "torch": "2.13.0", "<u>key": "<u>value"},
        "command": f"deepspeed train.py --config ds_digits.json --set note={HOSTILE}",
        "time": {"training": 214.5},
    }


def make_record(i):
    wobble = math.sin(i * 1.7) + 0.5 * math.sin(i * 0.31)
    decay = math.exp(-i / 260)
    return {
        "iteration": i,
        "time": i * 0.21,
        "generator/loss": 0.6 + 2.2 * decay + 0.06 * wobble,
        "generator/dmd": 0.45 + 2 * decay + 0.05 * wobble,
        "generator/gan": 0.7 + 0.08 * wobble,
        "fake_score/loss": 0.5 + decay + 0.05 * wobble,
        "fake_score/denoising": 0.37 + decay,
        "fake_score/gan": 1.3 + 0.1 * wobble,
        "fake_score/r1": 0.0,
        "generator/grad_norm": 30 * decay + 0.4 + 0.1 * wobble,
        "fake_score/grad_norm": 3 + 40 * decay + wobble,
        "generator/lr": 2e-4 * min(i / 50, 0.55 + 0.45 * math.cos(math.pi * i / 1000)),
        "fake_score/lr": 5e-4 * min(i / 50, 0.55 + 0.45 * math.cos(math.pi * i / 1000)),
        "logits/real": 0.4 + 0.2 * wobble,
        "logits/fake": -0.4 + 0.15 * wobble,
        "skipped/generator": 0,
        "skipped/fake_score": 2 if i > 500 else 0,
        "seconds/data": 0.05,
        "seconds/generator": 0.5,
        "seconds/fake_score": 0.9,
        "seconds/rollout": 0.4,
        "seconds/other": 0.15,
        **({"eval/fd": 0.5 + 6 * math.exp(-i / 200)} if i % 100 == 0 else {}),
    }


@pytest.fixture
def run_folder(tmp_path):
    """A finished run of 1,000 iterations, made up."""
    folder = tmp_path / "run & <b>one"
    (folder / "grids").mkdir(parents=True)
    config = {
        "train_batch_size": 64,
        "note": HOSTILE,
        "dmd2_fast": {"generator": {"steps": [5, 2, 0.8, 0.3]}, "run": {"iterations": 1000, "seed": 0}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps(make_summary()))
    lines = [json.dumps(make_record(i)) for i in range(0, 1001, 10)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for i in range(0, 1001, 50):
        grid = Image.new("L", (80, 80))
        grid.putdata([(x * y + i) % 256 * (x % 8 > 1) * (y % 8 > 1) for y in range(80) for x in range(80)])
        grid.save(folder / "grids" / f"iteration-{i:06d}.png")
    grid.save(folder / "samples.png")
    return folder


class Page(HTMLParser):
    """The tags, the table cells and whether every tag is closed in order."""

    VOID = frozenset(("meta", "img", "line", "path", "circle", "rect", "br"))

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.rows, self.attributes = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_the_page_is_whole_and_loads_nothing(run_folder):
    target = write_report(run_folder)
    assert target == run_folder / "report.html"
    text = target.read_text()
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags and "link" not in page.tags and "iframe" not in page.tags
    loads = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action")]
    assert loads and all(value.startswith("data:image/png;base64,") for value in loads)
    assert not re.search(r"@import|url\(", text)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "u" not in page.tags and "&lt;u&gt;key" in text and "&lt;u&gt;value" in text
    assert "&lt;script&gt;" in text and "run &amp; &lt;b&gt;one" in text
    assert not list(run_folder.glob("*.tmp")) and not list(run_folder.glob(".*.tmp"))


def test_the_table_holds_the_summary(run_folder):
    rows = Page(render_report(run_folder)).rows
    head, body = rows[0], rows[1:]
    assert len(body) == len(ROWS) + 1
    for shown, given in zip(body, ROWS, strict=False):
        assert shown[0] == given[0] and int(shown[1]) == given[1]
        assert [float(cell) for cell in shown[2:]] == pytest.approx(given[2:], abs=0.0051)
    assert body[-1][0] == "training images (floor)"
    assert float(body[-1][head.index("FD")]) == FLOOR["fd"]
    assert body[-1][1] == body[-1][-1] == "-"


def test_the_headline_compares_with_the_best_teacher(run_folder):
    text = render_report(run_folder)
    assert f"{0.524 / 0.381:.2f} x the teacher at 35 evaluations" in text
    assert f"{14.6 / 1.66:.3g} x<" in text and "4 evaluations instead of 35" in text
    assert "3 min 30 s" in text  # 1,000 iterations of .21 s
    assert "4-step generator" in text and "1,000 iterations" in text
    assert "Updates skipped for a non-finite loss or gradient: 2 of the fake score." in text


def test_curves_of_switched_off_parts_are_left_out(run_folder):
    text = render_report(run_folder)
    assert "distribution matching" in text and "</i>R1" not in text
    assert "Precision and recall" not in text  # no such metric in this run
    records = [make_record(i) | {"fake_score/r1": 0.2} for i in range(0, 100, 10)]
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "</i>R1 <b>0.2</b>" in render_report(run_folder)


def test_time_shares_are_percentages_of_the_sum(run_folder):
    shares = dict(re.findall(r"</i>([a-z ]+) <b>([\d.]+) %</b>", render_report(run_folder)))
    assert {key: float(value) for key, value in shares.items()} == {
        "fake score": 45.0,
        "generator": 25.0,
        "rollout": 20.0,
        "other": 7.5,
        "data": 2.5,
    }


def test_the_filmstrip_is_thinned_but_keeps_both_ends(run_folder):
    captions = re.findall(r"<figcaption>iteration ([\d,]+)</figcaption>", render_report(run_folder))
    assert len(captions) == 12 and captions[0] == "0" and captions[-1] == "1,000"
    assert captions == sorted(captions, key=lambda text: int(text.replace(",", "")))


def test_a_run_still_going_says_how_far(run_folder):
    (run_folder / "summary.json").unlink()
    (run_folder / "samples.png").unlink()
    lines = [json.dumps(make_record(i)) for i in range(0, 541, 10)]
    (run_folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"iteration": 550, "generator/lo')
    text = render_report(run_folder)
    assert "at iteration 540 of 1,000" in text and 'width:54.0%"' in text
    assert "Results" not in text and "Generator loss" in text
    assert Page(text).open == []


BROKEN = {
    "nothing at all": {"config.json": None, "summary.json": None, "metrics.jsonl": None},
    "empty files": {"config.json": "", "summary.json": "", "metrics.jsonl": ""},
    "torn files": {"config.json": '{"dmd2_fast": {', "summary.json": "{", "metrics.jsonl": '{"iter'},
    "other types": {
        "config.json": '{"dmd2_fast": {"run": 3, "generator": {"steps": 4}}}',
        "summary.json": '{"rows": [3, {"network": null, "fd": "x"}], "floor": "y", "machine": 5, "versions": [1]}',
        "metrics.jsonl": '[1]\n{"iteration": "3"}\n{"iteration": 1, "generator/loss": "x", "time": null}\n"a"\n',
    },
    "no finite number": {
        "metrics.jsonl": "".join(f'{{"iteration": {i}, "generator/loss": NaN, "eval/fd": null}}\n' for i in range(9)),
        "summary.json": '{"rows": [{"network": "generator", "fd": NaN, "seconds": 0}], "floor": Infinity}',
    },
    "one line": {"metrics.jsonl": json.dumps(make_record(0)) + "\n"},
    "no rows": {"summary.json": '{"rows": [], "floor": 0.27}'},
}


@pytest.mark.parametrize("case", BROKEN)
def test_whatever_is_missing_is_left_out(run_folder, case):
    for name, text in BROKEN[case].items():
        (run_folder / name).unlink()
        if text is not None:
            (run_folder / name).write_text(text)
    (run_folder / "grids" / "iteration-000050.png").write_bytes(b"\x89PNG\r\n\x1a\n cut short")
    text = render_report(run_folder)
    assert Page(text).open == []
    assert "iteration 50<" not in text
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text).lower().split("</style>")[1]


def test_format_table_lines_up():
    lines = format_table(make_summary()).splitlines()
    assert len(lines) == 2 + len(ROWS) + 1
    assert set(lines[1]) == {"-"}
    words = lines[0].split()
    assert words[:3] == ["network", "evaluations", "FD"]
    generator = next(line for line in lines if line.startswith("generator"))
    assert generator.split()[:3] == ["generator", "4", "0.524"]
    # Figures end in the same column as their heading.
    assert generator.index("0.524") + 5 == lines[0].index("FD") + 2
    assert lines[-1].startswith("training images (floor)") and "0.271" in lines[-1]
    assert format_table({}) == "" and format_table({"rows": "x"}) == ""


def test_axes_are_logarithmic_only_where_values_are_positive_and_span_much():
    assert value_axis([1, 30])[0].log and not value_axis([1, 10])[0].log
    assert not value_axis([-1, 1, 100])[0].log and not value_axis([0, 100], "log")[0].log
    assert value_axis([1, 2], "log")[0].log and not value_axis([1, 1e6], "linear")[0].log


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [-3.0, -3.0], [1e-9, 2e-9], [0, 1e9], [-7, 2], [1e-8, 1e8]])
def test_every_value_lies_on_its_axis_and_ticks_are_inside(values):
    for scale in ("linear", "log", "auto"):
        axis, cut = value_axis(values, scale)
        assert not cut and axis.low < axis.high
        assert axis.low <= min(values) and max(values) <= axis.high
        ticks = axis.ticks()
        assert 1 <= len(ticks) <= 8
        slack = 2e-3 * max(abs(axis.low), abs(axis.high))
        assert axis.low - slack <= ticks[0] and ticks[-1] <= axis.high + slack


def test_rare_extremes_do_not_flatten_a_curve():
    values = [1 + (i % 7) / 10 for i in range(200)]
    axis, cut = value_axis([*values, -500.0])
    assert cut and axis.low > -5
    assert axis.place(-500.0) == axis.start  # held at the frame, not drawn outside


def test_axis_places_by_hand():
    linear = Axis(0, 10, 100, 0)
    assert [linear.place(v) for v in (0, 2.5, 10)] == [100, 75, 0]
    assert linear.ticks() == [0, 2, 4, 6, 8, 10]
    logarithmic = Axis(0.1, 1000, 0, 400, log=True)
    assert [logarithmic.place(v) for v in (0.1, 1, 100, 1000)] == pytest.approx([0, 100, 300, 400])
    assert logarithmic.ticks() == pytest.approx([0.1, 1, 10, 100, 1000])


def test_gaps_stay_gaps_and_lone_points_are_dots():
    chart = line_chart("x", [Curve("a", [(0, 1.0), (1, 2.0), (2, None), (3, 1.5), (4, None), (5, 1.0), (6, 1.2)])])
    path = re.search(r'class="line c0" d="([^"]*)"', chart)[1]
    assert path.count("M") == 3 and path.count("L") == 2
    assert chart.count("<circle") == 1
    assert line_chart("x", [Curve("a", [(0, None)])], guides=[Guide("g", 1)]) == ""


def test_thinning_keeps_the_mean_and_smoothing_keeps_a_constant():
    points = [(float(i), float(i % 2)) for i in range(1000)]
    few = thin(points)
    assert len(few) <= MAX_POINTS
    assert sum(y for _, y in few) / len(few) == pytest.approx(0.5, abs=0.02)
    assert [y for _, y in smooth([(0, 3.0), (1, None), (2, 3.0)])] == [3.0, None, 3.0]
    ramp = [y for _, y in smooth([(float(i), float(i)) for i in range(200)])]
    assert ramp[100] == pytest.approx(100, abs=0.5), "a smoothed slope does not lag behind"
    assert all(a < b for a, b in itertools.pairwise(ramp))


def test_numbers_and_durations_for_people():
    assert [number(v) for v in (0, 1, 0.5236, 12.34, 1234.5, 2e-4, 5e7, -0.25)] == [
        "0", "1", "0.524", "12.3", "1,234", "2e-4", "5e7", "-0.25",
    ]  # fmt: skip
    assert [duration(s) for s in (0.42, 59.4, 60, 214.5, 3599.6, 7320)] == [
        "0.4 s", "59 s", "1 min 00 s", "3 min 34 s", "1 h 00 min", "2 h 02 min",
    ]  # fmt: skip
    assert share_bar([("a", 0.0)]) == ""


BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
MEASURE = """<pre id="measured"></pre><script>
addEventListener("load", () => {
  const results = [];
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, root = page.documentElement;
    const right = e => e.getBoundingClientRect().right;
    const past = [...page.querySelectorAll("main > *")].filter(e => right(e) > root.clientWidth + 1);
    const broken = [...page.images].filter(i => !i.complete || i.naturalWidth === 0);
    const cells = [...page.querySelectorAll("#results tbody tr")].map(r => [...r.cells].map(c => c.innerText));
    const flat = [...page.querySelectorAll("figure.chart svg")].filter(s => s.getBoundingClientRect().height < 60);
    results.push({width: root.clientWidth, scroll: root.scrollWidth, past: past.length, broken: broken.length,
      images: page.images.length, charts: page.querySelectorAll("figure.chart svg").length, flat: flat.length, cells,
      title: page.title});
  }
  document.getElementById("measured").textContent = JSON.stringify(results);
});
</script>"""


def browse(folder: Path, page: Path, *extra: str) -> str:
    """Chromium's standard output for a local page; nothing is fetched from outside."""
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
        "--virtual-time-budget=4000", f"--user-data-dir={folder / 'profile'}", *extra, page.as_uri(),
    ]  # fmt: skip
    result = subprocess.run([BROWSER, *flags], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")
def test_a_browser_shows_everything_at_desktop_and_telephone_width(run_folder, tmp_path):
    report = html.escape(write_report(run_folder).read_text())
    widths = (1280, 390, 320)
    frames = "".join(f'<iframe srcdoc="{report}" style="width:{w}px;height:800px;border:0"></iframe>' for w in widths)
    page = tmp_path / "measure.html"
    page.write_text(f"<!doctype html><meta charset='utf-8'>{frames}{MEASURE}")
    shown = browse(tmp_path, page, "--dump-dom")
    results = json.loads(html.unescape(re.search(r'<pre id="measured">(.*?)</pre>', shown, re.S)[1]))
    assert [result["width"] for result in results] == list(widths)
    for result in results:
        assert result["scroll"] == result["width"], "the page scrolls sideways"
        assert result["past"] == result["broken"] == result["flat"] == 0
        assert result["images"] == 13 and result["charts"] == 7
        assert result["title"] != "owned"
        assert [row[0] for row in result["cells"]] == [row[0] for row in ROWS] + ["training images (floor)"]
        assert result["cells"][5][2] == "0.524"
