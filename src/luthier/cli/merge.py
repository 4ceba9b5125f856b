"""luthier merge: an adapter written into its base, as one plain model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from . import heavy

CODES = ("nf4", "int8", "gptq")


def command(
    adapter: Annotated[Path, typer.Argument(help="An adapter's or a run's folder; or a model in codes, to write it out in floats.")],
    output: Annotated[Path, typer.Option(help="The new model folder.")],
    model: Annotated[str | None, typer.Option(help="The adapter's base, where it is not where the adapter says.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16: what the merged weights are rounded to.")] = "float32",
    into: Annotated[
        Literal["trained", "float"],
        typer.Option(
            help="For an adapter trained on a base in codes (nf4, int8, gptq). trained: the values of those codes, so that the result is the model that was "
            "trained. float: the weights the codes were made from; another model, and the difference is measured."
        ),
    ] = "trained",
    quantize: Annotated[
        str | None, typer.Option(help="Store the result in codes again: nf4, int8 or gptq. It is then no longer exact; the loss is said.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="Held-out rows on which losses are compared. Default: those of the run, and general text.")] = None,
) -> None:
    """Merge: the result opens in plain transformers; logits before and after are compared and the largest difference is printed."""
    merged(adapter, output, model, dtype, into=into, quantize=quantize, data=data)


def merged(
    adapter: Path, output: Path, model: str | None, dtype: str, *, into: str = "trained", quantize: str | None = None, data: list[str] | None = None
) -> None:
    """Merge and say what was compared."""
    heavy("opening")
    from ..errors import LuthierError
    from ..opening import load

    if dtype not in ("float32", "bfloat16"):
        raise LuthierError(f"--dtype: {dtype!r} is not one of float32, bfloat16")
    if quantize is not None and quantize not in CODES:
        raise LuthierError(f"--quantize: {quantize!r} is not one of {', '.join(CODES)}")
    if not adapter.is_dir():
        raise LuthierError(f"{adapter}: no such folder; name an adapter's or a run's folder")
    if output.exists() and any(output.iterdir()):
        raise LuthierError(f"{output}: exists and is not empty; choose another --output")
    import torch

    from ..saving.adapter import artefact
    from ..saving.merging import foldable, merge
    from ..settings.plugins import kind_of

    folder = artefact(adapter) or adapter
    policy = load(adapter, model=model, precision=_opened_in(folder, model, dtype))
    foldable(policy)
    codes = kind_of(policy.base.precision) if policy.base.precision.packed else None
    if into == "float" and codes is None:
        raise LuthierError("--into float: this adapter's base is in floats, so there is nothing to choose; leave --into out")
    run = _run_of(adapter, data)
    if into == "float":
        policy = _into_float(policy, folder, dtype, run)
    plain = output if quantize is None else output.with_name(output.name + "-float")
    done = merge(policy, plain, dtype=getattr(torch, dtype))
    typer.echo(f"merged into {done.folder} in {done.dtype}")
    if done.codes is not None:
        typer.echo(f"  the base's {codes} codes were written out as the values they stand for; computing with these in {done.dtype} moves the logits by")
        typer.echo(f"  {done.codes:.1e} of the largest: the rounding of what is computed, for the weights are equal")
    typer.echo(f"  logits at {done.positions} probe positions: folding moved them by {done.folded:.1e} of the largest;")
    typer.echo(f"  opened by plain transformers, the folder gives them within {done.reopened:.1e}")
    typer.echo(f"  likeliest next token: {'the same everywhere' if done.same_greedy else 'differs somewhere (a near tie within rounding)'}")
    if quantize is not None:
        from .quantize import again

        again(plain, output, quantize, run)


def _opened_in(folder: Path, model: str | None, dtype: str) -> str:
    """The precision to open an adapter's base in: "auto" where it is in codes, else the dtype of the result."""

    from ..hub import locate
    from ..quantising.codes import stored_in
    from ..saving.adapter import describe, is_adapter, packed_precision
    from ..settings.run import Model

    if packed_precision(folder) is not None:
        return "auto"
    if not is_adapter(folder):
        return "auto" if stored_in(folder) else dtype
    config, ours = describe(folder)
    source = model or (ours.get("base") or {}).get("source") or config.get("base_model_name_or_path")
    return "auto" if source and stored_in(locate(Model(id=source), weights=False)) else dtype


def _run_of(adapter: Path, data: list[str] | None) -> Any:
    """The run whose held-out rows losses are compared on: of these files, or the one that made the adapter; without data where neither is there."""
    from ..settings.config import load_run
    from ..settings.run import Data, Run

    if data:
        return Run(data=Data(train=tuple(data), validation=tuple(data)))
    made = next((f for f in (adapter / "run.yaml", adapter.parent / "run.yaml") if f.is_file()), None)
    return load_run(made) if made is not None else Run()


def _into_float(trained: Any, folder: Path, dtype: str, run: Any) -> Any:
    """The delta on the floats that its base's codes were made from, and what that changes, said."""
    from ..measuring.measure import beside, once
    from ..opening import on_floats
    from ..saving.merging import compare

    policy = on_floats(trained, folder, precision=dtype)
    difference, same = compare(trained, policy)
    typer.echo("into the weights its base's codes were made from, which is not the model that was trained:")
    typer.echo(f"  logits differ by {difference:.1e} of the largest; likeliest next token: {'the same everywhere' if same else 'differs somewhere'}")
    for line in beside({"as trained": once(trained, run), "into float": once(policy, run)}):
        typer.echo(line)
    return policy
