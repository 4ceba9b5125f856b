"""compare.html: the comparison on one page, in one file, with nothing fetched and nothing run; and the files beside it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import __version__, atomic
from ..report.sections import e as shown
from ..report.sections import pairs
from ..report.style import CSS
from ..report.verdict import clock
from . import advice, plots, table
from .outcome import Entry, Table

FILE = "compare.html"
OWN = """
body { max-width: 78rem; }
.compare td, .compare th { padding-right: 1.1rem; white-space: nowrap; } .compare td:first-child { white-space: normal; min-width: 8rem; }
.compare tr.best td { font-weight: 600; } .compare tr.baseline td { color: var(--soft); font-style: italic; }
.compare td:first-child, .compare th:first-child { position: sticky; left: 0; background: var(--ground); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.2rem 1.6rem; }
.plots img { width: 100%; height: auto; display: block; } .plots figcaption { font-weight: 400; color: var(--soft); font-size: .875rem; margin-top: .3rem; }
"""


def write(t: Table, folder: Path) -> Path:
    """The page, the plots, CSV, LaTeX and all numbers as JSON. Returns the page."""
    drawn: dict[str, tuple[str, bytes, bytes]] = {}
    if plots.there():
        for name, (said, make) in plots.pictures(t).items():
            light, dark = (plots.png(make(look)) for look in (plots.LIGHT, plots.DARK))
            drawn[name] = said, light, dark
            with atomic.file(folder / f"{name}.png") as new:
                new.write_bytes(light)
    atomic.text(folder / "compare.csv", table.as_csv(t))
    atomic.text(folder / "compare.tex", table.as_latex(t))
    advised, caveats = advice.sentences(t)
    told = {"measure": t.measure, "target": t.target, "tests": t.tests, "advice": advised, "caveats": caveats, "notes": t.notes, "about": t.about}
    atomic.as_json(folder / "compare.json", told | {"rows": [asdict(x) for x in t.entries]})
    atomic.text(folder / FILE, html(t, drawn, folder.resolve().name))
    return folder / FILE


def html(t: Table, drawn: dict[str, tuple[str, bytes, bytes]], name: str) -> str:
    """The page."""
    said, caveats = advice.sentences(t)
    verdict = "".join(f"<p>{shown(s)}</p>" for s in said) or "<p>No row has a result yet.</p>"
    verdict += "".join(f'<p class="soft small">{shown(s)}</p>' for s in caveats)
    parts = [
        f'<header><h1>{shown(_title(t))}</h1><p class="soft">{shown(name)}</p></header>',
        f'<section aria-label="Advice"><div class="verdict">{verdict}</div></section>',
        _section("How good", _table(t, table.GOOD)),
        _section("What it costs", _table(t, table.COST) + _below(t)),
        _section("Plots", _plots(drawn)),
        _section("What was compared", _about(t)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{shown(_title(t))} · luthier</title><style>{CSS}{OWN}</style></head>\n<body>'
        + "\n".join(p for p in parts if p)
        + f'\n<footer><p class="soft small">Written by luthier {shown(__version__)}; numbers: compare.csv, compare.json.</p></footer>'
        "</body></html>\n"
    )


def _title(t: Table) -> str:
    names = [e.name for e in t.rows]
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''} compared on {Path(str(t.about['data'])).name or 'the data'}"


def _section(title: str, body: str) -> str:
    return f'<section aria-label="{shown(title)}"><h2>{shown(title)}</h2>{body}</section>' if body else ""


def _table(t: Table, part: tuple[table.Column, ...]) -> str:
    cols = table.columns(t, part)
    head = "".join(f'<th scope="col"{"" if i == 0 else " class=n"} title="{shown(c.means)}">{shown(c.head)}</th>' for i, c in enumerate(cols))
    body = "".join(_line(t, x, cols) for x in t.entries if not x.problem and table.says(t, x, cols))
    return f'<div class="wide"><table class="compare"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _below(t: Table) -> str:
    missing = "".join(f"<li>{shown(line)}</li>" for line in table.refused(t))
    meaning = "".join(f"<dt>{shown(c.head)}</dt><dd>{shown(c.means)}</dd>" for c in table.columns(t) if c.means)
    listed = f'<p class="soft small">Not compared:</p><ul class="small">{missing}</ul>' if missing else ""
    return listed + f"<details><summary>What the columns mean</summary><dl>{meaning}</dl></details>"


def _line(t: Table, x: Entry, cols: list[table.Column]) -> str:
    kind = ' class="best"' if x is t.best else ' class="baseline"' if x.baseline else ""
    cells = "".join(f"<td{'' if i == 0 else ' class=n'}>{shown(c.cell(t, x))}</td>" for i, c in enumerate(cols))
    return f"<tr{kind}>{cells}</tr>"


def _plots(drawn: dict[str, tuple[str, bytes, bytes]]) -> str:
    if not drawn:
        return (
            ""
            if plots.there()
            else "<p>matplotlib is not installed (pip install 'luthier[plots]'), so nothing was drawn; luthier compare --resume FOLDER draws it.</p>"
        )
    figures = (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{plots.inline(dark)}">'
        f'<img src="{plots.inline(light)}" alt="{shown(said)}"></picture>'
        f"<figcaption>{shown(said)}</figcaption></figure>"
        for said, light, dark in drawn.values()
    )
    return f'<div class="plots">{"".join(figures)}</div>'


def _about(t: Table) -> str:
    a: dict[str, Any] = t.about
    same = {
        "tokens": "all rows get the same number of training tokens",
        "uneven": "rows got unlike numbers of training tokens, which the table has",
    }.get(a["equal"], "all rows get the same training time, so slow ones fewer tokens")
    tested = f"{a['test_rows']:,} rows, {t.tests}" + (f"; {a['records']:,} of their prompts are answered" if a["renders"] == "chat" else "")
    items = [
        ("base", f"{shown(a['base'])}, {a['parameters']:,} parameters"),
        ("data", f"{shown(a['data'])}: {a['train_rows']:,} rows to train, objective <code>{shown(a['objective'])}</code>"),
        ("tested on", shown(tested) + "; nothing was chosen by them"),
        ("chosen on", f"at most {a['chosen_on']:,} other held-out rows: learning rates, the best step, prompts"),
        ("time", f"{clock(a['spent'])} of {a['minutes']:g} minutes; {same}"),
        ("seeds", f"{a['seeds']}"),
        ("machine", f"{shown(a['device'])}, {a['threads']} {'thread' if a['threads'] == 1 else 'threads'}"),
    ]
    if t.target_said:
        items.append(("target", shown(t.target_said)))
    if a["no_base"]:
        items.append(("the base itself", f"is no row: {shown(a['no_base'])}"))
    notes = "".join(f"<li>{shown(n)}</li>" for n in t.notes)
    return pairs(items) + (f'<ul class="small">{notes}</ul>' if notes else "")
