"""luthier data prefer: a person says which of several answers is better, and it is written down at once."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import heavy

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from ...data.collected import Collected
    from ...feedback.collecting import Answered

RANKING = """  2 1 3 4   answer 2 is the best, then 1, 3 and 4
  2=1 3     2 and 1 are as good as one another, and better than 3
  2         2 is the best; those that are not named share the last place"""
PAIR = """  a   answer A is better
  b   answer B is better
  =   they are as good as one another"""
COMMANDS = """  s   skip this prompt; it is asked again the next time
  u   undo: go back to the prompt before, and take its line out of the file
  q   quit; everything is written, and the same command goes on here
  ?   show this"""


def command(
    what: Annotated[
        str, typer.Argument(metavar="MODEL", help="What answers: fiddle, a model folder, a Hub id, an adapter or a run. Or, alone, a file that has answers.")
    ],
    output: Annotated[Path, typer.Option(help="Where the judgements go, one JSON object a line. Prompts that it holds are not asked again.")],
    prompts: Annotated[
        str | None,
        typer.Argument(metavar="PROMPTS", help="Prompts: .txt, one a line, or data of any shape (prompts, conversations, preferences), a folder, a Hub id."),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    answers: Annotated[int, typer.Option(min=2, max=26, help="Answers sampled for each prompt; the same ones are merged.")] = 4,
    pairs: Annotated[bool, typer.Option("--pairs", help="Show two of the answers, and write chosen and rejected.")] = False,
    temperature: Annotated[float, typer.Option(min=0.01, help="The higher, the more the answers differ.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Choose among the likeliest tokens that make up this share.")] = 0.95,
    max_new: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same answers in the same order.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many prompts.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="Which column is which, OURS=YOURS: prompt=question, answers=candidates.")] = None,
    model: Annotated[str | None, typer.Option(help="The adapter's base, where it is not where the adapter says.")] = None,
    template: Annotated[str | None, typer.Option(help="Chat template: a name or a .jinja file. Default: the model's own.")] = None,
    precision: Annotated[str, typer.Option(help="float32, bfloat16, or auto: what this machine does fast.")] = "auto",
) -> None:
    """Rank a model's answers: `luthier data prefer runs/NAME prompts.jsonl --output preferences.jsonl`. ? at the first question says what can be typed."""
    from rich.console import Console

    heavy("feedback.collecting")
    from ...data.collected import Collected
    from ...feedback.collecting import Ahead, Sampling, asked_of, in_turn, left_to_do, opened

    asked = asked_of(what, prompts, prompt or [], columns=column or [], limit=limit)
    file = Collected(output, "chosen" if pairs else "ranked", source=prompts or what)
    console = Console(highlight=False)
    todo, notes = left_to_do(asked, file)
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)
    if not todo:
        return
    how = Sampling(answers=answers, temperature=temperature, top_p=top_p, max_new=max_new, seed=seed, template=template)
    policy = None if asked.model is None else opened(asked.model, model, precision)
    source: dict[str, Any] = {"by": "person"} | ({"model": asked.model, **how.said()} if asked.model is not None else {})
    with Ahead(lambda check: in_turn(policy, todo, how, 1, check)) as items:
        Session(file, console, source, pairs=pairs, seed=seed, total=len(todo)).run(iter(items))


