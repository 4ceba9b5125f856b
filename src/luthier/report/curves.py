"""Which curves a run's numbers give: over steps, over rollouts, and what was gained against what was kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from . import chart
from .chart import Point, Series
from .facts import IN_LINES, SUITE, Facts, is_kept, number
from .verdict import size


def over_steps(facts: Facts) -> Iterator[str]:
    """Losses, their gap, learning rate, gradient norm, memory, speed: a figure each, those that the run has numbers for."""
    train, evaluated = facts.events("train"), [*facts.events("before"), *facts.events("evaluation")]
    held = points(evaluated, "loss")
    yield chart.line(
        "Loss: training and held out" if held else "Training loss", [Series("training", points(train, "loss")), Series("held out", held, dots=True)], y="loss"
    )
    yield chart.line("Held-out loss minus training loss", [Series("gap", gap(train, facts.events("evaluation")), dots=True)], y="nats")
    yield chart.line("Loss on general text", [Series("general text", points(evaluated, "general_loss"), dots=True)], y="nats")
    kept = [Series(SUITE[part].removeprefix("loss on "), points(evaluated, f"{part}_loss"), dots=True) for part in ("instructions", "sampled")]
    yield chart.line("Loss on instructions and text by fiddle", kept, y="nats")
    yield chart.line("KL from before, on general text", [Series(SUITE["moved"], points(evaluated, "general_kl"), dots=True)], y="nats", zero=True)
    yield chart.line("Facts still known, of those known before", [Series(SUITE["facts"], points(evaluated, "known_facts"), dots=True)], y="share")
    yield chart.line("Learning rate", [Series("learning rate", points(train, "lr"))], zero=True)
    yield chart.line("Gradient norm, before clipping", [Series("norm", points(train, "grad_norm"))], zero=True)
    yield chart.line("Peak of the process's memory", [Series("memory", points(train, "memory_bytes"))], said=size)
    yield chart.line("Tokens per second", [Series("tokens/s", points(train, "tokens_per_second"))], zero=True)


ROLLOUTS = (
    ("Reward of the answers", "reward"),
    ("KL to the reference, nats an answer", "kl"),
    ("Entropy, nats a token", "entropy"),
    ("Tokens an answer", "answer_tokens"),
    ("Answers that stopped by themselves, share", "stopped"),
    ("Repeated runs of four tokens, share", "repetition"),
)


def over_rollouts(facts: Facts) -> Iterator[str]:
    """Of a run that learned from its own answers."""
    rollouts = facts.events("rollout")
    for title, key in ROLLOUTS:
        yield chart.line(title, [Series(title, points(rollouts, key, x="rollout"))], x="rollout")
    watched = sorted({k for r in rollouts for k in r if k.startswith("watch_")})[:4]
    yield chart.line("Watched scores, not learned from", [Series(n.removeprefix("watch_"), points(rollouts, n, x="rollout")) for n in watched], x="rollout")


def points(lines: Sequence[dict[str, Any]], key: str, *, x: str = "step") -> list[Point]:
    """(x, value) of the lines that have a number there."""
    pairs = ((number(line.get(x)), number(line.get(key))) for line in lines)
    return [(at, value) for at, value in pairs if at is not None and value is not None]


def gap(train: Sequence[dict[str, Any]], evaluated: Sequence[dict[str, Any]]) -> list[Point]:
    """The held-out loss minus the mean training loss of the steps since the evaluation before."""
    losses, out, last = points(train, "loss"), [], 0.0
    for step, held in points(evaluated, "loss"):
        since = [v for at, v in losses if last < at <= step]
        if since:
            out.append((step, held - sum(since) / len(since)))
        last = step
    return out


def retention(facts: Facts) -> str:
    """Target gain against what was lost: a point an evaluation, joined in order from before training, at (0, 0); nothing where one was not measured twice."""
    visits = [*facts.events("before"), *facts.events("evaluation")]
    key = next((k for k in ("loss", *_scores(visits)) if sum(k in v and "general_loss" in v for v in visits) > 1), None)
    met = [v for v in visits if key and number(v.get(key)) is not None and number(v.get("general_loss")) is not None]
    if key is None or not met:
        return ""
    first, sign = met[0], -1 if key == "loss" else 1
    where = lambda v: (float(v["general_loss"]) - float(first["general_loss"]), sign * (float(v[key]) - float(first[key])))  # noqa: E731
    target = "held-out loss" if key == "loss" else key
    series = [Series("in the order of training", [where(v) for v in met], dots=True, notes=[_say(v, key, target) for v in met])]
    series.append(Series("before training", [where(first)], dots=True))
    series += [Series("what was kept", [where(v) for v in kept], dots=True)] if (kept := _kept(facts, key)) else []
    gained = "held-out loss fell by" if key == "loss" else f"gain in {key}"
    return chart.line(f"{target[0].upper()}{target[1:]}: gain against forgetting", series, x="loss on general text rose by (right: forgotten)", y=gained)


def _say(visit: dict[str, Any], key: str, target: str) -> str:
    more = "".join(f", {IN_LINES[k]} {visit[k]:.3f}" for k in ("general_kl", "known_facts") if number(visit.get(k)) is not None)
    return f"step {visit['step']:,}: {target} {visit[key]:.4f}, general text {visit['general_loss']:.4f}{more}"


def _scores(visits: Sequence[dict[str, Any]]) -> list[str]:
    names = [k for k in (visits[-1] if visits else {}) if k not in ("event", "step") and not k.endswith(("_low", "_high"))]
    return [k for k in names if not is_kept(IN_LINES.get(k, k))]


def _kept(facts: Facts, key: str) -> list[dict[str, Any]]:
    return [v for v in facts.events("after")[-1:] if number(v.get(key)) is not None and number(v.get("general_loss")) is not None]
