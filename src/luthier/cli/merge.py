"""luthier merge: an adapter written into its base, as one plain model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    adapter: Annotated[Path, typer.Argument(help="An adapter's or a run's folder.")],
    output: Annotated[Path, typer.Option(help="The new model folder.")],
    model: Annotated[str | None, typer.Option(help="The adapter's base, where it is not where the adapter says.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16: what the merged weights are rounded to.")] = "float32",
) -> None:
    """Merge: the result opens in plain transformers; logits before and after are compared and the largest difference is printed."""
    merged(adapter, output, model, dtype)


def merged(adapter: Path, output: Path, model: str | None, dtype: str) -> None:
    """Merge and say what was compared."""
    from ..errors import LuthierError
    from ..opening import load
    from ..plugins import kinds

    if dtype not in kinds("precision"):
        raise LuthierError(f"--dtype: {dtype!r} is not one of {', '.join(kinds('precision'))}")
    if not adapter.is_dir():
        raise LuthierError(f"{adapter}: no such folder; name an adapter's or a run's folder")
    if output.exists() and any(output.iterdir()):
        raise LuthierError(f"{output}: exists and is not empty; choose another --output")
    from ..merging import merge

    policy = load(adapter, model=model, precision=dtype)
    done = merge(policy, output)
    typer.echo(f"merged into {done.folder} in {done.dtype}")
    typer.echo(f"  logits at {done.positions} probe positions: folding moved them by {done.folded:.1e} of the largest;")
    typer.echo(f"  opened by plain transformers, the folder gives them within {done.reopened:.1e}")
    typer.echo(f"  likeliest next token: {'the same everywhere' if done.same_greedy else 'differs somewhere (a near tie within rounding)'}")
