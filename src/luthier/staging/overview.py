"""One report over all stages of a run: what each gained, what it cost, what was forgotten from the first to the last, and where what it left lies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..measuring.measure import Measures
from ..report.verdict import clock
from ..running import progress
from .ledger import Ledger, Record
from .stages import Stages

GAINED = ("stage", "objective", "method", "held out", "after", "general text", "after")
COST = ("stage", "trained", "tokens", "time", "peak memory", "left")
WIDE = 160  # characters of a table where there is no terminal to fit into


def gained(stages: Stages, ledger: Ledger) -> Iterator[tuple[str, ...]]:
    """The cells of GAINED for each stage; one that is not finished has its state instead of numbers."""
    for stage in stages.stages:
        r = ledger.record(stage)
        first = (f"{stage.place} {stage.name}", r.objective, r.method)
        if r.state != "done":
            yield (*first, "interrupted" if r.state == "running" else "waiting", "", "", "")
            continue
        before, after = measures(r)
        yield (*first, *_held_out(before, after), *_both(before.general, after.general))


def cost(stages: Stages, ledger: Ledger) -> Iterator[tuple[str, ...]]:
    """The cells of COST for each finished stage."""
    for stage in stages.stages:
        r = ledger.record(stage)
        if r.state == "done":
            n = r.result
            memory = f"{'' if n['peak_is_its_own'] else 'up to '}{n['peak_bytes'] / 1e9:.2f} GB"
            yield f"{stage.place} {stage.name}", f"{n['trained']:,}", f"{n['tokens']:,}", clock(n["seconds"]), memory, r.artefact


def show(stages: Stages, ledger: Ledger, console: Console) -> None:
    """The report in a terminal."""
    for columns, cells, words in ((GAINED, gained, 3), (COST, cost, 1)):
        table = Table(title=None, show_edge=False, pad_edge=False)
        for i, name in enumerate(columns):
            table.add_column(name, justify="left" if i < words or name == "left" else "right", overflow="fold")
        found = list(cells(stages, ledger))
        for row in found:
            table.add_row(*row)
        if found:
            console.print()
            console.print(table, width=None if console.is_terminal else WIDE)
    for line in notes(stages, ledger):
        console.print(Text("  " + line))
    console.print(Text(f"the report over all stages: {ledger.folder / 'report.md'}", style="bold"))


def notes(stages: Stages, ledger: Ledger) -> Iterator[str]:
    """What is said below the tables: units, what was forgotten over all stages, which stopped early."""
    done = [r for s in stages.stages if (r := ledger.record(s)).state == "done"]
    units: dict[str, list[str]] = {}
    for r in done:
        if (loss := measures(r)[1].loss) is not None:
            units.setdefault(loss.unit.removesuffix("s"), []).append(r.name)
    if units:
        yield "held out: the loss in nats, " + "; ".join(f"of {', '.join(names)} per {unit}" for unit, names in units.items())
    if said := forgetting(stages, ledger):
        yield said
    for r in done:
        if r.result["stopped"]:
            yield f"stage {r.name} stopped early: {r.result['stopped']}"
        for alarm in r.result.get("alarms", ()):
            yield f"stage {r.name}, alarm of {alarm['kind']} at step {alarm['step']}: {alarm['said']}; {alarm['advice']}"


def lineage(stages: Stages, ledger: Ledger) -> list[Record]:
    """The finished stages that the last finished one came through, from the first: whose weights went into its own."""
    done = [s for s in stages.stages if ledger.record(s).state == "done"]
    out: list[Record] = []
    stage = done[-1] if done else None
    while stage is not None:
        out.insert(0, ledger.record(stage))
        before = stage.delta_from or stage.model_from
        stage = next((s for s in done if s.name == before), None)
    return out


def forgetting(stages: Stages, ledger: Ledger) -> str:
    """The loss on general text before the first and after the last stage of a lineage; the changes added up where they were not measured alike."""
    line = [(r, *measures(r)) for r in lineage(stages, ledger)]
    known = [(r, b.general, a.general) for r, b, a in line if b.general is not None and a.general is not None]
    if not known or len(known) < len(line):
        return ""
    path = " > ".join(r.name for r, *_ in known)
    total = sum(a.value - b.value for _, b, a in known)
    alike = len({(b.n, b.unit, a.n) for _, b, a in known}) == 1 and len({str(stages.stage(r.name).asked.data.general) for r, *_ in known}) == 1
    if not alike:
        each = " ".join(f"{a.value - b.value:+.4f}" for _, b, a in known)
        return f"general text over {path}: {total:+.4f} ({each}; not measured on the same pieces of text, so only the changes can be added)"
    return f"general text over {path}: {known[0][1].value:.4f} -> {known[-1][2].value:.4f} ({total:+.4f} in all)"


def markdown(stages: Stages, ledger: Ledger) -> str:
    """report.md."""
    out = [f"# {stages.name}", "", f"{len(stages.stages)} stages. What was asked is in `run.yaml`, every hash in `stages.json`.", ""]
    for columns, cells, words in ((GAINED, gained, 3), (COST, cost, 1)):
        out += [f"| {' | '.join(columns)} |", "|" + "".join("---|" if i < words or c == "left" else "---:|" for i, c in enumerate(columns))]
        out += [f"| {' | '.join(row)} |" for row in cells(stages, ledger)] + [""]
    out += [*(f"{line[0].upper()}{line[1:]}.\n" for line in notes(stages, ledger)), "Time is that of the training steps; left is what lies in this folder."]
    for stage in stages.stages:
        if (r := ledger.record(stage)).state == "done":
            out += ["", f"## {stage.place} {stage.name}", "", *_section(stages, ledger, r)]
    return "\n".join(out) + "\n"


def _section(stages: Stages, ledger: Ledger, r: Record) -> Iterator[str]:
    before, after = measures(r)
    begins = f"the model {stages.stage(r.name).asked.model.id}" if not r.handed else " and ".join(f"`{n}`" for n in r.handed)
    yield f"- began from {begins}, {r.started} to {r.finished}"
    if (ledger.folder / r.folder / "report.html").is_file():
        yield f"- its curves, data and samples: [{r.folder}/report.html]({r.folder}/report.html)"
    n = r.result
    yield f"- {n['trained']:,} of {n['total']:,} parameters trained, {n['steps']:,} steps; weights of step {n['best_step']:,}"
    if n["stopped"]:
        yield f"- stopped early: {n['stopped']}"
    for name, (a, b) in progress.rows_of(before, after).items():
        yield f"- {name}: {a} -> {b}" if a else f"- {name}: {b}"
    yield f"- left `{r.artefact}`: " + ", ".join(f"`{f}` sha256 {h}" for f, h in r.sha256.items())
    for name, files in r.handed.items():
        yield f"- was handed by `{name}`: " + ", ".join(f"`{f}` sha256 {h}" for f, h in files.items())


def measures(r: Record) -> tuple[Measures, Measures]:
    """Before and after a finished stage."""
    return Measures.from_dict(r.result["before"]), Measures.from_dict(r.result["after"])


def _held_out(before: Measures, after: Measures) -> tuple[str, str]:
    """The loss; of an objective that has none on held-out data, its first score."""
    if after.loss is not None:
        return _both(before.loss, after.loss)
    name = next((n for n in after.scores if n in before.scores), None)
    return ("", "") if name is None else (f"{name} {before.scores[name].value:.3f}", f"{after.scores[name].value:.3f}")


def _both(before: Any, after: Any) -> tuple[str, str]:
    return ("", "") if before is None or after is None else (f"{before.value:.4f}", f"{after.value:.4f}")
