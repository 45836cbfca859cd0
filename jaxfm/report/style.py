"""The style sheet of report.html: no outside fonts, colours for light and dark."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --panel: #ffffff; --line: #e2e5ea; --grid: #eceef2;
  --ink: #1b1f27; --soft: #626b7a; --best: #e5f4ec; --best-ink: #0c6b43;
  --c0: #2f6fde; --c1: #e0731d; --c2: #17956b; --c3: #8a55cf; --c4: #d13f5c; --c5: #7c8696;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12151b; --panel: #1a1f27; --line: #2c333e; --grid: #252b35;
    --ink: #e7eaef; --soft: #98a2b3; --best: #15382a; --best-ink: #74d8a6;
    --c0: #6ea3ff; --c1: #f4a25b; --c2: #4ccb9b; --c3: #b994f0; --c4: #f27f95; --c5: #9aa4b4;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
header, main { max-width: 1120px; margin: 0 auto; padding: 0 28px; }
header { padding-top: 48px; }
main { padding-bottom: 64px; }
h1 { font-size: 2.1rem; line-height: 1.2; letter-spacing: -0.02em; margin: 0; }
h2 { font-size: 1.3rem; letter-spacing: -0.01em; margin: 52px 0 6px; }
p { margin: 0 0 14px; color: var(--soft); max-width: 76ch; }
.subtitle { font-size: 1.08rem; margin: 6px 0 26px; }
.panel {
  background: var(--panel); border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 20px; margin: 14px 0;
}
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 16px; }
.row > .panel { margin: 0; min-width: 0; }
.row { margin: 14px 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; margin: 14px 0; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; }
.card .name { color: var(--soft); font-size: 0.86rem; }
.card .value { font-size: 1.9rem; font-weight: 650; letter-spacing: -0.02em; line-height: 1.3; }
.card .note { color: var(--soft); font-size: 0.84rem; }
figcaption, caption, summary { font-weight: 600; font-size: 0.98rem; text-align: left; }
figcaption { margin-bottom: 8px; }
caption { padding-bottom: 10px; }
summary { cursor: pointer; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-bottom: 8px; font-size: 0.86rem; color: var(--soft); }
.chip { display: inline-flex; align-items: center; gap: 7px; }
.chip mark { width: 20px; height: 1.1em; }
.swatch { width: 18px; height: 0; border-top: 3px solid var(--c); border-radius: 2px; }
.swatch.dashed { border-top-style: dashed; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); }
.c3 { --c: var(--c3); } .c4 { --c: var(--c4); } .c5 { --c: var(--c5); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-variant-numeric: tabular-nums; }
svg text { font-size: 14.5px; }
main > .panel svg { max-width: 780px; }
@media (min-width: 800px) { main > .panel svg text { font-size: 10.5px; } }
svg .grid { stroke: var(--grid); } svg .axis { stroke: var(--line); }
.series path { fill: none; stroke: var(--c); stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; }
.series.dashed path { stroke-dasharray: 6 4; }
.series circle { fill: var(--c); opacity: 0; }
.series.few circle, .series circle:hover { opacity: 1; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 12px 14px; align-items: center; }
.barname { font-size: 0.92rem; }
.bartrack { background: var(--grid); border-radius: 5px; height: 20px; }
.cell { fill: var(--c); rx: 2px; }
.wide { overflow-x: auto; }
.bar { background: var(--c); border-radius: 5px; height: 100%; }
.barvalue { font-variant-numeric: tabular-nums; font-size: 0.92rem; text-align: right; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.94rem; }
th { text-align: left; color: var(--soft); font-weight: 600; font-size: 0.84rem; }
th, td { padding: 8px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; }
.num { text-align: right; font-variant-numeric: tabular-nums; }
.best { background: var(--best); color: var(--best-ink); font-weight: 650; }
pre {
  margin: 6px 0 0; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4;
  font: 0.86rem/1.6 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
mark {
  color: inherit; background: color-mix(in srgb, var(--c) 22%, transparent); border-radius: 3px;
  box-shadow: inset 0 -2px 0 color-mix(in srgb, var(--c) 60%, transparent);
}
.empty { font-style: italic; }
@media print { body { background: white; } .panel, .card { break-inside: avoid; } }
"""
