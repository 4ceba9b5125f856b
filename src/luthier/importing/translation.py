"""What all translations share: a configuration whose every key is accounted for, and the run that comes of it.

A key is put somewhere in the run, needless here (with the reason), or left (with the reason, or the setting that comes nearest). One that nobody asked for
is left too: none is dropped without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..settings.config import error_at, plain, run_of
from ..settings.names import foreign
from ..settings.run import Run
from ..settings.runfile import Key, Tree, write

LOGGERS = ("tensorboard", "wandb", "trackio")
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant", "cosine_with_min_lr": "cosine"}
EIGHT_BIT = {"adamw_8bit": "8bit", "adamw_bnb_8bit": "8bit", "paged_adamw_8bit": "paged-8bit"}
ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw", "adamw_apex_fused")
UNKNOWN = "not known to this translation"


@dataclass(frozen=True)
class Line:
    """What became of one key."""

    key: str
    line: int
    why: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.key}: {self.why}" if self.line else f"{self.key}: {self.why}"


@dataclass
class Translation:
    """A configuration on its way to a run."""

    tool: str
    tree: Tree  # theirs
    file: Path
    run: Tree = field(default_factory=lambda: Tree({}))
    comments: dict[Key, str] = field(default_factory=dict)  # of ours: what differs
    left: list[Line] = field(default_factory=list)
    needless: list[Line] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    placed: set[str] = field(default_factory=set)  # keys of theirs that a setting of ours comes from

    # --- theirs -------------------------------------------------------------------------------------------------------

    def has(self, key: str) -> bool:
        """Whether a key is there and says something."""
        return self.tree.values.get(key) is not None

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key, which is thereby accounted for."""
        self.seen.add(key)
        value = self.tree.values.get(key)
        return default if value is None else value

    @property
    def theirs(self) -> str:
        """The comment at what is their default."""
        return f"not in the file: {self.tool}'s default"

    def given(self, key: str) -> str:
        """The comment at a setting that is in the file, or is their default."""
        return "" if self.has(key) else self.theirs

    def truth(self, key: str, default: bool = False) -> bool:
        """A switch. Raises ConfigError for what is neither on nor off."""
        value = self.take(key, default)
        if isinstance(value, str) and value.lower() in ("true", "yes", "on", "false", "no", "off"):
            return value.lower() in ("true", "yes", "on")
        if not isinstance(value, bool):
            raise error_at(self.tree, (key,), f"found {value!r}, accepted is true or false")
        return value

    def number(self, key: str, default: Any = None) -> Any:
        """A number, also one that is written as a text. Raises ConfigError for anything else."""
        value = self.take(key, default)
        try:
            made = value if value is None or (isinstance(value, int | float) and not isinstance(value, bool)) else float(str(value))
        except ValueError:
            raise error_at(self.tree, (key,), f"found {value!r}, accepted is a number") from None
        return int(made) if isinstance(made, float) and made.is_integer() and abs(made) < 2**53 and not isinstance(value, float) else made

    def count(self, key: str, default: int) -> int:
        """A whole number from 1 up. Raises ConfigError for anything else."""
        value = self.number(key, default)
        if not float(value).is_integer() or value < 1:
            raise error_at(self.tree, (key,), f"found {value!r}, accepted is a whole number from 1 up")
        return int(value)

    def names(self, key: str) -> list[str]:
        """A list, or a text with commas."""
        value = self.take(key, [])
        return [str(v).strip() for v in (value if isinstance(value, list) else str(value).split(","))]

    def line(self, key: str) -> int:
        """The line of a key; 0 where it is not there."""
        mark = self.tree.marks.get(tuple(int(k) if k.isdigit() else k for k in key.split(".")))
        return int(mark.origin.rpartition(" ")[2]) if mark is not None else 0

    # --- ours ---------------------------------------------------------------------------------------------------------

    def put(self, path: str, value: Any, *of: str, comment: str = "") -> None:
        """Set a setting. ``of``: the keys of theirs that it comes from, the first for messages; ``comment``: what is to be known about it."""
        keys = tuple(path.split("."))
        node = self.run.values
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = value
        self.placed.update(of)
        if of and (mark := self.tree.marks.get((of[0],))) is not None:
            self.run.marks[keys] = mark
        if comment:
            self.comments[keys] = comment

    def move(self, key: str, path: str, comment: str = "") -> None:
        """A key that only has another name here."""
        if self.has(key):
            self.put(path, self.take(key), key, comment=comment)
        self.seen.add(key)

    def moves(self, table: Mapping[str, str]) -> None:
        """Keys that only have other names here."""
        for key, path in table.items():
            self.move(key, path)

    def leave(self, key: str, why: str) -> None:
        """A key that is not translated, and why, or what comes nearest."""
        self.seen.add(key.partition(".")[0])
        self.left.append(Line(key, self.line(key), why))

    def drop(self, key: str, why: str) -> None:
        """A key that says nothing here, and why."""
        self.seen.add(key)
        self.needless.append(Line(key, self.line(key), why))

    def leaves(self, table: Mapping[str, str]) -> None:
        """Keys that are not translated where they are there and on."""
        for key, why in table.items():
            if key in self.tree.values and key not in self.seen:
                if self.tree.values[key] in (None, False, [], {}, ""):
                    self.drop(key, "off")
                else:
                    self.leave(key, why)

    def drops(self, table: Mapping[str, str]) -> None:
        """Keys that say nothing here, where they are there."""
        for key, why in table.items():
            if key in self.tree.values and key not in self.seen:
                self.drop(key, why)

    def finish(self) -> Run:
        """Account for every other key, and read the run. Raises ConfigError, with their file and line, for a value that is not accepted."""
        for key, value in self.tree.values.items():
            said = self.placed | {x.key.partition(".")[0] for x in (*self.left, *self.needless)}
            if key in self.seen:
                if key not in said:
                    self.drop(key, "empty" if value is None else "nothing has to be set for it here")
                continue
            ours = foreign(key)
            if value is None:
                self.drop(key, "empty")
            else:
                self.leave(key, f"{UNKNOWN}; the setting that sounds like it is {ours}" if ours else UNKNOWN)
        self.left.sort(key=lambda x: x.line)
        self.needless.sort(key=lambda x: x.line)
        return run_of(Tree(self.run.values, {k: m for k, m in self.run.marks.items() if k}))


