"""The sections of report.html, each from the facts of a run to its HTML; empty where there is nothing to say."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from ..data.preview import MEANING
from ..settings.runfile import write
from . import curves as curves_of
from . import verdict as words
from .facts import IN_LINES, Facts, Number, flat, is_kept, mapping
from .following import commands
from .hashes import TOO_LARGE, hashes

DATA = (
    ("records", "records"), ("rows", "rows to train"), ("tokens", "tokens"), ("trained_tokens", "trained tokens"), ("median", "median length of a row"),
    ("longest", "longest row"), ("max_tokens", "limit of length"),
)  # fmt: skip
LOST = (
    ("dropped_long", "too long, dropped"), ("truncated", "too long, truncated"), ("cut_responses", "of these without the end of the response"),
    ("split", "too long, split into pieces"), ("bad_rows", "bad rows"),
)  # fmt: skip
PLAIN = {"program": "Python and libraries, or the CUDA context", "allocator": "freed and not given back"}  # as `luthier plan` says it


def e(value: Any) -> str:
    """Anything as text that HTML shows as it is."""
    return escape(str(value))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """A table of cells that are HTML already; but for the first ``words`` columns they are numbers, to the right."""
    kind = lambda i: "" if i < words else ' class="n"'  # noqa: E731
    body = "".join("<tr>" + "".join(f"<td{kind(i)}>{c}</td>" for i, c in enumerate(row)) + "</tr>" for row in rows)
    head = "".join(f'<th scope="col"{kind(i)}>{c}</th>' for i, c in enumerate(columns))
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def pairs(items: Iterable[tuple[str, str]], *, short: bool = False) -> str:
    """Names and what they are, side by side; the second is HTML already. ``short``: both are, so a phone has room for them beside one another."""
    return ('<dl class="counts">' if short else "<dl>") + "".join(f"<dt>{e(k)}</dt><dd>{v}</dd>" for k, v in items) + "</dl>"


def folded(summary: str, body: str) -> str:
    """Something to unfold."""
    return f"<details><summary>{e(summary)}</summary>{body}</details>"


# --- what was asked, and the verdict -----------------------------------------------------------------------------------


def head(facts: Facts) -> str:
    """The run's name, its state and what was asked."""
    base, began = mapping(facts.told.get("base")), facts.began
    model = e(facts.model) + (f' <span class="soft">({e(base["family"])}, {base["parameters"]:,} parameters, {e(base["hash"])})</span>' if base else "")
    items = [("model", model)]
    items += [(axis, f"<code>{e(facts.kind(axis))}</code>") for axis in ("method", "objective", "precision")]
    items.append(("data", e(_sources(facts))))
    if facts.planned:
        items.append(("training", e(_training(facts))))
    asked = mapping(facts.told.get("asked"))
    changed = table(["setting", "value"], ([f"<code>{e(k)}</code>", f"<code>{e(_said(v))}</code>"] for k, v in asked.items()), words=2) if asked else ""
    problems = "".join(f'<p class="problem">{e(p)}.</p>' for p in facts.problems)
    when = f' <span class="soft">{began:%Y-%m-%d %H:%M}</span>' if began else ""
    return (
        f'<header><h1>{e(facts.name)}</h1><p><span class="state">{e(facts.state)}</span>{when}</p></header>{problems}'
        f'<section aria-label="What was asked"><h2>What was asked</h2>{pairs(items)}'
        + (f"<h3>Settings that are not the default</h3>{changed}" if changed else "")
        + folded("All settings, as resolved", f"<pre>{e(write(facts.settings))}</pre>")
        + "</section>"
    )


def _sources(facts: Facts) -> str:
    """What was trained on: the files, or the sources of a mixture by name."""
    train, mixed = mapping(facts.settings.get("data")).get("train"), facts.data.get("sources")
    if train:
        return ", ".join(map(str, train)) if isinstance(train, list) else str(train)
    return f"a mixture of {', '.join(mixed)}" if isinstance(mixed, dict) and mixed else "not recorded"


