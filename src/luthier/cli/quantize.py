"""luthier quantize: a model in codes of a few bits, as one folder: GPTQ, fitted to a text, or NF4 or int8, which need none."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import heavy

if TYPE_CHECKING:
    from ..core import Base, Objective, Row
    from ..measuring.measure import Mean
    from ..quantising.calibrating import How
    from ..running.progress import Reporter

# The options that say something to codes that are fitted, with what they are where they are not given.
FITTED: dict[str, Any] = {
    "bits": 4, "group": 128, "symmetric": True, "calibrate": (), "rows": 128, "tokens": 512, "act_order": True, "search": True, "damp": 0.01,
}  # fmt: skip


def command(
    what: Annotated[str, typer.Argument(help="fiddle, a model folder or a Hub id, in floats.")],
    output: Annotated[Path, typer.Option(help="The new model folder.")],
    to: Annotated[Literal["gptq", "nf4", "int8"], typer.Option(help="gptq: codes fitted to a text. nf4, int8: rounded as the weights are.")] = "gptq",
    bits: Annotated[int | None, typer.Option(help="gptq: bits a code: 2, 3, 4 or 8. Default: 4.")] = None,
    group: Annotated[int | None, typer.Option(help="gptq: inputs that share a scale; -1: all of an output. Default: 128.")] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="gptq: one zero for all groups, as most programs read it, or each its own. Default: one.")
    ] = None,
    calibrate: Annotated[
        list[str] | None, typer.Option(help="gptq: text or conversations to fit to; may be given several times. Default: a small text that ships.")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="gptq: so many rows of it. Default: 128.")] = None,
    tokens: Annotated[int | None, typer.Option(min=8, help="gptq: longest row, in tokens. Default: 512.")] = None,
    act_order: Annotated[
        bool | None, typer.Option("--act-order/--no-act-order", help="gptq: round the inputs that matter most first; files stay in order. Default: yes.")
    ] = None,
    search: Annotated[bool | None, typer.Option("--search/--no-search", help="gptq: narrow a group's range where that lowers its error. Default: yes.")] = None,
    damp: Annotated[float | None, typer.Option(help="gptq: damping, as a share of the mean second moment of the inputs. Default: 0.01.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Held-out rows for the loss before and after. Default: general text that ships.")] = None,
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="What is not quantised is held and computed in this.")] = "bfloat16",
    seed: Annotated[int, typer.Option(min=0, help="Draws the calibration rows.")] = 0,
) -> None:
    """Quantise: `luthier quantize MODEL --calibrate text.txt --output FOLDER`. The folder is read here and by what else reads such codes."""
    heavy("quantising.calibrating")
    from ..running.progress import Reporter

    given: dict[str, Any] = {
        "bits": bits, "group": group, "symmetric": symmetric, "calibrate": calibrate, "rows": rows, "tokens": tokens, "act_order": act_order,
        "search": search, "damp": damp,
    }  # fmt: skip
    quantise(what, output, to, {k: v for k, v in given.items() if v is not None}, dtype=dtype, data=data or [], seed=seed, say=Reporter())


def quantise(what: str, output: Path, to: str, given: dict[str, Any], *, dtype: str, data: list[str], seed: int, say: Reporter) -> None:
    """Quantise a model that is in floats, write the folder, open it again and compare losses. ``given``: the options of FITTED that were given."""
    import torch

    from .. import build
    from ..hub import locate
    from ..quantising.codes import write_folder
    from ..settings.plugins import plugin
    from ..settings.run import Model

    precision, how = settings(to, given, dtype)
    _refuse(output)
    model = Model(id=what)
    source = _in_floats(locate(model))
    place = plugin("place", "one")()
    base = build.load(model, precision=plugin("precision", dtype)(), device=place.device)
    say.base(base)
    objective, held = _held_rows(base, data, seed, say) if how is None else (None, [])
    origin: dict[str, Any] = {"to": to}
    if how is not None:
        rows = _fit_rows(base, given, data, seed, say)
        objective, held, origin = rows.objective, rows.held, origin | {"rows": len(rows.fit), "tokens": rows.tokens, "from": rows.source}
    before = _loss(base, objective, held)
    size = sum(t.nbytes for t in {t.data_ptr(): t for t in base.model.state_dict().values()}.values())  # tied tensors once
    began = time.perf_counter()
    if how is None:
        from ..quantising.quantised import pack

        pack(base.model, precision)
    else:
        _blocks(base, precision, rows, how, say)
    stored = _counted(base, say)
    write_folder(base, precision, output, origin=origin)
    _carry(source, output)
    del base
    again = build.load(Model(id=str(output), cache="no"), precision=type(precision)(compute=dtype), device=place.device)
    after = _loss(again, objective, held)
    if before is not None and after is not None:
        said = "hidden token" if objective is not None and objective.renders == "masked" else "token"
        say.head(f"held-out loss per {said}: {before.value:.4f} in {dtype}, {after.value:.4f} in {to} ({after.value - before.value:+.4f}), n={before.n:,}")
    now = sum(f.stat().st_size for f in output.glob("*.safetensors"))
    say.note(f"{size / 1e6:,.1f} MB before, {now / 1e6:,.1f} MB now; {stored}; {time.perf_counter() - began:,.0f} s")
    say.head(f"saved, opened again and measured: {output}")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def again(plain: Path, output: Path, to: str, run: Any) -> None:
    """Quantise a merged model, and say what that costs on the rows of its run."""
    from ..measuring.measure import beside, once
    from ..opening import load
    from ..running.progress import Reporter

    readable = run.objective.renders in ("chat", "text", "masked") and to == "gptq"
    given = {"calibrate": list(run.data.train)} if readable and run.data.train else {}
    quantise(str(plain), output, to, given, dtype="bfloat16", data=[], seed=run.seed, say=Reporter())
    for line in beside({"merged": once(load(plain), run), f"in {to}": once(load(output), run)}):
        typer.echo(line)


# --- what was asked -------------------------------------------------------------------------------------------------


def settings(to: str, given: dict[str, Any], dtype: str) -> tuple[Any, How | None]:
    """The precision, and how codes are fitted (None: they are not). Raises LuthierError for options that do not go together."""
    from ..errors import LuthierError
    from ..settings.plugins import plugin

    kind: Any = plugin("precision", to)
    if to != "gptq":
        if given:
            option = "--" + next(iter(given)).replace("_", "-")
            raise LuthierError(f"{option}: says something to codes that are fitted to data, and {to} is not; leave it out, or say --to gptq")
        return kind(compute=dtype), None
    from ..quantising.calibrating import How

    asked = FITTED | given
    if asked["bits"] not in (2, 3, 4, 8):
        raise LuthierError(f"--bits: found {asked['bits']}, accepted are 2, 3, 4 and 8")
    if asked["group"] == 0 or asked["group"] < -1:
        raise LuthierError(f"--group: found {asked['group']}, accepted are numbers of inputs, and -1 for all inputs of an output")
    if not 0 < asked["damp"] <= 1:
        raise LuthierError(f"--damp: found {asked['damp']:g}, accepted is a share above 0 and at most 1")
    precision = kind(bits=asked["bits"], group=asked["group"], symmetric=asked["symmetric"], compute=dtype)
    return precision, How(damp=asked["damp"], by_importance=asked["act_order"], search=asked["search"])


def _refuse(output: Path) -> None:
    from ..errors import LuthierError

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise LuthierError(f"{output}: exists and is not empty; choose another --output")


def _in_floats(folder: Path) -> Path:
    from ..errors import LuthierError
    from ..quantising.codes import stored_in

    if (stored := stored_in(folder)) is not None:
        raise LuthierError(f"{folder}: this model is stored in {stored} already; name the model in floats that it was made from")
    return folder


# --- rows and losses ------------------------------------------------------------------------------------------------


def _fit_rows(base: Base, given: dict[str, Any], data: list[str], seed: int, say: Reporter) -> Any:
    from ..modelling.anatomy import features
    from ..quantising.calibrating import read_rows
    from ..quantising.quantised import linears

    asked = FITTED | given
    rows = read_rows(base, asked["calibrate"], held=data, count=asked["rows"], max_tokens=asked["tokens"], seed=seed)
    apart = "" if asked["calibrate"] or data else "; the loss is measured on its other half"
    say.note(f"fitted to {len(rows.fit)} rows, {rows.tokens:,} tokens, of {rows.source}{apart}")
    widest = max(features(m)[0] for m in linears(base.model, base.anatomy).values())
    if rows.tokens < 4 * widest:
        say.warn(f"{rows.tokens:,} tokens are few for linears of up to {widest:,} inputs; give more text: --calibrate FILE")
    return rows


def _held_rows(base: Base, data: list[str], seed: int, say: Reporter) -> tuple[Objective | None, list[Row]]:
    """The objective and held-out rows for codes that need no others."""
    from ..errors import LuthierError
    from ..quantising.calibrating import held_rows

    try:
        return held_rows(base, data, seed=seed)
    except LuthierError as e:
        if data:
            raise
        say.note(f"no loss is measured: {e}")
        return None, []


def _loss(base: Base, objective: Objective | None, held: list[Row]) -> Mean | None:
    from ..measuring.evaluate import loss_on
    from ..measuring.measure import Mean
    from ..policy import Policy
    from ..quantising.calibrating import batches

    if objective is None or not held or base.probes.get("head", 0.0) is None:  # an encoder whose files lack their head
        return None
    policy = Policy(base)
    losses = loss_on(policy, objective, batches(policy, objective, held))
    return Mean(losses.value, losses.n)


# --- the work -------------------------------------------------------------------------------------------------------


def _blocks(base: Base, precision: Any, rows: Any, how: How, say: Reporter) -> None:
    """Fit block by block, a line for each."""
    from ..quantising.calibrating import calibrate
    from ..running.progress import clock

    say.head("error of each block's linears, as a share of what they give (rounded to nearest, on the same grid)")
    began = time.perf_counter()
    for done in calibrate(base, precision, rows, how):
        left = (time.perf_counter() - began) / done.number * (done.of - done.number)
        worst = max(done.layers, key=lambda x: x.error)
        say.note(
            f"block {done.number}/{done.of}  {done.path}  {done.mean('error'):.2%} ({done.mean('nearest'):.2%})  "
            f"most: {worst.path.removeprefix(done.path + '.')} {worst.error:.2%}  left {clock(left)}"
        )


def _counted(base: Base, say: Reporter) -> str:
    """Bits a weight, and what of the blocks stays in floats."""
    from ..modelling.packed import packed

    parts = [p for _, p in packed(base.model)]
    count = sum(p.count for p in parts)
    codes = sum(t.nbytes for p in parts for t in p.stored().values())
    stacks = [base.model.get_submodule(path) for path in base.anatomy.stacks.values()]
    floating = sum(p.numel() for stack in stacks for p in stack.parameters() if p.dim() > 1)
    if floating:
        say.note(f"{floating:,} weights of the blocks stay in floats: a mixture's experts and routers, position tables")
    return f"{count:,} weights of {len(parts)} linears at {codes * 8 / count:.2f} bits"


def _carry(source: Path, output: Path) -> None:
    """A trained head and what is known of it come along."""
    from ..saving.adapter import HEADS, OURS

    if (source / HEADS).is_file() and (source / OURS).is_file():
        shutil.copy2(source / HEADS, output / HEADS)
        known = json.loads((source / OURS).read_text()) | json.loads((output / OURS).read_text())
        (output / OURS).write_text(json.dumps(known, indent=2) + "\n")