class Session:
    """Shows prompts with their answers, reads what is typed, writes it down; knows the way back."""

    def __init__(self, file: Collected, console: Console, source: dict[str, Any], *, pairs: bool, seed: int, total: int):
        self.file, self.console, self.source, self.pairs, self.seed, self.total = file, console, source, pairs, seed, total
        self.before: list[tuple[Answered, bool]] = []  # what was shown before, and whether it was written
        self.back: list[Answered] = []  # to be shown again
        self.alike = 0  # prompts that had no two answers
        self.last_why = ""

    def run(self, items: Iterator[Answered]) -> None:
        """Until the prompts or the person come to an end. Raises Interrupted on Ctrl-C."""
        from ...errors import Interrupted

        self.say("? says what can be typed")
        try:
            while True:
                item = self.back.pop() if self.back else self.next(items)
                if item is None:
                    if self.is_done():
                        break
                elif item.why:
                    self.alike, self.last_why = self.alike + 1, item.why
                elif not self.ask(item):
                    break
        except KeyboardInterrupt:
            self.say("")
            raise Interrupted(f"interrupted; {self.result()}") from None
        self.say(self.result())

    def next(self, items: Iterator[Answered]) -> Answered | None:
        with self.console.status("waiting for answers"):  # nothing where there is no terminal
            return next(items, None)

    def is_done(self) -> bool:
        """After the last prompt, which can still be taken back."""
        if not self.before:
            return True
        try:
            typed = input("that was the last; Enter ends, u goes back to it: ").strip().lower()
        except EOFError:
            self.say("")
            return True
        return typed not in ("u", "undo") or not self.undo()

    def ask(self, item: Answered) -> bool:
        """One prompt, until it is judged, skipped or left; False to quit."""
        from ...data.collected import Unread

        answers = self.shuffled(item)
        self.show(item, answers)
        while True:
            try:
                typed = input("a, b or =: " if self.pairs else "best first: ").strip().lower()
            except EOFError:
                self.say("")
                return False
            if typed in ("q", "quit"):
                return False
            if typed in ("?", "h", "help"):
                self.say(f"{PAIR if self.pairs else RANKING}\n{COMMANDS}")
            elif typed in ("s", "skip"):
                self.before.append((item, False))
                return True
            elif typed in ("u", "undo"):
                if self.undo():
                    self.back.insert(len(self.back) - 1, item)
                    return True
            else:
                try:
                    self.write(item, answers, typed)
                except Unread as e:
                    self.say(f"{e} (? says what can be typed)")
                    continue
                self.before.append((item, True))
                return True

    def shuffled(self, item: Answered) -> list[str]:
        """The answers in the order they are shown in: by chance, so that no place is better than another, and the same for the same seed."""
        answers = list(item.answers)
        random.Random(f"{self.seed}:{item.question.key}").shuffle(answers)
        return answers[:2] if self.pairs else answers

    def show(self, item: Answered, answers: list[str]) -> None:
        from rich.panel import Panel
        from rich.rule import Rule

        from ...data.questions import spoken

        self.console.print(Rule(f"{len(self.before) + self.alike + 1} of {self.total}"))
        for message in item.question.messages:
            self.console.print(on_screen(f"{message['role']}: {spoken(message)}"), style="bold" if message is item.question.messages[-1] else "dim")
        for i, answer in enumerate(answers):
            self.console.print(Panel(on_screen(answer), title="AB"[i] if self.pairs else str(i + 1), title_align="left"))

    def write(self, item: Answered, answers: list[str], typed: str) -> None:
        """Put what was typed into the file. Raises Unread for what is no judgement."""
        from ...data.collected import Unread, pair_line, ranking_line, typed_ranking

        source = self.source | {"time": datetime.now(UTC).isoformat(timespec="seconds")}
        if self.pairs:
            if typed not in ("a", "b", "="):
                raise Unread(f"{typed!r} is none of a, b and =" if typed else "nothing was typed")
            better, worse = reversed(answers) if typed == "b" else answers
            self.file.add(item.question, [pair_line(item.question, better, worse, source, tied=typed == "=")])
            self.say("as good as one another" if typed == "=" else f"{typed.upper()} is better")
            return
        places = typed_ranking(typed, len(answers))
        self.file.add(item.question, [ranking_line(item.question, [[answers[i] for i in place] for place in places], source)])
        self.say(", then ".join(" and ".join(str(i + 1) for i in place) for place in places))

    def undo(self) -> bool:
        """Back to what was shown before."""
        if not self.before:
            self.say("there is nothing to undo: this is the first prompt")
            return False
        item, was_written = self.before.pop()
        if was_written:
            self.file.undo()
        self.back.append(item)
        return True

    def result(self) -> str:
        from ...feedback.collecting import some

        written = sum(w for _, w in self.before)
        alike = f"; {some(self.alike, 'prompt')} had no two answers to compare, the last: {self.last_why}" if self.alike else ""
        return f"{some(written, 'judgement')} written to {self.file.path}, which now holds {some(len(self.file.keys), 'prompt')}{alike}"

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)
        sys.stdout.flush()


def on_screen(text: str) -> Text:
    """A text that can be shown: what is no character but an order to the terminal is made visible."""
    from rich.text import Text

    return Text("".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text))
