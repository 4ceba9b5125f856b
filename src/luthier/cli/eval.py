"""luthier eval: held-out loss and task scores of a model or an adapter, beside its base."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..evaluate import Score
    from ..measure import Mean
    from ..policy import Policy

HEADED = ("label", "ranked")  # how rows are rendered for objectives that answer by a head


def command(
    what: Annotated[str, typer.Argument(help="fiddle, a model folder, a Hub id, an adapter or a run's folder.")],
    data: Annotated[list[str], typer.Option(help="Held-out data: a file, a folder or a Hub id; may be given several times.")],
    task: Annotated[list[str] | None, typer.Option(help="A task to score (bleu, exact_match, ...); may be given several times.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="At most so many rows are answered. Default: 500; all, where a head gives labels.")] = None,
    text: Annotated[
        bool, typer.Option("--text", help="Raw text: loss and bits per byte (of hidden tokens, for models that are no decoders), no tasks.")
    ] = False,
    prompts: Annotated[
        bool, typer.Option("--prompts", help="Prompts alone, or the beginnings of raw text: answers are scored by --task and --reward, and there is no loss.")
    ] = False,
    reward: Annotated[
        list[str] | None,
        typer.Option(help="With --prompts: a source of reward to score by (runs/reward, runs/stars:good, ./mine.py); may be given several times."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="With --prompts: 0 answers greedily.")] = 0.0,
    beginning: Annotated[int, typer.Option(min=1, help="With --prompts, of raw text: so many first tokens are the prompt.")] = 16,
    column: Annotated[list[str] | None, typer.Option(help="Which column is which, OURS=YOURS, e.g. text=review; may be given several times.")] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Do not score the base beside an adapter.")] = False,
    copy_from: Annotated[str | None, typer.Option(help="Training data: also score copying the answer of its nearest prompt.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write every prompt, reference and answer to this .jsonl file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    max_new: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    model: Annotated[str | None, typer.Option(help="The adapter's base, where it is not where the adapter says.")] = None,
    template: Annotated[str | None, typer.Option(help="Chat template: a name or a .jinja file. Default: the model's own.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws the resamples behind the intervals.")] = 0,
    precision: Annotated[str, typer.Option(help="float32, bfloat16, or auto: what this machine does fast.")] = "auto",
    adapter: Annotated[list[str] | None, typer.Option(help="One more adapter on the same base, NAME=FOLDER: a column for each.")] = None,
    use: Annotated[str | None, typer.Option(help="Score only this: a name, default (the first argument's), a+b for a stack, none.")] = None,
    part: Annotated[str | None, typer.Option(help="Of a model that learned several tasks (objective: multitask): which of them.")] = None,
) -> None:
    """Evaluate: every score with its count and a 95 % interval. `luthier eval runs/NAME --data test.jsonl --task bleu`."""
    from ..errors import LuthierError
    from ..opening import load, named
    from ..plugins import plugin

    if prompts and (text or copy_from or part):
        raise LuthierError("--prompts answers prompts that have no answers; --text, --copy-from and --part read what they lack")
    if text and (task or copy_from or output or part):
        raise LuthierError("--text measures loss on raw text; --task, --copy-from, --output and --part say what else is wanted")
    if not prompts and (reward or temperature or beginning != 16):
        raise LuthierError("--reward, --temperature and --beginning are of --prompts; say it too")
    if prompts and not (task or reward):
        raise LuthierError("--prompts: nothing to score answers by; name a --task, a --reward, or both")
    tasks = {name: plugin("tasks", name)() for name in task or []}
    more = named(adapter or [])
    policy = load(what, model=model, precision=precision, adapters=more, use=use or ("none" if more else None))
    serves = list(policy.deltas) if more and use is None else [policy.active]
    goal = _objective(policy, text, part)
    headed = goal.renders in HEADED
    names = [*serves, None] if any(serves) and not alone and not headed else serves  # a head without its delta says nothing
    policy.use(max(names, key=lambda n: policy.deltas[n].shift if n in policy.deltas else 0))  # rows are read for the one with the least room
    if prompts:
        how: dict[str, Any] = {"template": template, "columns": _columns(column or []), "beginning": beginning, "rows": rows or 500}
        how |= {"max_new": max_new, "temperature": temperature, "seed": seed}
        scores, written = _prompted(policy, data, list(tasks), reward or [], {n: _label(n, names, Path(what).name, bool(more)) for n in names}, how)
        if output is not None:
            output.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in written), encoding="utf-8")
        return _show(scores, as_json)
    goal.serves(policy.base.anatomy.kind)
    if goal.renders == "label":
        if copy_from:
            raise LuthierError("--copy-from copies answers, and this model gives labels; the share of the commonest label is what to beat")
        tasks = {"classification": plugin("tasks", "classification")(problem=goal.problem)} | tasks
    elif goal.renders == "ranked":
        if copy_from:
            raise LuthierError("--copy-from copies answers, and this model scores them; preferring the longer answer is what to beat")
        tasks = {"preference": plugin("tasks", "preference")()} | tasks
    prepared = _prepare(policy, data, template, goal, _columns(column or []))
    del prepared.validation_records[rows or (len(prepared.validation) if headed else 500) :]
    columns: dict[str, dict[str, Any]] = {}
    answers: dict[str, list[str]] = {}
    for name in names:
        policy.use(name)
        label = _label(name, names, Path(what).name, bool(more))
        columns[label] = _losses(policy, prepared, goal)
        if tasks:
            answers[label] = _answers(policy, goal, prepared, template, max_new)
            columns[label] |= _scores(tasks, prepared, answers[label], seed)
    if goal.renders == "ranked":
        answers["longer"] = _lengths(prepared)
        columns["longer"] = {"accuracy": _scores({"preference": tasks["preference"]}, prepared, answers["longer"], seed)["accuracy"]}
    if copy_from is not None:
        answers["copy"] = _copies(policy, prepared, copy_from, template)
        columns["copy"] = _scores(tasks, prepared, answers["copy"], seed)
    if output is not None:
        _write(output, prepared, answers)
    return _show(columns, as_json)


def _label(name: str | None, names: Sequence[str | None], what: str, more: bool) -> str:
    """What a column is called."""
    return (name if more else "tuned") if name else ("base" if len(names) > 1 else what)


def _show(columns: dict[str, dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({c: {k: _plain(v) for k, v in cells.items()} for c, cells in columns.items()}, indent=2))
    else:
        _print(columns)


def _prompted(
    policy: Policy, data: list[str], tasks: list[str], rewards: list[str], labels: dict[str | None, str], how: dict[str, Any]
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Scores of the answers to prompts alone, a column for each of ``labels``; and every prompt with its answers, as --output writes it."""
    import sys

    from rich.console import Console

    from ..asking import answered, asked, scored
    from ..measure import can_write
    from ..progress import Reporter
    from ..rewards import Judge

    can_write(policy)
    say = Reporter(Console(file=sys.stderr, highlight=False))
    rows = asked(policy, data, template=how["template"], columns=how["columns"], beginning=how["beginning"], room=how["max_new"])[: how["rows"]]
    judge = Judge(dict.fromkeys(rewards, 1.0), (), policy)
    columns: dict[str, dict[str, Any]] = {}
    written: list[dict[str, Any]] = [{"prompt": r.extras["task"]["prompt"], "refs": r.extras["task"]["refs"]} for r in rows]
    for name, label in labels.items():
        policy.use(name)
        answers = answered(policy, rows, template=how["template"], max_new=how["max_new"], temperature=how["temperature"], seed=how["seed"], say=say)
        columns[label] = scored(judge, answers, tasks, seed=how["seed"])
        for line, a in zip(written, answers, strict=True):
            line[label] = a.text
    return columns, written


