"""What a person sees of a run: facts before it, a bar with loss, tokens per second, memory and time left, and the table after it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .. import counts
from ..amounts import clock
from ..modelling.anatomy import numbers
from ..report.facts import SUITE
from ..settings.plugins import kind_of

if TYPE_CHECKING:
    from ..core import Base
    from ..crafting import Tried
    from ..data.mixing import Share
    from ..measuring.measure import Measures
    from ..train import Step
    from .result import Result
    from .session import Session

LINE_EVERY = 10.0  # seconds between lines where there is no terminal to draw a bar on


class Reporter:
    """Prints to a console; ``Reporter(quiet=True)`` prints nothing."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False):
        self.console = console or Console(stderr=False, quiet=quiet, highlight=False, soft_wrap=not sys.stdout.isatty())
        self.bar: Progress | None = None
        self._ticked = self._rolled = 0.0
        self._what, self._since = "", (0.0, 0)  # what is measured, and from when

    def note(self, text: str) -> None:
        """One fact."""
        self.console.print(Text("  " + text))

    def warn(self, text: str) -> None:
        """Something to look at."""
        self.console.print(Text("warning: " + text, style="yellow"))

    def head(self, text: str) -> None:
        """The start of a part."""
        self.console.print(Text(text, style="bold"))

    def base(self, base: Base) -> None:
        """The base model and what was probed on it."""
        dtype = str(next(base.model.parameters()).dtype).removeprefix("torch.")
        stored = f"{kind_of(base.precision)} and {dtype}" if base.storage and base.precision.packed else dtype
        self.head(f"base {base.source}: {base.anatomy.family}, {numbers(base.model):,} parameters in {stored}, {base.max_positions:,} positions, {base.hash}")
        if base.storage:
            self.note(f"stored: {base.storage}")
            for said in base.precision.notes(base.model.device) if hasattr(base.precision, "notes") else ():
                self.note(said)
        p = base.probes
        if p:
            alone = "one example a row" if base.anatomy.kind == "encoder_decoder" else "one example a row (packing would leak)"
            shared = "examples share rows without seeing one another (bitwise)" if p["packs"] else alone
            head = "no language-model head in its files" if p["head"] is None else f"head explains the logits (difference {p['head']:.1g})"
            self.note(f"probed: {head}; {shared}; attention: {p['implementation']}")

    def plan(self, session: Session) -> None:
        """What will be trained, and how."""
        run, trained_whole = session.run, counts.total(session.policy)
        trained, whole = trained_whole
        self.head(f"method {kind_of(run.method)}: {trained:,} trained parameters, {trained / whole:.3%} of {whole:,}")
        for c in counts.table(session.policy)[:12]:
            shape = f" {c.shape[0]} x {c.shape[1]}" if c.shape else ""
            self.note(f"{c.modules} x {c.module}{shape}: {counts.sentence(c)}")
        if not session.steps:
            self.head(f"choosing among prompts on {len(session.prepared.validation):,} held-out rows; nothing is trained; folder {session.folder}")
            return
        o, own = run.optim, run.objective
        if own.renders == "prompts":
            self.head(
                f"training: {session.steps} steps, {own.epochs * own.minibatches} to a rollout of {min(own.prompts, len(session.prepared.train)):,} prompts "
                f"with {own.samples} answer{'s' if own.samples > 1 else ''} each of at most {own.max_new} tokens; seed {run.seed}, on {run.place.device}"
            )
            self._rates(session)
            return
        per = f"{o.batch_examples} examples" if o.batch_examples else f"{o.batch_tokens:,} tokens"
        self.head(f"training: {session.steps} steps of {per}, {'packed' if session.packed else 'padded'}, seed {run.seed}, on {run.place.device}")
        self._rates(session)
        if session.mixture is not None:
            self.mixture(session.mixture.rule(), session.mixture.planned())

    def _rates(self, session: Session) -> None:
        run, o = session.run, session.run.optim
        self.note(
            f"learning rate {session.why_lr}; {o.schedule} after {session.warmup} steps of warm-up; weight decay {o.weight_decay:g}, clipping at {o.clip:g}"
        )
        self.note(f"validation every {run.evaluate.every_steps} steps on {len(session.prepared.validation):,} rows; folder {session.folder}")

    def measured(self, when: str, m: Measures) -> None:
        """One visit to the held-out data."""
        self.note(f"{when}: {_sentence(m)}")

    @contextmanager
    def training(self, steps: int, done: int) -> Iterator[Callable[[Step, float], None]]:
        """A bar (or, without a terminal, a line now and then) fed with each step and its seconds."""
        if not self.console.is_terminal or self.console.quiet:
            yield self._lines(steps)
            return
        columns = (
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as self.bar:
            task = self.bar.add_task("train", total=steps, completed=done, facts="")

            def update(step: Step, took: float) -> None:
                assert self.bar is not None
                self.bar.update(task, completed=step.step, facts=_facts(step, took))

            yield update
        self.bar = None

    def _lines(self, steps: int) -> Callable[[Step, float], None]:
        began, first, last = time.perf_counter(), None, 0.0

        def line(step: Step, took: float) -> None:
            nonlocal first, last
            first = step.step - 1 if first is None else first
            now = time.perf_counter()
            if now - last >= LINE_EVERY or step.step == steps:
                left = (now - began) / (step.step - first) * (steps - step.step)
                self.console.print(Text(f"step {step.step}/{steps}  {_facts(step, took)}  left {clock(left)}"))
                last = now

        return line

    def tick(self, label: str, done: int, total: int) -> None:
        """Progress of a long measurement."""
        now = time.perf_counter()
        if label != self._what:
            self._what, self._since = label, (now, done)
        began, first = self._since
        if done < total and now - self._ticked < LINE_EVERY:
            return
        if now - self._ticked >= LINE_EVERY or self._ticked == 0.0:
            left = f", left {clock((now - began) / (done - first) * (total - done))}" if first < done < total else ""
            self.note(f"{label}: {done} of {total} done{left}")
            self._ticked = now

    def rollout(self, facts: dict[str, Any]) -> None:
        """What the answers of one rollout were like; not of every one where they come fast."""
        now = time.perf_counter()
        if facts["rollout"] > 1 and now - self._rolled < LINE_EVERY:
            return
        self._rolled = now
        kl = (
            f", KL {facts['kl']:.2f} (coefficient {facts['kl_coefficient']:.3g})"
            if "kl_coefficient" in facts
            else f", KL {facts['kl']:.2f}"
            if "kl" in facts
            else ""
        )
        watched = "".join(f", {n.removeprefix('watch_')} {v:.3f} (watched)" for n, v in facts.items() if n.startswith("watch_"))
        self.note(
            f"rollout {facts['rollout']}: reward {facts['reward']:.3f}{watched}{kl}, entropy {facts['entropy']:.2f}, {facts['answer_tokens']:.1f} tokens, "
            f"{facts['stopped']:.0%} stopped by themselves"
        )

    def mixture(self, when: str, shares: dict[str, Share]) -> None:
        """How much of the mixture each source is, or has been."""
        table = Table(title=None, show_edge=False, pad_edge=False, box=None, padding=(0, 2, 0, 0))
        for name in ("  source", "rows", "drawn", "share", "of tokens", "epochs"):
            table.add_column(name, justify="left" if "source" in name else "right", no_wrap=True)
        for name, s in shares.items():
            rows = "a stream" if s.rows is None else f"{s.rows:,}"
            table.add_row(f"  {name}", rows, f"{s.drawn:,}", f"{s.rate:.2%}", f"{s.tokens:.2%}", f"{s.epochs:.2f}")
        self.note(when)
        self.console.print(table)

    def crafted(self, tried: list[Tried], tokenizer: Any) -> None:
        """The candidate prompts, and the one that was chosen."""
        best, base = tried[0], next((t for t in tried if not t.method.ids), None)
        against = "" if base is None else f"; without any prompt {base.loss:.4f}"
        self.note(f"{len(tried)} candidate prompts tried; the best has {len(best.method.ids)} tokens: held-out loss {best.loss:.4f}{against}")
        self.note("it was chosen on these held-out rows, which flatters it: score it on others with luthier eval")
        if best.method.ids:
            self.note("it begins: " + repr(tokenizer.decode(best.method.ids[:60])))

    def evaluated(self, step: Step, m: Measures, *, best: bool) -> None:
        """An evaluation during training."""
        gap = f", gap to training {m.loss.value - step.loss:+.3f}" if m.loss is not None else ""
        self.note(f"step {step.step}: {_sentence(m)}{gap}{' (best so far)' if best else ''}")

    def samples(self, rows: Sequence[dict[str, Any]]) -> None:
        """Sample answers go to samples.jsonl; the last of them is shown at the end."""
        self.last_samples = rows

    def result(self, r: Result) -> None:
        """The table at the end."""
        table = Table(title=None, show_edge=False, pad_edge=False)
        for name in ("measure", "before", "after"):
            table.add_column(name, justify="left" if name == "measure" else "right", no_wrap=True)
        for name, (a, b) in rows_of(r.before, r.after).items():
            table.add_row(name, a, b)
        self.console.print()
        self.console.print(table)
        if r.stopped:
            self.note(f"stopped early: {r.stopped}")
        for alarm in r.alarms:
            self.note(
                f"alarm: {alarm.kind} at step {alarm.step}, see above" + ("" if r.best_step >= alarm.step else f"; kept are the weights of step {r.best_step}")
            )
        speed = f", {r.tokens / r.seconds:,.0f} tokens/s" if r.seconds else ""
        self.note(
            f"{r.trained:,} of {r.total:,} parameters trained ({r.trained / r.total:.3%}); {r.steps} steps, {r.tokens:,} tokens, {clock(r.seconds)}{speed}"
        )
        if r.replayed:
            self.note(
                f"replayed {r.replayed['tokens']:,} tokens, {r.replayed['share']:.1%} of all tokens learned, {r.replayed['passes']:.2f} passes over that text"
            )
        self.note(f"peak memory {r.peak_bytes / 1e9:.2f} GB; weights of step {r.best_step}")
        self.head(f"saved, read back and compared: {r.artefact}")
        if (page := r.folder / "report.html").is_file():
            self.note(f"report:      {page}")


def rows_of(before: Measures, after: Measures) -> dict[str, tuple[str, str]]:
    """Rows of the before/after table: name -> two texts."""
    out: dict[str, tuple[str, str]] = {}
    for name, a, b in (
        ("held-out loss", before.loss, after.loss),
        ("loss on general text", before.general, after.general),
        ("loss on replayed text", before.replayed, after.replayed),
    ):
        if a is not None and b is not None:
            out[name] = (f"{a.value:.4f}", f"{b.value:.4f}  n={b.n:,} {b.unit}")
        if name == "held-out loss" and before.average is not None and after.average is not None:
            out["  average of them"] = (f"{before.average:.4f}", f"{after.average:.4f}")
            for source, m in after.sources.items():
                out[f"  {source}"] = (f"{before.sources[source].value:.4f}", f"{m.value:.4f}  n={m.n:,} {m.unit}")
    for key, name in SUITE.items():
        if key in before.suite and key in after.suite:
            a, b = before.suite[key], after.suite[key]
            out[name] = (f"{a.value:.1%}", f"{b.value:.1%}  n={b.n}") if key == "facts" else (f"{a.value:.4f}", f"{b.value:.4f}  n={b.n:,} {b.unit}")
    for had, has, kind in ((before.scores, after.scores, ""), (before.retained, after.retained, "retained ")):
        for name, s in has.items():
            out[f"{kind}{name}"] = (str(had[name]) if name in had else "", str(s))
    return out


def _facts(step: Step, took: float) -> str:
    import psutil

    memory = psutil.Process().memory_info().rss / 1e9
    return f"loss {step.loss:.4f}  {step.tokens / max(took, 1e-9):,.0f} tokens/s  {memory:.2f} GB"


def _sentence(m: Measures) -> str:
    parts = []
    if m.loss is not None:
        parts.append(f"held-out loss {m.loss.value:.4f}")
    if m.general is not None:
        parts.append(f"general text {m.general.value:.4f}")
    if m.sources:
        parts.append("by source: " + " ".join(f"{name} {one.value:.3f}" for name, one in m.sources.items()))
    if m.replayed is not None:
        parts.append(f"replayed text {m.replayed.value:.4f}")
    parts += [f"{name} {s}" for name, s in (m.scores | m.retained).items()]
    short = (("instructions", "instructions {:.4f}"), ("sampled", "text by fiddle {:.4f}"), ("moved", "KL from before {:.4f}"), ("facts", "known facts {:.0%}"))
    parts += [form.format(m.suite[key].value) for key, form in short if key in m.suite]
    return ", ".join(parts) or "nothing to measure"
