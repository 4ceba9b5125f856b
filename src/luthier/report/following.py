"""What to do with a run now: the commands, with its own path in them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .facts import Facts

LABELS = ("classify", "reward")  # objectives whose models give labels or scores, not text


def path_of(facts: Facts) -> str:
    """The run's path as a command takes it: relative where it is below the current folder."""
    folder = facts.folder.resolve()
    try:
        said = str(folder.relative_to(Path.cwd()))
    except ValueError:
        said = str(folder)
    return quoted(said)


def quoted(said: str) -> str:
    """A path or a text as one word of a command."""
    import shlex

    return shlex.quote(said)


def commands(facts: Facts) -> Iterator[tuple[str, str]]:
    """(what for, the command)."""
    run, objective = path_of(facts), facts.kind("objective")
    if not facts.finished:
        yield "go on where it stopped, bit for bit", f"luthier train --resume {run}"
        yield "write this report again", f"luthier runs report {run}"
        return
    data = facts.settings.get("data")
    held_out = data.get("validation") if isinstance(data, dict) else None
    file = quoted(str(held_out[0])) if isinstance(held_out, list) and held_out else "FILE"
    if objective in LABELS:
        yield "score it on other data, beside its base", f"luthier eval {run} --data {file}"
        yield "label texts", f"luthier predict {run} FILE"
    elif objective == "text":
        yield "score it on other text, beside its base", f"luthier eval {run} --data {file} --text"
        yield "let it go on from a beginning", f'luthier generate {run} --prompt "..."'
    elif objective in ("ppo", "grpo"):
        yield "score its answers to other prompts, beside its base", f"luthier eval {run} --data {file} --prompts --reward SOURCE"
        yield "ask it", f'luthier generate {run} --prompt "..."'
    elif objective != "masked_text":
        tasks = facts.settings.get("evaluate", {})
        names = tasks.get("tasks") if isinstance(tasks, dict) else None
        asked = "".join(f" --task {quoted(str(t))}" for t in names) if isinstance(names, list) else ""
        yield "score it on other data, beside its base", f"luthier eval {run} --data {file}{asked or ' --task bleu'}"
        yield "ask it", f'luthier generate {run} --prompt "..."'
        yield "talk to it", f"luthier chat {run}"
    if (facts.folder / "adapter").is_dir():
        yield "fold it into its base: one plain model folder", f"luthier merge {run} --output merged/"
    yield "train the same again with a setting changed", f"luthier train {run}/run.yaml name=NEW_NAME seed=1"
    yield "compare it with another run", f"luthier runs diff {run} OTHER"
    yield "write this report again", f"luthier runs report {run}"