def _objective(policy: Policy, text: bool, part: str | None) -> Any:
    """What the data is read for: labels, where the model has a head; else responses; with --text the text itself."""
    from ..measure import learned
    from ..plugins import plugin

    if part is not None or (policy.heads and not text):
        return learned(policy, part)
    return plugin("objectives", "sft" if not text else "text" if policy.base.anatomy.kind == "decoder" else "masked_text")()


def _prepare(policy: Policy, data: list[str], template: str | None, goal: Any, columns: dict[str, str]) -> Any:
    from ..data.prepare import prepare
    from ..reading import form_of

    known = {"problem": goal.problem, "labels": goal.labels} if goal.renders == "label" else {}
    # Read as validation data of itself: everything in it is held out here.
    return prepare(
        data,
        policy.base.tokenizer,
        renders=goal.renders,
        form=form_of(policy.base),
        template=template,
        columns=columns,
        max_tokens=min(2048, policy.limit),
        over_length="split" if goal.renders in ("text", "masked") else "truncate",
        on_bad_row="stop",
        validation=data,
        validation_rows=10**9,
        say=lambda _: None,
        **known,
    )


def _columns(settings: list[str]) -> dict[str, str]:
    from ..errors import LuthierError

    for setting in settings:
        if not all(setting.partition("=")):
            raise LuthierError(f"--column {setting}: say OURS=YOURS, for example --column text=review")
    return dict(setting.split("=", 1) for setting in settings)


