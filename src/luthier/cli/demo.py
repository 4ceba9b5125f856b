"""luthier demo: the main job in three minutes, with what ships in the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import heavy

if TYPE_CHECKING:
    from rich.console import Console

    from ..running.result import Result

SHOWN = 3


def command(
    out: Annotated[Path, typer.Option(help="The folder that holds runs.")] = Path("runs"),
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same run.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 200,
    rows: Annotated[int, typer.Option(min=1, help="Held-out rows answered before and after.")] = 100,
) -> None:
    """Demo: teach fiddle, the embedded base, to write up a workshop's notes as sentences, with LoRA, and say what was gained and what was forgotten."""
    heavy("running.starting")
    from ..running.progress import Reporter
    from ..running.starting import execute
    from ..settings.config import load_run
    from ..tasks.instruments import write

    reporter = Reporter()
    name = _free(out, "demo")
    data = out / "demo-data"
    write(data)
    reporter.head(f"data: notes about instruments and the sentence each stands for, written to {data}")
    settings = [
        "model=fiddle",
        f"data.train=[{data / 'train.jsonl'}]",
        f"data.validation=[{data / 'validation.jsonl'}]",
        "data.validation_rows=200",
        "method=lora",
        "method.rank=16",
        "method.targets=[all]",
        "optim.batch_tokens=4096",
        f"optim.steps={steps}",
        f"evaluate.every_steps={max(1, steps // 4)}",
        "evaluate.tasks=[instruments, bleu]",
        f"evaluate.task_rows={rows}",
        "checkpoint.keep=1",
        f"seed={seed}",
        f"name={name}",
        f"out={out}",
    ]
    result = execute(load_run(None, settings), reporter=reporter)
    reporter.result(result)
    _side_by_side(reporter.console, result, data)
    adapter = result.artefact
    reporter.head("three things to try next")
    reporter.note(f"luthier chat {adapter}")
    reporter.note(f"luthier merge {adapter} --output {out / 'demo-merged'}")
    reporter.note(f"luthier train {data / 'train.jsonl'} method=full")


def _free(out: Path, name: str) -> str:
    """A run name that is not taken."""
    number = 1
    while (out / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return name if number == 1 else f"{name}-{number}"


def _side_by_side(console: Console, result: Result, data: Path) -> None:
    """Unseen prompts, answered by the base and by the tuned model."""
    import json

    from rich.text import Text

    from ..measuring.measure import answer
    from ..opening import load

    policy = load(result.artefact)
    rows: list[dict[str, Any]] = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()[:SHOWN]]
    prompts = [r["prompt"] for r in rows]
    tuned = answer(policy, prompts, max_new=80)
    policy.use(None)
    base = answer(policy, prompts, max_new=80)
    console.print(Text(f"{SHOWN} prompts that neither has seen", style="bold"))
    for row, b, t in zip(rows, base, tuned, strict=True):
        for label, text, style in (
            ("prompt", row["prompt"], ""),
            ("base", b["answer"], "dim"),
            ("tuned", t["answer"], "green"),
            ("written", row["completion"], "dim"),
        ):
            console.print(Text(f"  {label:8}", style="bold") + Text(" ".join(text.split()), style=style))
        console.print()