def model(t: Translation, key: str) -> None:
    """Which model."""
    if t.has(key):
        t.put("model.id", t.take(key), key)
    else:
        t.leave(key, "the file names no model: it is fiddle, the embedded base, until model.id is set")


# --- what the Trainer of transformers calls so, in all three ----------------------------------------------------------


def schedule(t: Translation, key: str, *, warmup: bool = True, default: str) -> None:
    """The shape of the learning rate, and its warm-up: a share of all steps here, steps or a share there."""
    name = str(t.take(key, default))
    said = t.given(key)
    if name in SCHEDULES:
        t.put("optim.schedule", SCHEDULES[name], key, comment=said)
    else:
        t.leave(key, f"there is no schedule {name!r}; optim.schedule is cosine, linear or constant, and cosine is taken")
        t.put("optim.schedule", "cosine", key)
    if not warmup:
        return
    steps, share, most = t.number("warmup_steps"), t.number("warmup_ratio"), t.number("max_steps")
    if name == "constant":
        t.put("optim.warmup", 0.0, comment=f"{t.tool}'s constant has none")
    elif steps and steps >= 1:
        if most and most > 0:
            t.put("optim.warmup", min(steps / most, 1.0), "warmup_steps", comment=f"{steps:g} of {most:g} steps")
        else:
            t.leave("warmup_steps", "steps there, a share of all steps here: optim.warmup (steps / all steps); 0.06 is taken")
    else:
        given = steps or share
        there = t.has("warmup_steps") or t.has("warmup_ratio")
        t.put("optim.warmup", float(given or 0.0), "warmup_steps" if steps else "warmup_ratio", comment="" if there else t.theirs)


def batch(t: Translation, size: str, accumulation: str, *, default: int, max_tokens: int) -> None:
    """Rows of a device times accumulation: examples of a step here."""
    rows, times = t.count(size, default), t.count(accumulation, 1)
    given = "" if t.has(size) else f" ({t.theirs})"
    t.put("optim.batch_examples", rows * times, size, accumulation, comment=f"{rows}{given} x {times} accumulated; there also times the number of GPUs")
    many = "1 row" if rows == 1 else f"{rows} rows"
    t.put("optim.micro_tokens", rows * max_tokens, size, comment=f"{many} of at most {max_tokens} tokens at a time; another number gives the same results")


