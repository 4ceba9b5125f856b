"""luthier data knowledge: which facts of a set a model knows already, and what of the set is new to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .. import heavy

if TYPE_CHECKING:
    from rich.console import Console

    from ...data.facts import Fact
    from ...forgetting.knowledge import Probe, Probed, Report

EXAMPLES = 3  # shown of each category
PROMPT_LINES = 24  # of the prompt that is shown
MUCH = 0.2  # a share of Unknown that is warned of
FEW = 50  # facts below which the estimate of how often categories change says little


def command(
    files: Annotated[
        list[str], typer.Argument(metavar="FILES", help="Questions with answers, of any shape; or subjects with objects (sub_label, obj_label) and --pattern.")
    ],
    model: Annotated[str, typer.Option(help="Who is asked: fiddle, a model folder, a Hub id, an adapter or a run's folder.")] = "fiddle",
    out: Annotated[Path | None, typer.Option(help="Write the rows to this .jsonl file with the columns knowledge, greedy_right, sampled_right ...")] = None,
    keep: Annotated[str | None, typer.Option(help="Write only these categories: HighlyKnown,MaybeKnown")] = None,
    cap: Annotated[list[str] | None, typer.Option(help="A category's largest share of what is written: Unknown=0.1; may be given several times.")] = None,
    order: Annotated[Literal["file", "known-first", "unknown-first"], typer.Option(help="The order of what is written.")] = "file",
    prompts: Annotated[int, typer.Option(min=1, help="Few-shot prompts for each question.")] = 10,
    shots: Annotated[int, typer.Option(min=0, help="Exemplars in each prompt: other facts of the same group, with their answers.")] = 4,
    samples: Annotated[int, typer.Option(min=1, help="Answers sampled to each prompt, beside the greedy one.")] = 16,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the sampled answers.")] = 0.5,
    exemplars: Annotated[list[str] | None, typer.Option(help="Draw the exemplars from this file instead; may be given several times.")] = None,
    group: Annotated[str | None, typer.Option(help="The column that exemplars share with a question (relation, topic). Default: the file.")] = None,
    pattern: Annotated[
        list[str] | None,
        typer.Option(help='How subjects are asked: "[X] was born in [Y]." or a file with a column pattern; prompts take them in turn.'),
    ] = None,
    form: Annotated[
        Literal["auto", "chat", "qa", "text"],
        typer.Option(help="chat: exemplars are turns in the model's template; qa: lines Q: and A:; text: beginnings are continued. auto: what fits the model."),
    ] = "auto",
    column: Annotated[list[str] | None, typer.Option(help="Which column is which, OURS=YOURS: prompt=question, completion=answers.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask at most so many rows, drawn from all by the seed.")] = None,
    max_new: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens. Default: by the longest right answer.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws exemplars and samples.")] = 0,
    cache: Annotated[Path, typer.Option(help="Where answers are kept, so that a probe that was stopped goes on.")] = Path("runs/.knowledge"),
    base: Annotated[str | None, typer.Option(help="The adapter's base, where it is not where the adapter says.")] = None,
    template: Annotated[str | None, typer.Option(help="Chat template: a name or a .jinja file. Default: the model's own.")] = None,
    precision: Annotated[str, typer.Option(help="float32, bfloat16, or auto: what this machine does fast.")] = "auto",
) -> None:
    """What the model knows, by SliCK (Gekhman et al., 2024): `luthier data knowledge QA.jsonl --model runs/NAME --out known.jsonl`."""
    from rich.console import Console

    heavy("feedback.collecting")
    from ...data.facts import read_facts, read_patterns
    from ...data.known import caps_of, named
    from ...errors import Interrupted, LuthierError
    from ...feedback.collecting import opened, some
    from ...forgetting.knowledge import Asking, Probe, Report
    from .judge import progress

    if out is None and (keep or cap or order != "file"):
        raise LuthierError("--keep, --cap and --order choose what is written; say where: --out FILE.jsonl")
    if out is not None and (out.suffix != ".jsonl" or not out.parent.is_dir() or any(Path(f).resolve() == out.resolve() for f in files)):
        raise LuthierError(f"--out {out}: name a new .jsonl file in a folder that is there, other than the data itself")
    categories = [named(c, "--keep") for c in keep.split(",")] if keep else None
    caps = caps_of(cap or [])
    said, notes = read_patterns(pattern or [])
    if pattern and not said:
        raise LuthierError("--pattern: no pattern is left that can ask; the answer [Y] has to come last")
    how: dict[str, Any] = {"patterns": bool(said), "columns": _columns(column or []), "group": group}
    facts, more = read_facts(files, **how)
    shown, most = read_facts(exemplars, **how) if exemplars else (None, [])
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    for note in [*notes, *more, *most]:
        console.print(note, markup=False, soft_wrap=True)
    asked = _drawn(facts, limit, seed)
    asking = Asking(prompts=prompts, shots=shots, samples=samples, temperature=temperature, max_new=max_new, form=form, seed=seed, template=template)
    probe = Probe(opened(model, base, precision), asked, asking, patterns=said, exemplars=facts if shown is None else shown, cache=cache)
    todo = probe.plan()
    _say_plan(console, probe, todo, model, len(facts))
    try:
        with progress(console, todo, "asking", "asked") as done:
            probed, left = probe.run(done)
    except KeyboardInterrupt:
        kept = f"what was asked is kept in {cache}, and the same command goes on" if probe.file else "nothing was kept"
        raise Interrupted(f"interrupted; {kept}") from None
    for note in left:
        console.print(note, markup=False, soft_wrap=True)
    report = Report.of(probed)
    _table(console, report, len(probed))
    _examples(console, probed)
    _advice(console, report, model)
    if out is not None:
        n = _write(out, probe, probed, categories, caps, order, seed)
        console.print(f"{some(n, 'row')} of {len(probed):,} written to {out}", markup=False, soft_wrap=True)
        if order != "file":
            console.print("training shuffles rows; where the order is to count, train the parts as stages (docs/stages.md)", markup=False, soft_wrap=True)


def _columns(settings: list[str]) -> dict[str, str]:
    from ...errors import LuthierError

    for setting in settings:
        if not all(setting.partition("=")):
            raise LuthierError(f"--column {setting}: say OURS=YOURS, for example --column prompt=question")
    return dict(setting.split("=", 1) for setting in settings)


def _drawn(facts: Sequence[Fact], limit: int | None, seed: int) -> list[Fact]:
    """All facts, or so many of them, drawn by the seed, in their order."""
    import random

    if limit is None or limit >= len(facts):
        return list(facts)
    return [facts[i] for i in sorted(random.Random(seed).sample(range(len(facts)), limit))]


def _say_plan(console: Console, probe: Probe, todo: int, model: str, rows: int) -> None:
    from rich.text import Text

    from ...feedback.collecting import some

    how, asked = probe.how, len(probe.facts)
    of = f" of {rows:,}" if asked < rows else ""
    kept = len(probe.keys) - todo
    before = f", {kept:,} of them asked before" if kept else ""
    console.print(
        f"{model}: {asked:,}{of} rows, {some(len(probe.keys), 'question')}{before}; {how.prompts} prompts of {how.shots} exemplars, "
        f"1 greedy answer and {how.samples} at temperature {how.temperature:g} to each, {probe.max_new} tokens at most",
        markup=False,
        soft_wrap=True,
    )
    console.print(f"asked as {probe.form}; the first prompt:")
    lines = probe.first(next(f for f in probe.facts if f.question in probe.keys)).splitlines()
    for line in lines if len(lines) <= PROMPT_LINES else ["...", *lines[-PROMPT_LINES:]]:
        console.print(Text("  | " + line), soft_wrap=True)


def _table(console: Console, report: Report, rows: int) -> None:
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False)
    for name in ("category", "rows", "share", "95 % interval", "same if asked again"):
        table.add_column(name, justify="left" if name == "category" else "right", no_wrap=True)
    for s in report.shares:
        stable = "" if s.stable is None else f"{s.stable:.0%}"
        table.add_row(s.category, f"{s.rows:,}", f"{s.share:.1%}", f"{s.low:.1%} to {s.high:.1%}", stable)
    console.print()
    console.print(table)
    console.print()
    changes = float(report.changes_N.mean())
    said = f"about {changes:.1%} of the rows" if changes * rows >= 0.5 else "none or next to none of the rows"
    few = f" (from {rows} rows, which is few for this estimate)" if rows < FEW else ""
    console.print(
        f"asked again with other exemplars and samples, {said} would get another category{few}; "
        f"answers to one prompt are alike: {report.effect:.1f} of them count as one",
        soft_wrap=True,
    )


def _examples(console: Console, probed: Sequence[Probed]) -> None:
    from ...nn.slick import CATEGORIES
    from .prefer import on_screen

    for name in CATEGORIES:
        here = [p for p in probed if p.category == name]
        if here:
            console.print(f"\n{name}, for example:")
        for p in here[:EXAMPLES]:
            counts = f"greedy {sum(p.greedy)} of {len(p.greedy)}, sampled {sum(p.right)} of {p.samples * len(p.right)}"
            said = f'; it says "{_short(p.said)}"' if not all(p.greedy) else ""
            console.print(on_screen(f"  {_short(p.fact.question, 90)} -> {_short(p.fact.answers[0])}: {counts}{said}"), soft_wrap=True)


def _short(text: str, most: int = 40) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."


def _advice(console: Console, report: Report, model: str) -> None:
    """What of the set is new, and what follows from it."""
    from rich.text import Text

    new, weak = report["Unknown"], report["WeaklyKnown"]
    console.print()
    more = f"; {weak.share:.1%} more it says only now and then, when it samples" if weak.rows else ""
    console.print(f"{new.share:.1%} of the rows [{new.low:.1%}, {new.high:.1%}] are new to {model}{more}", markup=False, soft_wrap=True)
    if new.share >= MUCH:
        console.print(
            Text(
                "warning: this is much. Unknown rows are fitted more slowly than known ones, and as they are fitted a model errs more on what it knew: it "
                "learns to say what it does not know (Gekhman et al., 2024). Leave most of them out (--keep HighlyKnown,MaybeKnown or --cap Unknown=0.1 with "
                "--out FILE), give the knowledge as text to read first, or train on the rows that --out writes and stop in time: evaluate.knowledge=stop",
                style="yellow",
            ),
            soft_wrap=True,
        )


def _write(out: Path, probe: Probe, probed: Sequence[Probed], keep: list[str] | None, caps: dict[str, float], order: str, seed: int) -> int:
    """The rows that are chosen, with what was found of them; how many."""
    from ... import atomic
    from ...data.known import choose
    from ...nn.slick import CATEGORIES

    places = choose([p.category for p in probed], keep=keep or CATEGORIES, caps=caps, order=order, seed=seed)
    lines = []
    for p in (probed[i] for i in places):
        statement = {"prompt": probe.patterns[0].opening(p.fact.question), "completion": p.fact.answers[0]} if probe.patterns else {}
        lines.append(json.dumps({**p.fact.fields, **statement, **p.columns()}, ensure_ascii=False, default=str) + "\n")
    atomic.text(out, "".join(lines))
    return len(lines)
