"""What is printed, and docs/benchmarks.md: one set of rows for both."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from .driver import COSINE, STEADY, faster, mean, tolerance, unlike
from .ours import OURS

Rows = list[list[str]]
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
WHAT = {"default": "as it comes", "tuned": "tuned", "memory": "peak memory", "distance": "distance"}


def outcomes(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What was aimed at on a workload and what came of it: {"what", "target", "got", "met"}; "got" None where the peer did not run."""
    columns = result["columns"]
    by = {end: next((c for c in columns if c.endswith(end)), None) for end in ("as it comes", "tuned")}
    out = []
    for what, target in result["workload"]["wants"].items():
        peer = by["as it comes" if what in ("default", "memory") else "tuned"]
        ran = peer is not None and columns[peer]["runs"]
        got: float | None = None
        if what == "distance":
            got = mean(columns[OURS], "distance")
        elif ran and what == "memory":
            got = mean(columns[OURS], "peak_mib") / mean(columns[peer], "peak_mib")
        elif ran:
            got = faster(result, peer)  # type: ignore[arg-type]
        least = what in ("default", "tuned")
        out.append({"what": what, "target": target, "got": got, "met": got is not None and (got >= target if least else got <= target), "least": least})
    return out


def verdicts(results: list[dict[str, Any]]) -> Rows:
    """Header and rows: every workload, target by target."""
    out = [["workload", "against", "target", "found", ""]]
    for result in results:
        name = result["workload"]["name"]
        if result["quick"] or not result["passed"]:
            out.append([name, "", "", "a tiny shape: says nothing about speed" if result["quick"] else "not equal to the reference: no speed is quoted", ""])
            continue
        columns = result["columns"]
        for o in outcomes(result):
            peer = next((c for c in columns if c.endswith("as it comes" if o["what"] in ("default", "memory") else "tuned")), "")
            against = {"distance": "the machine's limit", "memory": f"{peer}, peak memory"}.get(o["what"], peer)
            sign = "at least" if o["least"] else "at most"
            found = "the peer does not run" if o["got"] is None else f"{o['got']:.2f}x" if o["what"] != "distance" else f"{o['got']:.2f}"
            out.append([name, against, f"{sign} {o['target']:g}{'' if o['what'] == 'distance' else 'x'}", found, _verdict(o, columns.get(peer))])
            name = ""
        default, tuned = (next((c for c in columns if c.endswith(end)), None) for end in ("as it comes", "tuned"))
        if default and "default" not in result["workload"]["wants"]:
            found = f"{faster(result, default):.2f}x" if columns[default]["runs"] else "the peer does not run"
            out.append([name, default, "", found, ""])
        if tuned and columns[tuned]["runs"]:
            share = mean(columns[OURS], "peak_mib") / mean(columns[tuned], "peak_mib")
            out.append([name, f"{tuned}, peak memory", "", f"{share:.2f}x", ""])
            out.append(
                ["", "distance to the limit: ours / tuned peer", "", f"{mean(columns[OURS], 'distance'):.2f} / {mean(columns[tuned], 'distance'):.2f}", ""]
            )
    return out


def _verdict(o: dict[str, Any], peer: dict[str, Any] | None) -> str:
    if o["got"] is None:
        return ""
    if o["met"]:
        return "met"
    short = o["got"] / o["target"]
    if not o["least"]:
        return f"missed: {short:.2f} times it"
    most = f"; at the machine's limit it would be {mean(peer, 'distance'):.2f}x" if peer and peer["runs"] else ""
    return f"missed: {short:.0%} of it{most}"


def gates(result: dict[str, Any]) -> Rows:
    """Header and rows: step 1 of every column against the reference."""
    out = [["step 1 against fp32", "loss", "relative error", "cosine of gradients", "worst tensor", ""]]
    for peer, column in result["columns"].items():
        if "error" in column:
            out.append([peer, "", "", "", "", f"does not run: {column['error']}"])
            continue
        g = column["gate"]
        verdict = "equal" if g["passed"] else f"NOT EQUAL {g['odd']}".strip()
        out.append([peer, f"{g['loss']:.5f}", f"{g['loss_error']:.1e}", f"{g['cosine']:.5f}", f"{g['worst_cosine']:.5f}", verdict])
    return out


def figures(result: dict[str, Any]) -> Rows:
    """Header and rows of speed and memory; the last two compare with ours, means of the repetitions."""
    columns = {p: c for p, c in result["columns"].items() if c["runs"]}
    out = [["each repetition", *columns]]
    for label, key, form in ROWS:
        out.append([label, *(" / ".join(form.format(run["summary"][key]) for run in c["runs"]) for c in columns.values())])
    if any(mean(c, "reference_share_s") > 0.001 for c in columns.values()):
        out.insert(3, ["of a step, the reference before training, s", *(f"{mean(c, 'reference_share_s'):.3f}" for c in columns.values())])
    out.append(["GEMM rate before and after, TF/s", *(" / ".join(_gemm(run) for run in c["runs"]) for c in columns.values())])
    if result["quick"]:
        return out  # so small a shape measures the machine's other work: no ratio is formed
    others = [p for p in columns if p != OURS]
    out.append(["**ours is faster by** (tokens/s)", "", *(f"{faster(result, p):.2f}x" for p in others)])
    ratio = lambda p: mean(columns[OURS], "peak_mib") / mean(columns[p], "peak_mib")  # noqa: E731
    out.append(["**ours takes of its memory** (peak RSS)", "", *(f"{ratio(p):.2f}x" for p in others)])
    return out


