"""What is printed, and docs/benchmarks.md: one set of rows for both."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from .driver import COSINE, LOSS_TOLERANCE, STEADY

# (label, key of a run's summary, format); repetitions stand side by side.
ROWS = (
    ("step, median, s", "step_median_s", "{:.3f}"),
    ("step, min, s", "step_min_s", "{:.3f}"),
    ("tokens/s, padding not counted", "tokens_per_s", "{:,.0f}"),
    ("labelled tokens/s", "labelled_per_s", "{:,.0f}"),
    ("distance to the limit (1 = none)", "distance", "{:.2f}"),
    ("peak RSS, MiB", "peak_mib", "{:,.0f}"),
    ("RSS above imports, MiB", "above_imports_mib", "{:,.0f}"),
    ("start-up, s (imports in it)", "startup_s", "{:.1f}"),
    ("of that, imports, s", "import_s", "{:.1f}"),
    ("first step, s", "first_step_s", "{:.2f}"),
    ("positions computed per token", "positions_per_token", "{:.2f}"),
)


def means(column: dict[str, Any], key: str) -> float:
    """A figure over the repetitions."""
    values = [run["summary"][key] for run in column["runs"]]
    return sum(values) / len(values)


def gates(result: dict[str, Any]) -> list[list[str]]:
    """Header and rows: step 1 of every column against the reference."""
    out = [["step 1 against fp32", "loss", "relative error", "cosine of gradients", "worst tensor", ""]]
    for peer, column in result["columns"].items():
        g = column["gate"]
        verdict = "equal" if g["passed"] else "NOT EQUAL"
        out.append([peer, f"{g['loss']:.5f}", f"{g['loss_error']:.1e}", f"{g['cosine']:.5f}", f"{g['worst_cosine']:.5f}", verdict])
    return out


def figures(result: dict[str, Any]) -> list[list[str]]:
    """Header and rows of speed and memory; the last two compare with ours, means of the repetitions."""
    columns = result["columns"]
    out = [["each repetition", *columns]]
    for label, key, form in ROWS:
        out.append([label, *(" / ".join(form.format(run["summary"][key]) for run in c["runs"]) for c in columns.values())])
    out.append(["GEMM rate before and after, TF/s", *(" / ".join(_gemm(run) for run in c["runs"]) for c in columns.values())])
    if result["quick"]:
        return out  # so small a shape measures the machine's other work: no ratio is formed
    mine = columns["ours"]
    faster = lambda c: means(mine, "tokens_per_s") / means(c, "tokens_per_s")  # noqa: E731
    out.append(["**ours is faster by** (tokens/s)", "", *(f"{faster(c):.2f}x" for c in list(columns.values())[1:])])
    ratio = lambda c: means(c, "above_imports_mib") / max(1.0, means(mine, "above_imports_mib"))  # noqa: E731
    out.append(["**takes more memory than ours by** (RSS above imports)", "", *(f"{ratio(c):.2f}x" for c in list(columns.values())[1:])])
    return out


def _gemm(run: dict[str, Any]) -> str:
    text = "-".join(f"{g['linears'] / 1e12:.2f}" for g in run["gemm"])
    return text if run["moved"] <= STEADY else f"{text} (!)"


def losses(result: dict[str, Any]) -> list[list[str]]:
    """Header and rows: the loss of every step, first repetition."""
    curves = {p: c["runs"][0]["steps"] for p, c in result["columns"].items()}
    steps = range(len(next(iter(curves.values()))))
    return [["loss at step", *(str(i + 1) for i in steps)], *([p, *(f"{s['loss']:.4f}" for s in curve)] for p, curve in curves.items())]


def tuning(result: dict[str, Any]) -> list[list[str]]:
    """Header and rows: what was tried for the tuned column."""
    t = result["tuning"]
    out = [[f"TRL + PEFT: settings tried, {t['steps']} steps each", "s a step after the first", ""]]
    for name, got in t["tried"].items():
        why = "chosen" if name == t["chosen"] else "not equal work: AdamW rounds into bf16" if name in t["unequal"] else ""
        seconds = f"{got['seconds'] / max(1, t['steps'] - 1):.2f}" if "seconds" in got else got["error"]
        out.append([name, seconds, why])
    return out


def says(result: dict[str, Any]) -> list[str]:
    """Sentences under the tables."""
    out = [f"Over all steps, no peer's loss is further from ours than {result['loss_band']:.1e} (relative)."]
    moved = [(p, run["moved"]) for p, c in result["columns"].items() for run in c["runs"] if run["moved"] > STEADY]
    if moved:
        out.append(f"(!) The machine's own rate moved by more than {STEADY:.0%} around: " + ", ".join(f"{p} ({m:.0%})" for p, m in moved) + ".")
    if result["quick"]:
        out.append("A tiny shape: these seconds show that the harness works, and say nothing about speed.")
    return out + result["notes"]


def show(result: dict[str, Any], console: Console) -> None:
    """Print one workload. What is not equal work gets no speed."""
    console.print(f"\n[bold]{result['workload']['name']}[/bold]  {_what(result)}")
    for peer, column in result["columns"].items():
        console.print(f"[dim]{peer}: {json.dumps(column['settings'], sort_keys=True)}[/dim]", highlight=False)
    _print(gates(result), console)
    if not result["passed"]:
        console.print(f"[bold red]Ours is not equal to the reference (loss within {LOSS_TOLERANCE:g}, cosine above {COSINE}): no speed is quoted.[/bold red]")
        return
    _print(losses(result), console)
    _print(tuning(result), console)
    _print(figures(result), console)
    for line in says(result):
        console.print(line)


def _print(rows: list[list[str]], console: Console) -> None:
    table = Table(*(c for c in rows[0]))
    for row in rows[1:]:
        table.add_row(*(cell.replace("**", "") for cell in row))
    console.print(table)


def _what(result: dict[str, Any]) -> str:
    w = result["workload"]
    tokens, labelled = (sum(c[i] for c in w["counts"]) / len(w["counts"]) for i in (0, 1))
    return (
        f"Llama shape, {w['parameters'] / 1e6:.1f} M parameters (hidden {w['hidden']}, {w['layers']} layers, {w['heads']} heads, ff {w['ff']}, "
        f"vocabulary {w['vocabulary']:,}, tied), random weights, seed {w['seed']}; LoRA rank {w['rank']}, alpha {w['alpha']:g} on {', '.join(w['targets'])}; "
        f"{w['steps']} steps of {w['examples']} examples, on average {tokens:,.0f} tokens, {labelled:,.0f} labelled (the answers); lengths: {w['lengths']}; "
        f"AdamW, lr {w['lr']:g}; {w['threads']} threads."
    )


def markdown(document: dict[str, Any]) -> str:
    """docs/benchmarks.md."""
    m = document["machine"]
    parts = [
        "# Benchmarks: ours against TRL + PEFT",
        "Made by `make bench`; do not edit. Every peer ran in a process of its own on the same weights (stored in bfloat16), token ids, labels, order, adapter "
        "start, optimizer and learning rate, when the CPU was idle, with the machine's own matrix-product rate taken before and after. "
        "Repetitions stand side by side, so that noise is seen. Speed is quoted only where step 1 equals a plain fp32 PyTorch reference: loss within "
        f"{LOSS_TOLERANCE:g} relative, cosine of the adapter gradients above {COSINE}.",
        "*Distance to the limit* is the time of a step over the time its useful operations take at the best rate of bfloat16 matrix products measured here: "
        "no padding, no recomputation, no unlabelled logits count as useful, and nothing but matrix products and attention is allowed any time. "
        "The same denominator serves every column. Step 1 is left out of the other figures. Memory is the peak resident set of the process, "
        "model loading included.",
        f"{document['date']} · {m['cpu']}, {m['cores']} cores, {m['memory_gib']} GiB · {m['system']}, Python {m['python']} · "
        + ", ".join(f"{p} {v}" for p, v in m["packages"].items())
        + (f" · commit {m['commit']}" if m["commit"] else ""),
    ]
    for result in document["results"]:
        parts += [f"## {result['workload']['name']}", _what(result), _table(gates(result))]
        if result["passed"]:
            parts += [_table(figures(result)), *says(result), _table(tuning(result)), _table(losses(result))]
        else:
            parts.append("Ours is not equal to the reference: no speed is quoted.")
        for peer, column in result["columns"].items():
            parts.append(f"{peer}:\n\n```json\n{json.dumps(column['settings'], indent=1, sort_keys=True)}\n```")
    return "\n\n".join(parts) + "\n"


def _table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
