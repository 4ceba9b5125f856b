"""luthier data judge: a model behind an endpoint says which of several answers is better, by a principle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .. import heavy

if TYPE_CHECKING:
    from rich.console import Console

    from ...data.questions import Question
    from ...feedback.collecting import Answered
    from ...feedback.endpoint import Endpoint
    from ...feedback.judging import Judgement

AT_ONCE = 8  # prompts answered together
LINE_EVERY = 10.0  # seconds between lines where there is no terminal to draw a bar on


def command(
    what: Annotated[
        str, typer.Argument(metavar="MODEL", help="What answers: fiddle, a model folder, a Hub id, an adapter or a run. Or, alone, a file that has answers.")
    ],
    output: Annotated[Path, typer.Option(help="Where the judgements go, one JSON object a line. Prompts that it holds are not asked again.")],
    endpoint: Annotated[str, typer.Option(help="The judge's address, OpenAI-compatible: http://127.0.0.1:8000/v1")],
    prompts: Annotated[
        str | None,
        typer.Argument(metavar="PROMPTS", help="Prompts: .txt, one a line, or data of any shape (prompts, conversations, preferences), a folder, a Hub id."),
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The judge's name at its endpoint. Default: the only one that it serves.")] = None,
    principle: Annotated[
        list[str] | None, typer.Option(help='By what is judged: "Choose the answer that ..."; of several one is drawn for each comparison.')
    ] = None,
    principles: Annotated[Path | None, typer.Option(help="A file of principles, one a line; lines that begin with # are left out.")] = None,
    reasons: Annotated[bool, typer.Option("--reasons", help="The judge gives its reasons before its verdict: better, slower.")] = False,
    key_env: Annotated[str | None, typer.Option(help="The environment variable that holds the endpoint's key. The key is written nowhere.")] = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="Write a line for each pair (chosen, rejected) instead of a ranking for each prompt.")] = False,
    disagreement: Annotated[
        Literal["tie", "drop"], typer.Option(help="A pair whose verdict changes with the order of its answers: counted as a tie, or not at all.")
    ] = "tie",
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    answers: Annotated[int, typer.Option(min=2, max=16, help="Answers sampled for each prompt; all pairs of them are compared.")] = 4,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the model that answers: the higher, the more its answers differ.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="It chooses among the likeliest tokens that make up this share.")] = 0.95,
    max_new: Annotated[int, typer.Option(min=1, help="Its longest answer, in tokens.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same answers.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many prompts.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="Which column is which, OURS=YOURS: prompt=question, answers=candidates.")] = None,
    parallel: Annotated[int, typer.Option(min=1, max=256, help="So many comparisons are asked at a time.")] = 4,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds to wait for a reply before it is asked again.")] = 120.0,
    judge_tokens: Annotated[int | None, typer.Option(min=1, help="Longest reply of the judge, in tokens. Default: 512; with --reasons 2048.")] = None,
    model: Annotated[str | None, typer.Option(help="The adapter's base, where it is not where the adapter says.")] = None,
    template: Annotated[str | None, typer.Option(help="Chat template of the model that answers: a name or a .jinja file.")] = None,
    precision: Annotated[str, typer.Option(help="float32, bfloat16, or auto: what this machine does fast.")] = "auto",
) -> None:
    """AI feedback: `luthier data judge runs/NAME prompts.jsonl --endpoint http://127.0.0.1:8000/v1 --principle "Choose ..." --output preferences.jsonl`."""
    from rich.console import Console

    heavy("feedback.collecting")
    from ...data.collected import Collected
    from ...feedback.collecting import Ahead, Sampling, asked_of, in_turn, left_to_do, opened, some
    from ...feedback.judging import Judge, Tally, judge_all

    rules = principles_of(principle or [], principles)
    asked = asked_of(what, prompts, prompt or [], columns=column or [], limit=limit)
    file = Collected(output, "chosen" if pairs else "ranked", source=prompts or what)
    console = Console(highlight=False)
    say = lambda text: console.print(text, markup=False, soft_wrap=True)  # noqa: E731
    todo, notes = left_to_do(asked, file)
    for note in notes:
        say(note)
    if not todo:
        return
    server = server_of(endpoint, judge_model, key_env, timeout, say)
    for rule in rules:
        say(f"principle: {rule}")
    judge = Judge(endpoint=server, principles=rules, reasons=reasons, max_tokens=judge_tokens, seed=seed)
    how = Sampling(answers=answers, temperature=temperature, top_p=top_p, max_new=max_new, seed=seed, template=template)
    policy = None if asked.model is None else opened(asked.model, model, precision)
    source: dict[str, Any] = {"by": "judge", "judge": server.model, "endpoint": server.url} | ({"reasons": True} if reasons else {})
    source |= {"model": asked.model, **how.said()} if asked.model is not None else {}
    drop, tally, alone = disagreement == "drop", Tally(by_place=asked.by_place), list[str]()
    before = len(file.keys)
    try:
        with Ahead(lambda check: in_turn(policy, todo, how, AT_ONCE, check), most=2 * AT_ONCE) as items, progress(console, len(todo)) as done:
            for judgement in judge_all(judge, _to_compare(iter(items), alone, done), parallel=parallel):
                tally.add(judgement, drop=drop)
                if lines := _lines(judgement, source, pairs=pairs, drop=drop):
                    file.add(judgement.question, lines)
                done()
    finally:
        for line in tally.said(drop=drop) if tally.pairs else ():
            say(line)
        if alone:
            say(f"{some(len(alone), 'prompt')} had no two answers to compare, the last: {alone[-1]}")
        say(f"{some(len(file.keys) - before, 'prompt')} written to {output}, which now holds {some(len(file.keys), 'prompt')}")


def _to_compare(items: Iterator[Answered], alone: list[str], done: Callable[[], None]) -> Iterator[tuple[Question, list[str]]]:
    """What can be compared; why the others cannot goes into ``alone``."""
    for item in items:
        if item.why:
            alone.append(item.why)
            done()
        else:
            yield item.question, item.answers


def _lines(judgement: Judgement, source: dict[str, Any], *, pairs: bool, drop: bool) -> list[dict[str, Any]]:
    """What is written of a judgement; nothing where no verdict could be read."""
    from fractions import Fraction

    from ...data.collected import pair_line, ranking_line

    source = source | {"time": datetime.now(UTC).isoformat(timespec="seconds")}
    points, answers = judgement.points(drop=drop), judgement.answers
    if pairs:
        return [
            pair_line(
                judgement.question,
                *((answers[i], answers[j]) if worth >= Fraction(1, 2) else (answers[j], answers[i])),
                source | {"principle": judgement.principles[i, j]},
                tied=worth == Fraction(1, 2),
            )
            for (i, j), worth in points.items()
        ]
    if not points:
        return []
    used = list(dict.fromkeys(judgement.principles.values()))
    source |= {"principle": used[0] if len(used) == 1 else used, "consistent": sum(o.is_consistent for o in judgement.outcomes.values())}
    source["pairs"] = len(judgement.outcomes)
    return [ranking_line(judgement.question, [[answers[i] for i in place] for place in judgement.places(drop=drop)], source)]


def principles_of(given: list[str], file: Path | None) -> list[str]:
    """The principles of the command line and of a file; one of our own where there are none. Raises LuthierError for a file without any."""
    from ...errors import LuthierError
    from ...feedback.judging import PRINCIPLE

    found = [p.strip() for p in given if p.strip()]
    if file is not None:
        if not file.is_file():
            raise LuthierError(f"--principles {file}: no such file; it holds a principle a line")
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
        except UnicodeDecodeError:
            raise LuthierError(f"--principles {file}: is not UTF-8 text") from None
        found += [line for line in lines if line and not line.startswith("#")]
    if not found and (given or file is not None):
        raise LuthierError("no principle is given: --principle or the file of --principles is empty")
    return list(dict.fromkeys(found)) or [PRINCIPLE]


def server_of(url: str, model: str | None, key_env: str | None, timeout: float, say: Callable[[str], None]) -> Endpoint:
    """The judge. Raises LuthierError where it is not said, or found out, which model it is."""
    from ...errors import LuthierError
    from ...feedback.endpoint import Endpoint, key_of

    server = Endpoint(url, model or "", key=None if key_env is None else key_of(key_env), timeout=timeout)
    if key_env is not None and not server.is_local and server.url.startswith("http://"):
        say("warning: the key goes to another machine unencrypted (http); use https where it is to stay yours")
    if model is None:
        served = server.models()
        if len(served) != 1:
            raise LuthierError(f"{server.url}: serves {', '.join(served[:20]) or 'no model'}; name the judge: --judge-model NAME")
        server.model = served[0]
    say(f"judge: {server.model} at {server.url}")
    return server


@contextmanager
def progress(console: Console, total: int, doing: str = "judging", has: str = "judged") -> Iterator[Callable[..., None]]:
    """A bar with the time left; without a terminal a line now and then. Call what it gives once for each prompt, or with how many are done."""
    import time

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from ...running.progress import clock

    if console.is_terminal:
        columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(doing, total=total)
            yield lambda n=1: bar.advance(task, n)
        return
    began = last = time.monotonic()
    count = 0

    def done(n: int = 1) -> None:
        nonlocal count, last
        count += n
        now = time.monotonic()
        if now - last >= LINE_EVERY and count < total:
            console.print(f"{has} {count:,} of {total:,}, left {clock((now - began) / count * (total - count))}")
            last = now

    yield done