def _losses(policy: Policy, prepared: Any, objective: Any) -> dict[str, Any]:
    from ..evaluate import loss_on
    from ..measure import Mean, group

    pad, packed = policy.base.tokenizer.pad_token_id or 0, policy.base.packs
    groups = group(prepared.validation, 8192, packed)
    losses = loss_on(policy, objective, (objective.collate(g, pad=pad, packed=packed).to(policy.device) for g in groups))
    term = next(iter(objective.terms))
    unit = "hidden token" if objective.renders == "masked" else term.removesuffix("s")
    out: dict[str, Any] = {f"loss per {unit}": Mean(losses.value, losses.counts[term], unit)}
    if objective.renders == "text":
        size = sum(len(policy.base.tokenizer.decode(r.ids[1:], skip_special_tokens=True).encode()) for r in prepared.validation)
        out["bits per byte"] = Mean(losses.bits_per_byte(size), size)
    return out


def _answers(policy: Policy, goal: Any, prepared: Any, template: str | None, max_new: int) -> list[str]:
    import sys

    from rich.console import Console

    from ..measure import answer_rows, as_answer, predict, task_rows
    from ..progress import Reporter

    if goal.renders in HEADED:
        return [as_answer(said) for said in predict(policy, goal, prepared.validation[: len(prepared.validation_records)])]
    say = Reporter(Console(file=sys.stderr, highlight=False))
    return [a["answer"] for a in answer_rows(policy, task_rows(prepared.validation_records), template=template, max_new=max_new, say=say, label="answering")]


def _scores(tasks: dict[str, Any], prepared: Any, answers: list[str], seed: int) -> dict[str, Score]:
    from ..evaluate import score
    from ..measure import task_rows

    out: dict[str, Score] = {}
    for task in tasks.values():
        out |= score(lambda _: answers, task, task_rows(prepared.validation_records), seed=seed)
    return out


def _lengths(prepared: Any) -> list[str]:
    """Each answer's number of tokens as its score: the reward that a reward model has to beat."""
    from ..core import examples_of
    from ..data.rows import sides

    rows = prepared.validation[: len(prepared.validation_records)]
    return [json.dumps([sum(sides(e)) for e in examples_of(row)]) for row in rows]


def _copies(policy: Policy, prepared: Any, source: str, template: str | None) -> list[str]:
    from ..data.prepare import prepare
    from ..evaluate import nearest_copy
    from ..measure import task_rows

    train = prepare(
        [source], policy.base.tokenizer, renders="chat", template=template, max_tokens=2048, validation=[source], validation_rows=10**9, say=lambda _: None
    )
    pairs = [(r["prompt"], r["refs"][0]) for r in task_rows(train.validation_records)]
    return nearest_copy(pairs, [r["prompt"] for r in task_rows(prepared.validation_records)])


def _write(output: Path, prepared: Any, answers: dict[str, list[str]]) -> None:
    from ..measure import task_rows

    with output.open("w", encoding="utf-8") as f:
        for i, row in enumerate(task_rows(prepared.validation_records)):
            line = {"prompt": row["prompt"], "refs": row["refs"], **{label: texts[i] for label, texts in answers.items()}}
            f.write(json.dumps(line, ensure_ascii=False) + "\n")


def _print(columns: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False)
    table.add_column("measure", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for key in dict.fromkeys(k for cells in columns.values() for k in cells):
        table.add_row(key, *(_cell(cells.get(key)) for cells in columns.values()))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # a pipe has no width of its own
    console.print(table)


def _cell(value: Score | Mean | None) -> str:
    if value is None:
        return ""
    return str(value) if hasattr(value, "low") else f"{value.value:.4f} n={value.n:,}"


def _plain(value: Score | Mean) -> dict[str, Any]:
    return vars(value)
