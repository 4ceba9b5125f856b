"""luthier eval: held-out loss and task scores of a model or an adapter, beside its base; by slice, against another model, and by a judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import heavy

if TYPE_CHECKING:
    from ..evaluating.evaluation import Asked, Found, Opening
    from ..evaluating.scoreboard import Board


def command(
    what: Annotated[str, typer.Argument(help="fiddle, a model folder, a Hub id, an adapter or a run's folder.")],
    data: Annotated[list[str] | None, typer.Option(help="Held-out data: a file, a folder or a Hub id; may be given several times.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="A task to score (f1, 'exact_match after=####', ./mytask.py); may be given several times. luthier kinds tasks lists them."),
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="At most so many rows are answered. Default: 500; all, where a head gives labels.")] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(help="Every score by slice: length, answer_length, label, source, or a column of the data; may be given several times."),
    ] = None,
    against: Annotated[str | None, typer.Option(help="Another run, adapter or model on the same rows: the paired difference of every score.")] = None,
    judge: Annotated[
        str | None, typer.Option(help="Whose answers are better, one against another: a run trained with objective: reward, or an endpoint's address.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The judge's name at its endpoint. Default: the only one that it serves.")] = None,
    principle: Annotated[list[str] | None, typer.Option(help='By what the endpoint judges: "Choose the answer that ..."')] = None,
    key_env: Annotated[str | None, typer.Option(help="The environment variable that holds the endpoint's key. The key is written nowhere.")] = None,
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
    harness: Annotated[
        str | None, typer.Option(metavar="TASKS", help="Instead of --data: tasks of lm-eval, a,b,c (needs the extra luthier[harness]); --rows limits each.")
    ] = None,
    harness_tasks: Annotated[Path | None, typer.Option(help="With --harness: a folder of task files of your own.")] = None,
) -> None:
    """Evaluate: every score with its count and a 95 % interval. `luthier eval runs/NAME --data test.jsonl --task bleu --by length --against runs/OTHER`."""
    heavy("evaluating.evaluation")
    from ..evaluating.evaluation import Asked, Opening
    from ..opening import named

    opening = Opening(what, model, named(adapter or []), use, alone)
    if harness is not None:
        given: dict[str, Any] = {"--data": data, "--task": task, "--by": by, "--against": against, "--judge": judge, "--reward": reward, "--text": text}
        given |= {"--prompts": prompts, "--copy-from": copy_from, "--output": output, "--part": part, "--column": column}
        return _harness(opening, harness, harness_tasks, {"rows": rows, "template": template, "precision": precision, "seed": seed}, given, as_json)
    asked = Asked(
        data=data or [],
        tasks=task or [],
        rows=rows,
        text=text,
        part=part,
        prompts=prompts,
        rewards=reward or [],
        temperature=temperature,
        beginning=beginning,
        columns=_columns(column or []),
        copy_from=copy_from,
        max_new=max_new,
        template=template,
        precision=precision,
        seed=seed,
        answers=judge is not None or output is not None,
    )
    if harness_tasks is not None:
        _refuse("--harness-tasks is of --harness; say it too")
    _check(asked, output, judge, judge_model, principle, key_env)
    board = _evaluated(opening, asked, by or [], against, _judge(judge, judge_model, principle, key_env), output)
    return _show(board, as_json)


def _check(asked: Asked, output: Path | None, judge: str | None, judge_model: str | None, principle: list[str] | None, key_env: str | None) -> None:
    """Refuse what does not go together, before anything is opened."""
    if not asked.data:
        _refuse("--data is missing: name held-out data, a file, a folder or a Hub id (or tasks of lm-eval with --harness)")
    if asked.prompts and (asked.text or asked.copy_from or asked.part):
        _refuse("--prompts answers prompts that have no answers; --text, --copy-from and --part read what they lack")
    if asked.text and (asked.tasks or asked.copy_from or output or asked.part or judge):
        _refuse("--text measures loss on raw text; --task, --copy-from, --output, --part and --judge say what else is wanted")
    if not asked.prompts and (asked.rewards or asked.temperature or asked.beginning != 16):
        _refuse("--reward, --temperature and --beginning are of --prompts; say it too")
    if asked.prompts and not (asked.tasks or asked.rewards or judge):
        _refuse("--prompts: nothing to score answers by; name a --task, a --reward, a --judge, or several")
    if judge is None and (judge_model or principle or key_env):
        _refuse("--judge-model, --principle and --key-env are of --judge; say which judge")


def _refuse(sentence: str) -> None:
    from ..errors import LuthierError

    raise LuthierError(sentence)


def _evaluated(opening: Opening, asked: Asked, by: list[str], against: str | None, judge: Any, output: Path | None) -> Board:
    """Everything, in the order that keeps one model in memory at a time."""
    import sys

    from rich.console import Console

    from ..evaluating.evaluation import Opening, examine, set_beside
    from ..evaluating.scoreboard import Board, sliced
    from ..measuring.confusion import report
    from ..measuring.slices import slicing
    from ..running.progress import Reporter

    board = Board()
    say = Reporter(Console(file=sys.stderr, highlight=False))
    beside = "base" if against == "base" else None
    if beside and opening.alone:
        _refuse("--against base and --alone contradict one another; leave one out")
    cuts: list[Any] = []

    def ready(found: Found) -> None:
        cuts.extend(slicing(name, found.records, found.rows, answers=found.writes and not asked.prompts) for name in by)

    found = examine(opening, asked, say, ready=ready)
    if beside and "base" not in found.sheets:
        _refuse("--against base: this is a base, or its head says nothing without its delta; name another run")
    if against is not None and beside is None:
        other = examine(Opening(against, alone=True), asked, say)
        beside = set_beside(found, other, Path(against).name, notes=board.notes.append)
    if judge is not None:
        _judged(board, found, beside or ("base" if "base" in found.sheets else None), judge, asked.seed)
    board.fill(found, beside, asked.seed)
    if found.task is not None:
        board.labels = {c: report(found.task, found.shown, s.answers, seed=asked.seed) for c, s in found.sheets.items() if s.answers and c != "copy"}
    first = found.subjects[0]
    for cut in cuts:
        for column in dict.fromkeys([first, *found.sheets]):
            sheet = found.sheets[column]
            board.slices.setdefault(column, []).append(sliced(cut, sheet.marks, seed=asked.seed))
    board.first = first
    if output is not None:
        _write(output, found)
    return board


def _judge(judge: str | None, model: str | None, principle: list[str] | None, key_env: str | None) -> Any:
    """How the judge is asked: prompts, two lists of answers, a seed -> Wins. A reward model's folder is looked at at once, an endpoint is asked who it is."""
    from ..evaluating.winning import by_endpoint, by_scores, reward_model, reward_of

    if judge is None:
        return None
    if not judge.startswith(("http://", "https://")):
        if model or principle or key_env:
            _refuse("--judge-model, --principle and --key-env are of an endpoint (--judge http://127.0.0.1:8000/v1)")
        folder = reward_model(Path(judge))

        def scored(prompts: Any, first: Any, second: Any, seed: int) -> Any:
            score = reward_of(folder)
            return by_scores(score(prompts, first), score(prompts, second), seed=seed)

        return scored
    from rich.console import Console

    from .data.judge import principles_of, progress, server_of

    console = Console(stderr=True, highlight=False)
    rules = principles_of(principle or [], None)
    server = server_of(judge, model, key_env, 120.0, lambda text: console.print(text, markup=False, soft_wrap=True))

    def asked(prompts: Any, first: Any, second: Any, seed: int) -> Any:
        with progress(console, len(prompts)) as done:
            return by_endpoint(server, prompts, first, second, principles=rules, on_judged=done, seed=seed)

    return asked


