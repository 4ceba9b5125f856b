"""A run that is under way: explicit calls around the loop - measure, train, evaluate, keep, stop, measure again, save, verify.

train.py says what a step is; this file reads the steps and decides what follows from them. No callbacks, no events.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__, atomic, build, counts, heap, references, remembered
from ..amounts import size
from ..core import LuthierError, Row
from ..crafting import choose
from ..data.feed import Batches
from ..data.mixing import Mixture
from ..data.order import Epochs
from ..data.prepare import Prepared
from ..data.replay import Beside
from ..data.rollout import Rollouts
from ..data.rows import sides
from ..devices.device import ran_out
from ..errors import Interrupted
from ..feedback import rollouts
from ..feedback.rewards import Judge
from ..feedback.rollouts import Watch
from ..forgetting import against, difficulty
from ..forgetting.alarms import Alarm, Alarms
from ..forgetting.familiarity import Familiarity
from ..forgetting.retention import Suite
from ..log import Log, Nowhere
from ..measuring.by_source import Told
from ..measuring.evaluate import Score
from ..measuring.measure import Measures, Scorer
from ..modelling import sharing, trunkcache
from ..modelling.anatomy import modules
from ..nn.schedule import factor
from ..optim import Optimizer, default_lr, state_for
from ..planning import headroom
from ..planning.foresight import Foresight, foresee, is_long
from ..reading import batches_of, sections, together
from ..report import card, page, recording
from ..saving import adapter, checkpoint
from ..settings import config
from ..settings.run import Run
from ..train import Step, train
from .progress import Reporter
from .result import Progress, Result, line, peak_bytes
from .safeguards import Moving, interrupts

SOME = 64  # rows by which it is said what they share


class Session:
    """One run that is under way."""

    def __init__(self, run: Run, folder: Path, base: Any, prepared: Prepared, say: Reporter, asked: Run, program: int):
        self.folder, self.base, self.prepared, self.say, self.asked, self.program = folder, base, prepared, say, asked, program
        self.place, self.leads, self.sent = (
            run.place,
            run.place.leads,
            Counter(run.place.traffic),
        )  # the first rank writes and speaks; all others do the same and keep silent
        self.policy, self.objective = build.assemble(run, base)
        lr, why = (run.optim.lr, "as asked") if run.optim.lr is not None else default_lr(run.method, base.width)
        self.packed = base.packs and run.data.pack != "no"
        if run.data.pack == "yes" and not base.packs:
            raise LuthierError(f"data.pack: this model ({base.anatomy.family}) was found to leak between examples that share a row; use data.pack=auto")
        for _, objective, rows in sections(run, prepared):
            brought = references.bring(
                self.policy,
                objective,
                rows,
                folder=Path(run.out) / ".references",
                tokens=run.optim.micro_tokens,
                packed=self.packed,
                started=getattr(run.method, "from_", None) is not None,
                tick=lambda done, of: say.tick("reference log-probabilities", done, of),
            )
            if brought:
                say.note(brought)
        if prepared.sources:
            together(prepared)  # the rows that have them now
        self.judge: Judge | None = None
        self.watch = Watch()
        tick = lambda done, of: self.say.tick("difficulty of rows", done, of)  # noqa: E731
        self.drawn = difficulty.drawn(run, self.policy, prepared, packed=self.packed, say=say.note, tick=tick)
        self.against = against.Against.of(run, self.policy, self.objective, prepared.train, packed=self.packed, say=say.note, tick=say.tick)
        self.feed = self._feed(run)
        if self.packed and base.shares and self.judge is None and prepared.train:
            some = self.objective.collate(prepared.train[:SOME], pad=base.tokenizer.pad_token_id or 0, packed=True)
            if told := sharing.said(some, self.policy.share_prompts):
                say.note(told)
        own = self.feed.main if isinstance(self.feed, Beside) else self.feed
        self.mixture = Told(run, order, own) if isinstance(own, Batches) and isinstance(order := own.order, Mixture) else None
        self.chooses = hasattr(run.method, "candidates")  # nothing is trained: a prompt is chosen
        self.steps = 0 if self.chooses else self.feed.steps
        if self.steps and self.judge is None and isinstance(own, Batches):
            text = [*prepared.train, *prepared.validation]
            passes = self.steps * own.rows_per_step / max(1, len(prepared.train))
            self.policy.trunk_cache = trunkcache.of(
                self.policy,
                self.objective,
                text,
                how=run.speed.trunk_cache,
                ceiling=run.speed.trunk_cache_gb * 1e9,
                passes=passes,
                folder=folder,
                say=say.note,
            )
        every = run.evaluate.every_steps or max(1, round(self.steps / 10))
        self.run = replace(
            run,
            optim=replace(run.optim, lr=lr),
            evaluate=replace(run.evaluate, every_steps=every),
            checkpoint=replace(run.checkpoint, every_steps=run.checkpoint.every_steps or every),
        )
        self.warmup = round(run.optim.warmup * self.steps)
        o = self.run.optim
        assert self.policy.delta is not None
        if self.steps:
            kept, note = state_for(o.state, run.place.device)
            if note:
                say.note(note)
            self.optimizer = Optimizer(
                self.policy.trained(),
                lr=lr,
                betas=(o.beta1, o.beta2),
                eps=o.eps,
                weight_decay=o.weight_decay,
                patterns=self.policy.delta.optim,
                state=kept,
                precise={f"{p}:weight" for p, m in modules(self.policy.lm) if isinstance(m, torch.nn.Embedding)},
            )
        self.scorer = Scorer(self.policy, self.objective, prepared, self.run, packed=self.packed, rewarded=self._rewarded if self.judge else None)
        self.familiarity = Familiarity.of(self.policy, self.objective, prepared, self.run, packed=self.packed)
        self.scorer.replayed = self.against.held_out
        self.suite = Suite.of(self.scorer, say.note)
        self.alarms = Alarms(self.run, Measures())
        self.progress = Progress()
        self.why_lr = why
        self.stopped = ""
        self.warned = self.halved = False

    def _feed(self, run: Run) -> Batches | Beside | Rollouts:
        """The micro-batches: of the data, or of the model's own answers."""
        if "rollouts" in self.objective.needs:
            feed = rollouts.feed_of(run, self.policy, self.prepared, packed=self.packed, say=self.say.note, tick=self.say.tick)
            self.judge = feed.judge  # type: ignore[assignment]
            return feed
        order = None if self.drawn is None else Epochs(self.prepared.train, run.seed, self.drawn.order)
        pad = self.base.tokenizer.pad_token_id or 0
        return self.against.feed(batches_of(run, self.prepared, self.objective, pad=pad, packed=self.packed, order=order))

    # --- the run, top to bottom ---------------------------------------------------------------------------------------

    def go(self, state: checkpoint.State | None) -> Result:
        """Measure, train, measure, save."""
        self.say.plan(self)
        if self.steps:
            self._check_disk()
        self._write_settings()
        told = {"steps": self.steps, "packed": self.packed, "learning_rate": self.why_lr}
        foresight = self._foresee() if self.leads else None
        told |= foresight.facts() if foresight is not None else {}
        if self.leads:
            recording.begin(self.folder, self.asked, self.run, self.policy, self.prepared.train, self.prepared.facts, **told)
        if state is not None:
            checkpoint.restore(state, self.policy, self.optimizer, self.feed)
            self.progress = Progress(**state.facts["progress"])
            self.say.note(f"resuming after step {self.progress.step} of {self.steps}")
        log = self._log(None if state is None else self.progress.step)
        if state is not None:
            self.place.wait("the log of earlier steps")
            self.watch = Watch.before(log.path, self.progress.step)
            if self.familiarity is not None:
                self.familiarity.recall(log.path, self.progress.step)
            self.place.wait("the log of earlier steps")
        try:
            if state is None:
                before = self._measure(tasks=True)
                self.progress.before = asdict(before)
                log.write("before", 0, before.numbers())
                self._samples(0)
                self.say.measured("before training", before)
                self._familiar(0, log)
            self.alarms = Alarms(self.run, Measures.from_dict(self.progress.before))
            self.alarms.recall(self.progress.alarms)
            heap.give_back()  # what predicting and measuring left; not after every evaluation, as steps would take all their pages anew
            if self.chooses:
                self._choose(log)
            else:
                self._train(log)
            after = self._finish(log)
        finally:
            log.close()
        result = self._result(after, self.folder / adapter.writes(self.policy.method))
        if foresight is not None and (said := foresight.against(peak=result.peak_bytes, training=result.seconds, steps=result.steps)):
            self.say.note(said)
        if self.leads:
            report(self.folder, self.say)
        return result

    def _log(self, after: int | None) -> Log:
        """Where numbers go: of the first rank."""
        if not self.leads:
            return Nowhere(self.folder)
        return Log(self.folder, self.run.log.to, name=self.folder.name, config=config.plain(self.run), after=after)

    def _foresee(self) -> Foresight | None:
        """What the run will take, where it is long enough for that to be worth a moment."""
        rows = [sum(sides(r)) for r in self.prepared.train[:1000]]
        tokens = self.run.optim.batch_tokens if self.run.optim.batch_examples is None else self.run.optim.batch_examples * sum(rows) / max(1, len(rows))
        if not is_long(self.run, counts.total(self.policy)[1], tokens, self.steps):
            return None
        found = foresee(self.run, self.prepared, self.feed, program=self.program)
        self.say.note(found.said())
        return found

    def _train(self, log: Log) -> None:
        p, o = self.progress, self.run.optim
        rate = lambda step: (o.lr or 0.0) * factor(step, self.steps, kind=o.schedule, warmup=self.warmup, floor=o.min_lr)  # noqa: E731
        watch = Moving(self.optimizer, self._resting)
        unseen = set(self.objective.terms) if self.objective.renders == "mixed" else set()  # a task's head gets no gradient before its first row
        bad_in_a_row = 0
        ours, how = (self.policy, self.against.objective, self.feed, self.optimizer), {"lr": rate, "steps": self.steps, "clip": o.clip, "place": self.run.place}
        self._try_longest()
        with interrupts(self.leads) as asked, self.say.training(self.steps, p.step) as bar:
            how["signals"] = lambda: {"asked": float(asked()), "over": float(self._over())}
            loop = train(*ours, start=p.step, **how)
            while True:
                before = {} if self.halved else self.feed.state_dict()
                began = time.perf_counter()
                self._draw_apart(p.step)
                try:
                    step = next(loop, None)
                except (RuntimeError, MemoryError) as e:
                    self._halve(e)
                    self.optimizer.zero_grad()
                    self.feed.load_state_dict(before)
                    loop = train(*ours, start=p.step, **how)
                    continue
                if step is None:
                    break
                took = time.perf_counter() - began
                step = replace(step, loss=self.against.own_loss(step.terms, step.loss))
                p.step, p.seconds, p.tokens = step.step, p.seconds + took, p.tokens + step.tokens
                self.alarms.trained(step.loss)
                if step.step % self.run.log.every_steps == 0 or step.step == self.steps or not step.finite:
                    log.write("train", step.step, line(step, took))
                self._rollouts(step.step, log)
                bar(step, took)
                bad_in_a_row = self._non_finite(step, bad_in_a_row)
                unseen -= {k for k, n in step.units.items() if n}
                if not unseen:
                    watch.check(step.step, last=step.step == self.steps)
                last = step.step == self.steps
                if not (last or self.halved) and step.signals["over"]:
                    self._halve(None, f"{size(peak_bytes(self.place.device))} were taken where place.memory is {size(self.place.ceiling or 0)}")
                if step.step % (self.run.evaluate.every_steps or 1) == 0 or last:
                    self._evaluate(step, log)
                if step.step % (self.run.checkpoint.every_steps or 1) == 0 or last or step.signals["asked"] or self.stopped:
                    self._save()
                if step.signals["asked"]:
                    checkpoint.settle()
                    raise Interrupted(f"stopped after step {p.step} of {self.steps}, everything is saved; go on with: luthier train --resume {self.folder}")
                if self.stopped:
                    break

    def _try_longest(self) -> None:
        """On a GPU, and under a ceiling, memory runs out now rather than in the third hour."""
        if self.progress.step or (self.run.place.device.type != "cuda" and self.run.place.ceiling is None):
            return
        longest, failed = self.prepared.facts.get("longest"), None
        try:
            headroom.try_longest(self.run, self.policy, self.objective, self.optimizer, longest, self.steps)
        except (RuntimeError, MemoryError) as e:
            failed = e
        if self.place.mean(float(failed is not None)):
            self._halve(failed or MemoryError("memory ran out on another rank"))

    def _over(self) -> bool:
        """Whether this rank has taken more memory than it may."""
        return (ceiling := self.place.ceiling) is not None and peak_bytes(self.place.device) > ceiling

    def _draw_apart(self, step: int) -> None:
        """Chance inside the model (dropout) is another on every rank, and depends on nothing but seed, step and rank, so that a run goes on the same."""
        if self.place.size > 1:
            torch.manual_seed(int(np.random.SeedSequence([self.run.seed, step, self.place.rank]).generate_state(1, np.uint64)[0] >> 1))

    def _halve(self, e: BaseException | None, why: str = "memory ran out") -> None:
        """Smaller micro-batches, once; raises what is no want of memory, and the second time."""
        if e is not None and (self.halved or not ran_out(e)):
            raise e
        self.say.warn(f"{why}: {headroom.halve(self.feed, e)}")
        self.halved = True

    def _rollouts(self, step: int, log: Log) -> None:
        """Log what new rollouts were like, warn where the reward is gamed, and stop where the policy collapsed."""
        if not isinstance(self.feed, Rollouts):
            return
        for facts in self.feed.take_events():
            log.write("rollout", step, facts)
            self.say.rollout(facts)
            for warning in self.watch.see(facts):
                self.say.warn(warning)
        if self.feed.stopped and not self.stopped:
            self.stopped = self.feed.stopped
            self.say.warn(f"stopping: {self.stopped}")

    def _resting(self) -> frozenset[str]:
        """Trained tensors that do not learn at this step: the delta's own choice, and the policy's while its value warms up."""
        if isinstance(self.feed, Rollouts) and not self.feed.taught:  # no answer was better or worse than expected yet: there is nothing to learn
            return frozenset(self.policy.trained())
        delta = self.policy.delta
        out = delta.resting() if delta is not None and delta.resting is not None else frozenset()
        warming = isinstance(self.feed, Rollouts) and self.feed.rollout <= getattr(self.objective, "value_warmup", 0)
        return out | frozenset(delta.params if warming and delta is not None else ())

    def _rewarded(self, prompts: Sequence[Row]) -> dict[str, Score]:
        """Scores of the policy's answers to held-out prompts."""
        assert self.judge is not None
        return rollouts.held_out(self.run, self.policy, self.judge, prompts, packed=self.packed)[0]

    def _choose(self, log: Log) -> None:
        """Try candidate prompts on the held-out rows and keep the best."""
        method: Any = self.run.method
        if method.ids:  # given by the user, or chosen by an earlier run
            return
        positions = self.base.max_positions - max(len(r) for r in [*self.prepared.train, *self.prepared.validation]) - 1
        candidates = method.candidates(self.prepared.train, self.base.tokenizer, limit=positions, seed=self.run.seed)
        task = None if method.choose_by == "loss" else next(iter(self.run.evaluate.tasks), None)
        if method.choose_by == "task" and task is None:
            raise LuthierError("method.choose_by=task: the run has no task to choose by; name one, for example evaluate.tasks=[bleu]")
        tried = choose(self.policy, self.scorer, candidates, task=task, tick=lambda done, of: self.say.tick("candidate prompts", done, of))
        for i, t in enumerate(tried):
            log.write("candidate", 0, {"place": i + 1, "loss": t.loss, "tokens": len(t.method.ids)} | ({} if t.score is None else {task or "score": t.score}))
        self.run = replace(self.run, method=tried[0].method)
        self._write_settings()
        self.say.crafted(tried, self.base.tokenizer)

    def _evaluate(self, step: Step, log: Log) -> None:
        p = self.progress
        now = self._measure(tasks=False)
        log.write("evaluation", step.step, now.numbers() | (self.mixture.epochs() if self.mixture is not None else {}))
        p.history.append({"step": step.step, "train": step.loss, **now.numbers()})
        pending = self.policy.delta is not None and self.policy.delta.pending is not None and self.policy.delta.pending()
        worth = _worth(now)
        raised = self.alarms.see(step.step, now, self.scorer.held_out, last=step.step == self.steps)
        beyond = self.run.evaluate.alarm == "stop" and self.alarms.forgets and p.best_step > 0  # better at the task, and not what is wanted
        if pending or worth is None:  # of another form than what will be saved, or without a measure: neither the best nor a sign to stop
            pass
        elif worth < p.best_loss and not beyond:
            p.best_loss, p.best_step, p.stale = worth, step.step, 0
            self._keep_best()
        else:
            p.stale += 1
        self.say.evaluated(step, now, best=p.best_step == step.step)
        self._alarm(raised, log)
        self._familiar(step.step, log)
        if self._samples(step.step) == 0 and 2 * step.step >= self.steps and not self.warned:
            self.warned = True  # early in a run it is usual, and once is enough
            self.say.warn(
                "none of the sample answers stops by itself: the end-of-turn token is not learned yet; if this stays so, train longer or look at the template"
            )
        if self.run.evaluate.patience is not None and p.stale >= self.run.evaluate.patience:
            self.stopped = f"no better {'held-out reward' if self.judge else 'validation loss'} in {p.stale} evaluations"

    def _measure(self, *, tasks: bool) -> Measures:
        """A visit to the held-out data and to what is to be retained."""
        out = self.scorer.measure(tasks=tasks, say=self.say)
        if self.suite is not None:
            self.suite.measure(out, say=self.say)
        return out

    def _alarm(self, raised: list[Alarm], log: Log) -> None:
        """Say and log alarms, and stop by them where that is asked."""
        for alarm in raised:
            log.write("alarm", alarm.step, {"alarm": alarm.kind, "said": alarm.said, "advice": alarm.advice})
            self.say.warn(f"{alarm.kind} at step {alarm.step}: {alarm.said}. What to do: {alarm.advice}.")
            if self.run.evaluate.alarm == "stop" and alarm.step < self.steps:
                self.stopped = self.stopped or f"{alarm.kind}: {alarm.said}"

    def _familiar(self, step: int, log: Log) -> None:
        """How well what the model knew and did not know is answered by now, and whether to stop by it."""
        if self.familiarity is not None and (why := self.familiarity.follow(step, log.write, self.say)):
            self.stopped = self.stopped or why

    def _finish(self, log: Log) -> Measures:
        p = self.progress
        if self.run.evaluate.best and p.best_step and p.best_step != p.step:
            self.place.wait("the best weights")
            checkpoint.take_best(self.folder, self.policy, self.optimizer)
            self.say.note(f"kept the weights of step {p.best_step}, the best on validation")
        after = self._measure(tasks=True)
        log.write("after", p.step, after.numbers())
        if self.leads and self.watch.rollouts and not rollouts.draw(self.watch.rollouts, self.folder / "rollouts.png"):
            self.say.note("matplotlib is not installed (pip install 'luthier[plots]'), so rollouts.png was not drawn; its numbers are in metrics.jsonl")
        facts = {"run": config.plain(self.run), "steps": p.step, "tokens": p.tokens, "seconds": round(p.seconds, 1), "before": p.before, "after": asdict(after)}
        if self.mixture is not None:
            facts["mixture"] = {name: asdict(s) for name, s in self.mixture.so_far().items()}
            self.say.mixture(f"the mixture after {p.step} steps:", self.mixture.so_far())
        if replayed := against.replayed(self.feed):
            facts["replayed"] = replayed
        facts["alarms"] = [asdict(a) for a in self.alarms.raised]
        if self.place.size > 1:
            peaks = self.place.gather(peak_bytes(self.place.device), "peaks of memory")
            facts["ranks"] = {"size": self.place.size, "peak_bytes": peaks, "traffic_bytes": dict(Counter(self.place.traffic) - self.sent)}
        extra = {"training": facts, remembered.KEY: remembered.told(self.policy, self.run.model.template)}
        if self.steps:
            checkpoint.settle()
        if not (self.leads or adapter.by_all(self.policy)):
            return after
        adapter.save(self.policy, self.folder / adapter.writes(self.policy.method), objective=self.objective, extra=extra)
        if not self.leads:
            return after
        trained, whole = counts.total(self.policy)
        best = {"trained": trained, "total": whole, "peak_bytes": peak_bytes(self.run.place.device), "best_step": self._best(), "stopped": self.stopped}
        atomic.as_json(self.folder / "result.json", facts | best)
        return after

    # --- pieces -------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if not (self.leads or self.optimizer.cut):
            return
        self.progress.alarms = self.alarms.kept()
        facts = {"progress": asdict(self.progress), "run": config.plain(self.run), "digest": config.digest(self.run), "luthier": __version__}
        checkpoint.save(self.folder, self.progress.step, self.policy, self.optimizer, self.feed, keep=self.run.checkpoint.keep, facts=facts)

    def _keep_best(self) -> None:
        if self.run.evaluate.best and (self.leads or self.optimizer.cut):
            checkpoint.keep_best(self.folder, self.policy, self.optimizer)

    def _samples(self, step: int) -> int | None:
        """Answer the fixed prompts and append them to samples.jsonl; how many stopped by themselves, None where there are none."""
        rows = self.scorer.samples()
        if self.leads:
            with (self.folder / "samples.jsonl").open("a", encoding="utf-8") as f:
                f.writelines(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n" for row in rows)
        self.say.samples(rows)
        return sum(r["stopped"] == "stop" for r in rows) if rows and self.objective.renders == "chat" else None

    def _non_finite(self, step: Step, before: int) -> int:
        if step.finite:
            return 0
        self.progress.skipped += 1
        named = ", ".join(step.where[:5]) + (f" and {len(step.where) - 5} more" if len(step.where) > 5 else "")
        self.say.warn(f"step {step.step}: the loss or its gradient is not finite; the step was skipped. Its examples: {named}")
        if before + 1 >= 3:
            raise LuthierError(
                f"three steps in a row were not finite, the last on {named}; lower optim.lr (it is {self.run.optim.lr:g}) or look at these examples"
            )
        return before + 1

    def _check_disk(self) -> None:
        if not self.leads:
            return
        one = checkpoint.size(self.policy, self.optimizer)
        best = self.optimizer.master_bytes
        need = one * (self.run.checkpoint.keep + 1) + 2 * best
        free = shutil.disk_usage(self.folder).free
        self.say.note(f"checkpoints: {size(one)} each, {self.run.checkpoint.keep} kept; {size(need)} of disk needed at most, {size(free)} free")
        if need > free:
            raise LuthierError(
                f"{self.folder}: the run needs {size(need)} of disk for checkpoints and {size(free)} are free; free some, choose another "
                "folder (out=FOLDER) or keep fewer (checkpoint.keep=1)"
            )

    def _write_settings(self) -> None:
        if not self.leads:
            return
        atomic.text(self.folder / "run.yaml", config.dump(self.run))
        versions = {m: sys.modules[m].__version__ for m in ("torch", "transformers", "safetensors", "tokenizers", "numpy") if m in sys.modules}
        atomic.as_json(
            self.folder / "environment.json",
            {
                "luthier": __version__,
                "python": platform.python_version(),
                **versions,
                "platform": platform.platform(),
                "device": str(self.run.place.device),
                "threads": torch.get_num_threads(),
                "started": datetime.now().isoformat(timespec="seconds"),
                "data": self.prepared.facts,
            },
        )

    def _result(self, after: Measures, artefact: Path) -> Result:
        trained, whole = counts.total(self.policy)
        p = self.progress
        before = Measures.from_dict(p.before)
        return Result(
            self.folder,
            artefact,
            before,
            after,
            trained,
            whole,
            p.step,
            p.seconds,
            p.tokens,
            peak_bytes(self.run.place.device),
            self._best(),
            self.stopped,
            against.replayed(self.feed),
            self.alarms.raised,
        )

    def _best(self) -> int:
        """The step whose weights are saved."""
        p = self.progress
        return p.best_step if self.run.evaluate.best and p.best_step else p.step


def report(folder: Path, say: Reporter) -> None:
    """Write report.html, and the model card of a run that has finished."""
    try:
        card.write(folder)
        page.write(folder)
    except Exception as e:  # whatever is wrong with a report, what was trained is saved, and the run has ended as it has
        say.warn(f"the report was not written ({type(e).__name__}: {e}); luthier runs report {folder} tries again")


def _worth(now: Measures) -> float | None:
    """What `best` and `patience` go by, lower being better: the held-out loss, or minus the held-out reward where answers are learned from."""
    if now.loss is not None:
        return now.loss.value
    return -now.scores["reward"].value if "reward" in now.scores else None