def _training(facts: Facts) -> str:
    o, told = mapping(facts.settings.get("optim")), facts.told
    per = f"{o['batch_examples']:,} examples" if o.get("batch_examples") else f"{o.get('batch_tokens', 0):,} tokens"
    why = str(told.get("learning_rate", "as asked"))  # of a default: the rate and where it is from, as default_lr says it
    if isinstance(o.get("lr"), int | float) and not why.startswith(f"{o['lr']:g}:"):
        why = f"{o['lr']:g}, {why}"
    rate = f"; learning rate {why}" if isinstance(o.get("lr"), int | float) else ""
    return f"{facts.planned:,} steps of {per}{', packed' if told.get('packed') else ''}{rate}; seed {facts.settings.get('seed', 0)}"


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def verdict(facts: Facts) -> str:
    """What it came to, in sentences."""
    alarms = "".join(f'<p class="problem"><strong>{e(which)}.</strong> {e(said)}</p>' for which, said in words.alarms(facts))
    said = "".join(f"<p>{e(s)}</p>" for s in words.sentences(facts))
    return f'{alarms}<section aria-label="Verdict"><div class="verdict">{said}</div></section>'


def before_after(facts: Facts) -> str:
    """Every measure with n and intervals."""
    before, after = facts.measures()
    names = list(dict.fromkeys([*after, *before]))
    if not names:
        return ""
    last = "after" if facts.finished else "at the last evaluation"
    body = table(["measure", "before", last, "difference", "n"], (_row(n, before.get(n), after.get(n)) for n in names))
    intervals = any(n.low is not None for n in (*before.values(), *after.values()))
    note = "Intervals are 95 %, by resampling rows. That of a difference takes the two measurements as independent; of the same rows, it is on the wide side."
    return body + (f'<p class="soft small">{note}</p>' if intervals else "")


def _row(name: str, a: Number | None, b: Number | None) -> list[str]:
    there = b or a
    assert there is not None
    n = "" if there.n is None else f"{there.n:,} {e(there.unit)}".strip()
    if a is None or b is None:
        return [e(name), e(a or ""), e(b or ""), "", n]
    d = words.difference(a, b)
    if d.value == 0 or (name not in words.LOWER and not is_kept(name)):  # whether a task's score should rise, only the user knows
        return [e(name), e(a), e(b), e(words.signed(d)), n]
    better = (d.value < 0) == (name in words.LOWER)
    return [e(name), e(a), e(b), f'<span class="{"better" if better else "worse"}">{e(words.signed(d))} {"better" if better else "worse"}</span>', n]


# --- data --------------------------------------------------------------------------------------------------------------


def data(facts: Facts) -> str:
    """What reading the data came to; of a mixture for each of its sources."""
    whole = facts.data
    if not whole:
        return ""
    each = whole.get("sources")
    blocks = [pairs(_counts(whole), short=True)]
    for name, told in each.items() if isinstance(each, dict) else ():
        blocks.append(f"<h3>{e(name)}</h3>" + pairs(_counts(mapping(told)), short=True))
    return "".join(blocks)


