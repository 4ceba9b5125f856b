"""luthier combine: several LoRA adapters of one base as one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from . import heavy


def command(
    parts: Annotated[list[str], typer.Argument(metavar="FOLDER=WEIGHT ...", help="Adapters' or runs' folders with their weights: runs/formal=0.7.")],
    to: Annotated[Path, typer.Option(help="The new adapter folder.")],
    how: Annotated[
        Literal["linear", "ties", "dare"], typer.Option(help="linear: the weighted sum. ties: the largest entries that agree in sign. dare: random entries.")
    ] = "linear",
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the result. Default: exact for linear, else the largest of the parts'.")] = None,
    density: Annotated[float | None, typer.Option(help="Of ties and dare: the share of entries that is kept. Default: 0.2 and 0.1.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of dare: what is dropped.")] = 0,
) -> None:
    """Combine: `luthier combine runs/formal=0.7 runs/short=0.3 --to both/`; the result is an adapter like any other."""
    heavy("saving.combining")
    from ..errors import LuthierError
    from ..saving.combining import combine

    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise LuthierError(f"{to}: exists and is not empty; choose another --to")
    done = combine([_part(p) for p in parts], to, how=how, rank=rank, density=density, seed=seed)
    lost = f"; the rank cuts off {done.lost:.1%} of the change" if done.lost > 5e-5 else ""
    typer.echo(f"{done.folder}: {done.modules} modules, rank {done.rank}{lost}")


def _part(said: str) -> tuple[Path, float]:
    from ..errors import LuthierError

    folder, equals, weight = said.rpartition("=")
    try:
        return (Path(folder), float(weight)) if equals else (Path(said), 1.0)
    except ValueError:
        raise LuthierError(f"{said}: say FOLDER=WEIGHT, the weight a number, for example runs/formal=0.7") from None
