"""What a run does against forgetting (data.replay), put together: text replayed beside the data, the divergence from before, decay towards the start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import voices
from ..core import Batch, Incompatible, Objective, Row
from ..data.replay import SEED, Beside, Counted, Replayed
from ..measuring.evaluate import loss_on
from ..measuring.measure import Mean, group, to_device
from ..policy import Policy
from ..settings.plugins import kind_of
from ..settings.run import Run
from . import l2sp
from .keeping import Kept
from .replaying import Text, text_of, weight


def check(run: Run) -> None:
    """Raise Incompatible where a setting of data.replay has nothing to act on in this run."""
    r, kind = run.data.replay, kind_of(run.objective)
    asked = [name for name, on in (("source", r.source), ("kl", r.kl), ("l2sp", r.l2sp)) if on]
    if not asked:
        return
    if hasattr(run.method, "candidates"):
        raise Incompatible(f"data.replay.{asked[0]}: method {kind_of(run.method)} trains nothing, so it forgets nothing; leave data.replay out")
    if "rollouts" in run.objective.needs and (r.source or r.kl):
        instead = "objective.kl holds it to what it was" + (", and objective.ptx with ptx_data replays text" if hasattr(run.objective, "ptx") else "")
        raise Incompatible(f"data.replay.{asked[0]}: objective {kind} learns from its own answers, where {instead}; leave this out")
    if r.kl_on == "trained" and run.objective.renders in ("label", "ranked"):
        raise Incompatible(
            f"data.replay.kl: objective {kind} trains no next token at which the divergence could be taken; name general text in data.replay.source, or self"
        )


@dataclass
class Against:
    """What of it a run has. ``objective``: what its loop learns; the run's own where nothing is added to the loss."""

    run: Run
    policy: Policy
    objective: Objective
    text: Text | None
    packed: bool

    @classmethod
    def of(
        cls,
        run: Run,
        policy: Policy,
        objective: Objective,
        trained: list[Row],
        *,
        packed: bool,
        say: Callable[[str], None],
        tick: Callable[[str, int, int], None],
    ) -> Against:
        """Read, sample and keep what the settings ask for, before the first step. ``trained``: the run's rows. Raises LuthierError, see the parts."""
        r = run.data.replay
        if r.kl:
            kept = voices.keep_reference(policy, run.method)
            say(f"held to what it was: {r.kl:g} x KL(before || now) of the next token at the tokens that are {_on(r.kl_on)}; before is {kept}")
        if r.l2sp:
            say(f"decay towards the start (L2-SP, {r.l2sp:g}): {l2sp.hold(policy, r.l2sp)}")
        text = text_of(run, policy, trained, packed=packed, folder=Path(run.out) / ".replay", say=say, tick=tick) if r.source else None
        added: Any = objective
        if text is not None or r.kl:
            added = Kept(objective, None if text is None else text.learner, weight=0.0 if text is None else weight(r), kl=r.kl)
        return cls(run, policy, added, text, packed)

    def feed(self, main: Counted) -> Any:
        """The run's feed with what is learned beside its data."""
        r, place = self.run.data.replay, self.run.place
        if not isinstance(self.objective, Kept):
            return main
        if self.text is None:
            return Beside(main, None, kl_on=r.kl_on)
        assert r.share is not None
        how: dict[str, Any] = {
            "pad": self.policy.pad,
            "packed": self.packed,
            "micro_tokens": self.run.optim.micro_tokens,
            "rank": place.lane,
            "size": place.lanes,
        }
        rows = Replayed(self.text.train, self.text.learner.collate, batch_tokens=1, steps=main.steps, seed=self.run.seed + SEED, **how)
        return Beside(main, rows, share=r.share, kl_on=r.kl_on)

    def held_out(self) -> Mean | None:
        """Loss on the rows of what is replayed that are not, per token; None where nothing is replayed."""
        if self.text is None or not self.text.held:
            return None
        learner, policy = self.text.learner, self.policy
        groups = group(self.text.held, self.run.optim.micro_tokens, self.packed)
        batches: list[Batch] = [to_device(learner.collate(g, pad=policy.pad, packed=self.packed), policy) for g in groups]
        losses = loss_on(policy, learner, batches)
        return Mean(losses.value, losses.n)

    def own_loss(self, terms: dict[str, float], whole: float) -> float:
        """The objective's own part of a step's loss."""
        return self.objective.own_loss(terms) if isinstance(self.objective, Kept) else whole


def _on(where: str | None) -> str:
    return "replayed" if where == "replay" else "trained"


def replayed(feed: Any) -> dict[str, float]:
    """What a feed has replayed so far, for the result; empty where nothing is."""
    if not isinstance(feed, Beside) or feed.replayed is None:
        return {}
    return {"tokens": feed.tokens, "share": feed.tokens / max(1, feed.tokens + feed.read), "passes": round(feed.passes, 3)}