def _counts(told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for file, shape in mapping(told.get("shapes")).items():
        yield "shape", f"{e(file)}: {e(shape)}"
    if told.get("template"):
        yield "chat template", e(told["template"])
    for key, name in DATA:
        if isinstance(told.get(key), int) and not (key == "trained_tokens" and told[key] == 0):
            part = f" ({words.share(told[key], told['tokens'])})" if key == "trained_tokens" and told.get("tokens") else ""
            yield name, f"{told[key]:,}{part}"
    held = mapping(told.get("validation"))
    if held:
        origin = held.get("from", "")
        yield "held out", f"{held.get('rows', 0):,} rows, from {e(', '.join(origin) if isinstance(origin, list) else origin)}"
    if held.get("prompts_also_trained"):
        yield "held-out prompts that are also trained", f"{held['prompts_also_trained']:,}: their loss says less than it seems"
    lost = [f"{told[key]:,} {name}" for key, name in LOST if told.get(key)]
    if any(key in told for key, _ in LOST):
        yield "lost on the way", e(", ".join(lost) or "nothing")
    for line in told.get("bad_examples") or ():
        yield "bad row", e(line)
    for text, n in (*mapping(told.get("left_out")).items(), *mapping(told.get("notes")).items()):
        yield "note", f"{e(text)} ({n:,} rows)"


def examples(facts: Facts) -> str:
    """Rows of the training data, their trained tokens marked."""
    rows = facts.told.get("examples")
    if not isinstance(rows, list) or not rows:
        return ""
    marked = any(trained for row in rows for part in row["parts"] for _, trained in part["text"])
    what = MEANING.get(facts.data.get("renders", ""), "") or "trained tokens"
    first = f"<mark>Marked</mark> are the {e(what)}; the others are read, not learned." if marked else "These tokens are read; none of them is a target."
    first = f"<p>{first}</p>"
    return first + "".join(
        f"<h3>{e(row['where'])}</h3>"
        + "".join(f'<p class="soft small">{e(p["said"])}</p><div class="example">{_coloured(p["text"])}</div>' for p in row["parts"])
        for row in rows
    )


def _coloured(text: Iterable[Sequence[Any]]) -> str:
    kinds = {True: "<mark>{}</mark>", False: "{}", None: '<span class="left-out">{}</span>'}
    return "".join(kinds[trained].format(e(piece)) for piece, trained in text)


# --- what happened -----------------------------------------------------------------------------------------------------


def curves(facts: Facts) -> str:
    """Figures over steps and, of a run that learned from its own answers, over rollouts; the evaluations as a table."""
    steps, rollouts = ([f for f in figures if f] for figures in (curves_of.over_steps(facts), curves_of.over_rollouts(facts)))
    out = f'<div class="charts">{"".join(steps)}</div>' if steps else ""
    if rollouts:
        out += f'<h3>Its own answers, rollout by rollout</h3><div class="charts">{"".join(rollouts)}</div>'
    evaluated = [*facts.events("before"), *facts.events("evaluation"), *facts.events("after")]
    names = [k for k in dict.fromkeys(k for x in evaluated for k in x) if k not in ("event", "step") and not k.endswith(("_low", "_high"))]
    if out and evaluated and names:
        rows = ([e(x["event"]), f"{x['step']:,}", *(f"{x[k]:.4f}" if isinstance(x.get(k), int | float) else "" for k in names)] for x in evaluated)
        said = IN_LINES | {"general_loss": "general text"}
        out += folded("The evaluations as numbers", table(["", "step", *(e(said.get(k, k)) for k in names)], rows))
    return out


def candidates(facts: Facts) -> str:
    """Of a run that chose a prompt: the best of those it tried."""
    tried = facts.events("candidate")[:10]
    return (
        table(["place", "tokens", "held-out loss"], ([f"{t.get('place', ''):,}", f"{t.get('tokens', 0):,}", f"{t.get('loss', 0):.4f}"] for t in tried))
        if tried
        else ""
    )


def retention(facts: Facts) -> str:
    """What was gained against what was kept of the base."""
    figure = curves_of.retention(facts)
    return (
        f'<div class="one">{figure}</div><p class="soft small">Up is better at the task; to the left more is kept of what the base could do.</p>'
        if figure
        else ""
    )


def samples(facts: Facts) -> str:
    """Fixed held-out prompts with the answers before training and after."""
    if not facts.samples:
        return ""
    first, last = (pick(s["step"] for s in facts.samples) for pick in (min, max))
    before, after = ([s for s in facts.samples if s["step"] == step] for step in (first, last))
    out = []
    for a, b in zip(before, after, strict=False):
        boxes = [("before training" if first == 0 else f"step {first:,}", a), (f"step {last:,}", b)] if last != first else [(f"step {first:,}", a)]
        cells = [f'<div class="ask"><p class="soft small">prompt</p><div class="example said">{e(_text(a.get("prompt")))}</div></div>']
        cells += [
            f'<div><p class="soft small">{e(when)}{e(_ended(s))}</p><div class="example said">{e(_answer(s)) or "(nothing)"}</div></div>' for when, s in boxes
        ]
        if a.get("reference") is not None:
            cells.append(f'<div><p class="soft small">the data says</p><div class="example said">{e(_text(a["reference"]))}</div></div>')
        out.append(f'<div class="samples">{"".join(cells)}</div>')
    return "".join(out)


def _text(prompt: Any) -> str:
    """A prompt as it is read: of a conversation its messages."""
    if isinstance(prompt, list):
        return "\n".join(f"{m.get('role', '')}: {m.get('content', '')}" if isinstance(m, dict) else str(m) for m in prompt)
    return _said(prompt)


def _answer(sample: Mapping[str, Any]) -> str:
    if "answer" in sample:
        sure = sample.get("probability")
        return _text(sample["answer"]) + (f"  (probability {sure:.2f})" if isinstance(sure, int | float) else "")
    return "\n".join(f"{k}: {_text(v)}" for k, v in sample.items() if k not in ("step", "prompt", "reference"))


def _ended(sample: Mapping[str, Any]) -> str:
    stopped = sample.get("stopped")
    return "" if stopped is None else ", stopped by itself" if stopped == "stop" else f", ended by {stopped}"


# --- what it took, what is there ---------------------------------------------------------------------------------------


def parameters(facts: Facts) -> str:
    """Counts by kind of module, beside what full fine-tuning would train there."""
    modules, trained, whole = (facts.told.get(k) for k in ("modules", "trained", "whole"))
    if not isinstance(modules, list) or not isinstance(trained, int) or not isinstance(whole, int):
        return ""
    rows = []
    for m in modules:
        n = m["modules"] * m["trained"]
        shape = f"{m['shape'][0]:,} x {m['shape'][1]:,}" if m.get("shape") else ""
        own = m["modules"] * m["whole"]
        rows.append([f"<code>{e(m['module'])}</code>", f"{m['modules']:,}", shape, f"{m['trained']:,}", f"{n:,}", words.share(n, own) if own else ""])
    first = f"<p>{trained:,} of {whole:,} parameters were trained: {words.share(trained, whole)}.</p>" if trained else "<p>No parameter was trained.</p>"
    return first + (table(["module", "how many", "shape", "trained in each", "trained in all", "of its own"], rows) if rows else "")


def memory(facts: Facts) -> str:
    """The prediction beside what was measured."""
    peak, told = words.memory(facts), mapping(facts.told.get("memory"))
    if peak is None:
        return ""
    gpu = str(facts.environment.get("device", "cpu")).startswith("cuda")
    whose = "of tensors on the GPU" if gpu else "of the whole process, Python and libraries included"
    took = _time(facts)
    if not told:
        why = "It was not predicted: that takes about two seconds, and is not done for a run of a few" if not took else "It could not be predicted"
        return f"<p>Measured peak {whose}: {words.size(peak)}. {why}; <code>luthier plan</code> does so.</p>{took}"
    total = int(told.get("total", 0))
    parts = [[e(PLAIN.get(k, k)), words.size(n)] for k, n in sorted(mapping(told.get("parts")).items(), key=lambda p: -p[1]) if n >= 1e6]
    first = f"<p>Predicted {words.size(total)}, measured {words.size(peak)} {whose}: the prediction is {words.off(total, peak)}.</p>{took}"
    note = f"Predicted for {e(told.get('batch', 'the largest micro-batch'))}, the longest row of this data in each place." if told.get("longest") else ""
    return first + table(["predicted", "bytes"], parts) + (f'<p class="soft small">{note}</p>' if note else "")


def _time(facts: Facts) -> str:
    """The predicted seconds of a step beside the measured ones; empty where there was no prediction."""
    step = mapping(facts.told.get("time")).get("step")
    took, steps = facts.result.get("seconds"), facts.result.get("steps")
    if not isinstance(step, int | float) or not took or not steps:
        return ""
    measured = took / steps
    return f"<p>A step was predicted to take {step:.3g} s and took {measured:.3g} s: the prediction is {words.off(step, measured)}.</p>"


def files(facts: Facts) -> str:
    """What was left, with its SHA-256."""
    if facts.artefact is None:
        return "<p>The run has not finished, so it has left no adapter and no model yet.</p>"
    found = hashes(facts.artefact)
    name = facts.artefact.name
    if found is None:
        return f"<p>{e(name)}/ is larger than {words.size(TOO_LARGE)}, so it was not hashed here: <code>sha256sum {e(name)}/*</code></p>"
    return '<p class="soft small">SHA-256 of what was saved</p>' + pairs((f"{name}/{f}, {words.size(n)}", f"<code>{h}</code>") for f, (h, n) in found.items())


def environment(facts: Facts) -> str:
    """Versions and machine."""
    items = [(k, e(v)) for k, v in flat({k: v for k, v in facts.environment.items() if k != "data"}).items()]
    return pairs(items) if items else ""


def following(facts: Facts) -> str:
    """Commands."""
    return "".join(f'<p class="soft small">{e(what)}</p><pre>{e(command)}</pre>' for what, command in commands(facts))