def optimizer(t: Translation, key: str) -> None:
    """AdamW, and how it keeps its moments."""
    name = str(t.take(key, "adamw_torch"))
    if name in EIGHT_BIT:
        t.put("optim.state", EIGHT_BIT[name], key, comment="needs CUDA and bitsandbytes")
    elif name not in ADAMW:
        t.leave(key, f"there is no optimizer {name!r}: AdamW is used, its moments as optim.state says (float32, 8bit, paged-8bit)")
    elif t.has(key):
        t.drop(key, "AdamW is what there is here")


def floats(t: Translation) -> None:
    """bf16 and fp16."""
    half = t.take("bf16")
    if half in (True, "true", "auto", "full") or t.truth("fp16"):
        if t.has("fp16") and t.truth("fp16"):
            t.leave("fp16", "there is no float16 here: bfloat16 is taken, which needs no loss scaling")
        if not isinstance(t.run.values.get("precision"), dict) and half != "auto":
            t.put("precision", "bfloat16", "bf16")


def logging(t: Translation) -> None:
    """Where metrics go."""
    if not t.has("report_to"):
        t.seen.add("report_to")
        return
    names = t.names("report_to")
    if known := [n for n in names if n in LOGGERS]:
        t.put("log.to", known, "report_to")
    if other := [n for n in names if n not in (*LOGGERS, "none")]:
        t.leave("report_to", f"there is no logger {', '.join(other)}; log.to: {', '.join(LOGGERS)}; metrics.jsonl is written in any case")
    elif not known:
        t.drop("report_to", "nothing is reported to anyone unless log.to says so")


def validation(t: Translation, key: str) -> None:
    """How much is held out: a share, or from 1 up so many rows."""
    if not t.has(key):
        return
    size = t.number(key)
    if size < 1:
        t.put("data.validation_share", size, key)
    else:
        t.put("data.validation_rows", size, key, comment="rows there; here at most so many, of 5 % (data.validation_share)")


def every(t: Translation, strategy: str, steps: str, path: str) -> None:
    """Every so many steps; a share of all steps, or once an epoch, are not said so here."""
    how, number = str(t.take(strategy, "steps")), t.number(steps)
    if how == "no":
        t.drop(strategy, f"{path} is about ten times a run here where it is not given")
    elif how == "epoch":
        t.leave(strategy, f"once an epoch there; {path} counts steps, and is about ten times a run where it is not given")
    elif number is not None and number >= 1:
        t.put(path, number, steps, strategy)
    elif number:
        t.leave(steps, f"a share of all steps there; {path} counts steps")


def steps_and_epochs(t: Translation, epochs: str, default: float | None) -> None:
    """How long: steps count over epochs, here too."""
    most = t.number("max_steps")
    if most is not None and most > 0:
        t.put("optim.steps", most, "max_steps")
    if t.has(epochs) or (default is not None and not (most and most > 0)):
        t.put("optim.epochs", t.number(epochs, default), epochs, comment=t.given(epochs))


def modules(t: Translation, key: str, path: str = "method.targets", *, everything: Iterable[str] = ("all", "all-linear")) -> bool:
    """Which modules; their own names are read here too. False where the key is not there."""
    if not t.has(key):
        return False
    names = t.names(key)
    t.put(path, ["all"] if set(names) & set(everything) else names, key)
    return True


def default(t: Translation, key: str, path: str, value: Any, convert: Callable[[Any], Any] = lambda x: x) -> None:
    """A number that both have, with their default where the file has none and ours is another."""
    if t.has(key):
        t.put(path, convert(t.number(key)), key)
    else:
        t.put(path, value, comment=t.theirs)


# --- the run file -----------------------------------------------------------------------------------------------------


def text(t: Translation, run: Run) -> str:
    """The run file: what was put, in the order of a run, with comments; what was left at the top."""
    order = list(plain(run))
    values = {k: t.run.values[k] for k in order if k in t.run.values}
    head = [f"# {t.file.name} of {t.tool}, translated. Every setting that is not here has its default: luthier train prints and saves all of them."]
    head += ["# Not translated:", *(f"#   {line}" for line in t.left)] if t.left else ["# All of it was translated."]
    out = [*head, ""]
    for name, value in values.items():
        if not isinstance(value, dict):
            out.append(_commented(write({name: value}).rstrip("\n"), t.comments.get((name,), "")))
            continue
        out.append(f"{name}:")
        for key, inner in value.items():
            lines = write({key: inner}).rstrip("\n").split("\n")
            lines[0] = _commented(lines[0], t.comments.get((name, key), ""))
            out += ["  " + line for line in lines]
    return "\n".join(out) + "\n"


def _commented(line: str, comment: str) -> str:
    return f"{line}  # {comment}" if comment else line
