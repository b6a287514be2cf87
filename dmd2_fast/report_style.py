"""The style sheet of report.html: light and dark, from a telephone's width up."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfaf8; --card: #ffffff; --ink: #1d2126; --soft: #626a73; --line: #e4e2dd; --mark: #eef3fc;
  --c0: #2563c9; --c1: #d2640b; --c2: #1f8a5b; --c3: #8b4fc6; --c4: #b8336a; --c5: #7b7f86; --warn: #a33a12;
    --warnbg: #fdf0e8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1c2026; --ink: #e7e9ec; --soft: #9aa3ad; --line: #2e343c; --mark: #1d2a41;
    --c0: #73a5ff; --c1: #ffa45c; --c2: #5fcf9a; --c3: #c39bf5; --c4: #ff86b3; --c5: #a2a8b0; --warn: #ffb08a;
    --warnbg: #3a2418;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 2rem; line-height: 1.15; letter-spacing: -.02em; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; letter-spacing: -.01em; margin: 3rem 0 .8rem; }
p { margin: .4rem 0; max-width: 44rem; }
small, .soft, figcaption small { color: var(--soft); font-weight: 400; }
.card, figure.chart, .figure {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1rem 1.1rem; margin: 0;
}
.warn { color: var(--warn); background: var(--warnbg); border-radius: 10px; padding: .7rem 1rem; margin: 1rem 0;
    max-width: none; }
.progress { height: 6px; border-radius: 3px; background: var(--line); margin: 1.2rem 0; overflow: hidden; }
.progress i { display: block; height: 100%; background: var(--c0); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr)); gap: .8rem;
    margin: 1.6rem 0 0; }
.figure .label { color: var(--soft); font-size: .85rem; }
.legend-text { font-size: .87rem; max-width: none; margin-top: .7rem; }
.figure .value { font-size: 1.7rem; white-space: nowrap; line-height: 1.25; font-weight: 650; letter-spacing: -.02em;
    font-variant-numeric: tabular-nums; }
.figure .note { color: var(--soft); font-size: .85rem; line-height: 1.35; }
.scroll { overflow-x: auto; }
.card.scroll { padding: .3rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .93rem;
    overflow-wrap: normal; }
th, td { padding: .5rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; font-size: .83rem; }
tbody tr:last-child td, tbody tr:last-child th { border-bottom: 0; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--card); }
tbody th { color: var(--ink); font-size: inherit; }
tr.ours td, tr.ours th { background: var(--mark); font-weight: 650; }
tr.floor td, tr.floor th { color: var(--soft); font-style: italic; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: .8rem; }
figcaption { font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .84rem; color: var(--soft);
    margin: .15rem 0 .4rem; }
.legend b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.chip { display: inline-block; width: .7em; height: .7em; border-radius: 3px; margin-right: .4em; }
.chip.c0 { background: var(--c0); } .chip.c1 { background: var(--c1); } .chip.c2 { background: var(--c2); }
.chip.c3 { background: var(--c3); } .chip.c4 { background: var(--c4); } .chip.c5 { background: var(--c5); }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 10.5px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--line); } svg .axis { stroke: var(--soft); }
svg .guide { stroke: var(--soft); stroke-dasharray: 4 3; } svg text.name { fill: var(--ink); }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
svg .line.raw { stroke-width: 1; opacity: .28; }
svg .line.c0 { stroke: var(--c0); } svg .line.c1 { stroke: var(--c1); } svg .line.c2 { stroke: var(--c2); }
svg .line.c3 { stroke: var(--c3); } svg .line.c4 { stroke: var(--c4); } svg .line.c5 { stroke: var(--c5); }
svg .dot.c0, svg rect.c0 { fill: var(--c0); } svg .dot.c1, svg rect.c1 { fill: var(--c1); }
svg .dot.c2, svg rect.c2 { fill: var(--c2); } svg .dot.c3, svg rect.c3 { fill: var(--c3); }
svg .dot.c4, svg rect.c4 { fill: var(--c4); } svg .dot.c5, svg rect.c5 { fill: var(--c5); }
svg.shares { height: 1.4rem; border-radius: 6px; margin-bottom: .6rem; }
.film { display: flex; gap: .8rem; overflow-x: auto; padding-bottom: .6rem; scroll-snap-type: x proximity; }
.film figure { margin: 0; flex: 0 0 auto; width: min(15rem, 70vw); scroll-snap-align: start; }
.film figcaption, .samples figcaption { font-size: .85rem; font-weight: 400; color: var(--soft); margin-top: .3rem; }
img { display: block; width: 100%; border-radius: 8px; border: 1px solid var(--line); image-rendering: pixelated; }
.samples { margin: 0 0 1.2rem; max-width: 34rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; margin: 0; font-size: .93rem; }
dt { color: var(--soft); } dd { margin: 0; font-variant-numeric: tabular-nums; min-width: 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: .8rem; }
h3 { font-size: .95rem; margin: 0 0 .6rem; }
pre { overflow-x: auto; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; margin: .8rem 0 0;
    overflow-wrap: normal; }
details { margin-top: .8rem; } summary { cursor: pointer; font-weight: 600; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
@media (max-width: 30rem) {
  main { padding: 1.5rem .9rem 3rem; } h1 { font-size: 1.6rem; }
  .figures { grid-template-columns: 1fr 1fr; } .figure { padding: .8rem .9rem; } .figure .value { font-size: 1.35rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
  table { font-size: .82rem; } th { font-size: .76rem; } th, td { padding: .4rem .5rem; }
}
@media print { .film { flex-wrap: wrap; overflow: visible; } }
"""