def _judged(board: Board, found: Found, beside: str | None, judge: Any, seed: int) -> None:
    """The win rate of the first column against the other model, or its base."""
    if beside is None:
        _refuse("--judge compares the answers of two models, and there is one; name the other with --against")
    assert beside is not None
    first, second = (found.sheets[c].answers for c in (found.subjects[0], beside))
    if first is None or second is None or not found.writes:
        _refuse("--judge compares what models write, and these give labels or scores")
    board.wins[f"{found.subjects[0]} against {beside}"] = judge([r["prompt"] for r in found.shown], first, second, seed)


def _columns(settings: list[str]) -> dict[str, str]:
    for setting in settings:
        if not all(setting.partition("=")):
            _refuse(f"--column {setting}: say OURS=YOURS, for example --column text=review")
    return dict(setting.split("=", 1) for setting in settings)


def _show(board: Board, as_json: bool) -> None:
    from ..evaluating.scoreboard import show

    if as_json:
        typer.echo(json.dumps(board.plain(), indent=2, ensure_ascii=False))
    else:
        show(board)


def _write(output: Path, found: Found) -> None:
    with output.open("w", encoding="utf-8") as f:
        for i, row in enumerate(found.shown):
            said = {column: sheet.answers[i] for column, sheet in found.sheets.items() if sheet.answers is not None}
            f.write(json.dumps({"prompt": row["prompt"], "refs": row["refs"], **said}, ensure_ascii=False) + "\n")


def _harness(opening: Opening, tasks: str, own: Path | None, how: dict[str, Any], given: dict[str, Any], as_json: bool) -> None:
    """Tasks of lm-eval, beside the base too."""
    from ..evaluating.harness import evaluated
    from ..evaluating.scoreboard import Board

    if wrong := [name for name, value in given.items() if value]:
        _refuse(f"--harness runs the tasks of lm-eval on their own data; leave out {', '.join(wrong)}")
    board = Board()
    evaluated(board, opening, [t.strip() for t in tasks.split(",") if t.strip()], own, **how)
    return _show(board, as_json)