def _gemm(run: dict[str, Any]) -> str:
    text = "-".join(f"{g['linears'] / 1e12:.2f}" for g in run["gemm"])
    return text if run["moved"] <= STEADY else f"{text} (!)"


def losses(result: dict[str, Any]) -> Rows:
    """Header and rows: the loss of every step, first repetition."""
    curves = {p: c["runs"][0]["steps"] for p, c in result["columns"].items() if c["runs"]}
    steps = range(len(next(iter(curves.values()))))
    return [["loss at step", *(str(i + 1) for i in steps)], *([p, *(f"{s['loss']:.4f}" for s in curve)] for p, curve in curves.items())]


def tuning(result: dict[str, Any]) -> Rows:
    """Header and rows: what was tried for the tuned column."""
    t = result["tuning"]
    out = [[f"settings tried, {t['steps']} steps each", "s a step after the first", ""]]
    for name, got in t["tried"].items():
        other = "error" not in got and (t["unequal"].get(name) or unlike(got, result["reference_loss"], tolerance(result["workload"]["kind"])))
        why = "chosen" if name == t["chosen"] else f"not equal work: {other}" if other else ""
        out.append([name, f"{got['seconds'] / max(1, t['steps'] - 1):.2f}" if "seconds" in got else got["error"], why])
    out += [[name, f"{s:.2f}", "before, in another run"] for name, s in t["known"].items() if name not in t["tried"]]
    return out if t["tried"] else [*out, [t["chosen"], "", "taken without trying"]]


def says(result: dict[str, Any]) -> list[str]:
    """Sentences under the tables."""
    out = [f"Over all steps, no column's loss is further from ours than {result['loss_band']:.1e} (relative)."]
    moved = [(p, run["moved"]) for p, c in result["columns"].items() for run in c["runs"] if run["moved"] > STEADY]
    if moved:
        out.append(f"(!) The machine's own rate moved by more than {STEADY:.0%} around: " + ", ".join(f"{p} ({m:.0%})" for p, m in moved) + ".")
    if result["quick"]:
        out.append("A tiny shape: these seconds show that the harness works, and say nothing about speed.")
    return out + result["notes"]


def show(result: dict[str, Any], console: Console) -> None:
    """Print one workload. What is not equal work gets no speed."""
    console.print(f"\n[bold]{result['workload']['name']}[/bold]  {what(result)}", highlight=False)
    table(gates(result), console)
    if not result["passed"]:
        most = tolerance(result["workload"]["kind"])
        console.print(f"[bold red]Ours is not equal to the reference (loss within {most:g}, cosine above {COSINE}): no speed is quoted.[/bold red]")
        return
    if result["tuning"]:
        table(tuning(result), console)
    table(figures(result), console)
    for line in says(result):
        console.print(line, highlight=False)


def table(rows: Rows, console: Console) -> None:
    """A table in the terminal."""
    out = Table(*(c for c in rows[0]))
    for row in rows[1:]:
        out.add_row(*(cell.replace("**", "") for cell in row), *[""] * (len(rows[0]) - len(row)))
    console.print(out)


_KINDS = {"sft": "the answers", "text": "all but each document's first", "classify": "one label a row", "dpo": "both answers of each pair"}


def what(result: dict[str, Any]) -> str:
    """A workload in a sentence."""
    w = result["workload"]
    tokens, labelled = (sum(c[i] for c in w["counts"]) / len(w["counts"]) for i in (0, 1))
    kv = f" of which {w['kv_heads']} have keys and values" if w["kv_heads"] else ""
    trained = {
        "lora": f"LoRA rank {w['rank']}, alpha {w['alpha']:g} on {', '.join(w['targets'])}",
        "full": "all weights trained",
        "prefix": f"a prefix of {w['length']} tokens",
    }[w["method"]]
    return (
        f"{w['family'].capitalize()} shape, {w['parameters'] / 1e6:.1f} M parameters (hidden {w['hidden']}, {w['layers']} layers, {w['heads']} heads{kv}, "
        f"ff {w['ff']}, vocabulary {w['vocabulary']:,}), random weights, seed {w['seed']}"
        + (", its linears in NF4 with double quantisation" if w["precision"] == "nf4" else "")
        + f"; {trained}; {w['steps']} steps of {w['examples']} {'pairs' if w['kind'] == 'dpo' else 'examples'}, on average {tokens:,.0f} tokens, "
        f"{labelled:,.0f} labelled ({_KINDS[w['kind']]}); lengths: {result['lengths']}; AdamW, lr {w['lr']:g}; {w['threads']} threads."
    )
