"""The page's style: one column that fits a phone, light and dark, colours that colour-blind readers tell apart (Okabe and Ito's, darker on white)."""

CSS = """
:root { color-scheme: light dark; --ground: #ffffff; --panel: #f5f6f8; --text: #1c2024; --soft: #565d66; --rule: #d7dbe0; --link: #0058a3;
  --s1: #0067a8; --s2: #c04f00; --s3: #007a58; --s4: #a44a86; --tint: #d6ebf9; --better: #00694b; --worse: #a83c00; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --panel: #1d2125; --text: #e8eaed; --soft: #a9b1ba; --rule: #363c43; --link: #7cc0f5;
  --s1: #5db8f0; --s2: #f0a030; --s3: #35c79a; --s4: #e092c2; --tint: #12405e; --better: #4fd6ab; --worse: #ffad66; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1.5rem 1.25rem 4rem; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; overflow-wrap: anywhere; }
p { margin: .4rem 0; max-width: 46rem; } a { color: var(--link); }
.soft, figcaption .soft { color: var(--soft); } .small { font-size: .875rem; }
.state { display: inline-block; padding: .05rem .6rem; border-radius: 1rem; border: 1px solid var(--rule); background: var(--panel); font-size: .875rem; }
.verdict { background: var(--panel); border-left: 4px solid var(--s1); padding: .7rem 1rem; margin: 1rem 0; border-radius: 0 6px 6px 0; }
.problem { border-left: 4px solid var(--s2); background: var(--panel); padding: .5rem 1rem; margin: 1rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .925rem; font-variant-numeric: tabular-nums; margin: .4rem 0; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { font-weight: 600; color: var(--soft); } td.n, th.n { text-align: right; white-space: nowrap; }
.better { color: var(--better); } .worse { color: var(--worse); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: .6rem 0; font-size: .95rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
code, pre, .example { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; font-size: .85rem; }
td code { overflow-wrap: anywhere; }
pre { margin: .2rem 0 .8rem; padding: .5rem .7rem; background: var(--panel); border-radius: 6px; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.example { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--panel); border-radius: 6px; padding: .5rem .7rem; margin: .2rem 0 .8rem;
  max-height: 22rem; overflow-y: auto; color: var(--soft); }
.said { color: var(--text); }
mark { background: var(--tint); color: var(--text); border-bottom: 2px solid var(--s1); padding: 0; }
.left-out { font-style: italic; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--link); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem 1.5rem; }
figure { margin: .4rem 0; min-width: 0; } figcaption { font-weight: 600; font-size: .95rem; }
.one { max-width: 26rem; }
svg { display: block; width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--soft); }
.grid { stroke: var(--rule); stroke-width: 1; } .axis { stroke: var(--soft); stroke-width: 1; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; } .spot { fill: transparent; stroke: none; pointer-events: all; }
.spot:hover { fill: var(--tint); fill-opacity: .8; }
.line.s1, .dot.s1 { stroke: var(--s1); } .line.s2, .dot.s2 { stroke: var(--s2); } .line.s3, .dot.s3 { stroke: var(--s3); }
.line.s4, .dot.s4 { stroke: var(--s4); }
.line.s2 { stroke-dasharray: 6 3; } .line.s3 { stroke-dasharray: 2 3; } .line.s4 { stroke-dasharray: 8 3 2 3; }
.dot { stroke-width: 1.8; fill: var(--ground); }
.legend { font-size: .85rem; color: var(--soft); margin: 0 0 0 .4rem; } .key { margin-right: 1.1rem; white-space: nowrap; }
.swatch { display: inline-block; width: 1.5rem; height: 0; vertical-align: middle; margin-right: .4rem; border-top: 3px solid var(--s1); }
.swatch.s2 { border-top: 3px dashed var(--s2); } .swatch.s3 { border-top: 3px dotted var(--s3); } .swatch.s4 { border-top: 3px dashed var(--s4); }
.swatch.ring { width: .7rem; height: .7rem; border: 2px solid; border-radius: 50%; }
.swatch.ring.s1 { border-color: var(--s1); } .swatch.ring.s2 { border-color: var(--s2); } .swatch.ring.s3 { border-color: var(--s3); }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(16rem, 100%), 1fr)); gap: .2rem 1rem; margin-bottom: 1.2rem; }
.samples .ask { grid-column: 1 / -1; } .samples > div { min-width: 0; }
@media (max-width: 40rem) { body { padding: 1rem 1rem 3rem; } dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
  th, td { padding-right: .6rem; } table { font-size: .85rem; } td.n, th.n { white-space: normal; } td:first-child { min-width: 6.5rem; }
  dl.counts { grid-template-columns: max-content 1fr; gap: .25rem 1rem; } }
@media print { body { max-width: none; } .example { max-height: none; } }
"""
