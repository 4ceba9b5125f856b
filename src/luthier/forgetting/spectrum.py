"""The singular spectra of what a run learned: of W' - W for every matrix of a fully trained model, of B A for every module of a LoRA.

The rank that holds 90 % of a change's energy is what a LoRA of that matrix would have needed to hold as much of it; whether it would have found it, and what
the other 10 % are worth, is another question: energy is no loss. Of a LoRA it says how much of the rank it was given is used. A model that was saved in
bfloat16 carries the rounding of its weights in the difference, noise of full rank; how much of the energy that is, is estimated and told.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .. import hub
from ..core import LuthierError
from ..deltas.lowrank import from_peft
from ..nn.spectrum import Spectrum, product_spectrum, rounding_energy, spectrum
from ..saving import adapter
from ..settings.run import Model

SHARE = 0.9
NOISY = 0.1  # of the energy: so much rounding makes ranks say little
Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class Learned:
    """What became of one matrix."""

    name: str  # the module's path
    shape: tuple[int, int]
    spectrum: Spectrum
    given: int | None = None  # the rank of its LoRA
    size: float | None = None  # norm of the change over the norm of the matrix; None of a LoRA, whose base is not read
    rounding: float = 0.0  # energy of rounding the saved weights, expected

    @property
    def kind(self) -> str:
        """The path with the block's number as *."""
        return re.sub(r"\.\d+\.", ".*.", self.name)


@dataclass(frozen=True)
class Row:
    """Matrices of one kind."""

    kind: str
    shape: tuple[int, int]
    matrices: int
    size: float | None  # median
    stable: float  # median stable rank
    typical: int  # median rank for SHARE of the energy
    most: int
    given: int | None


def learned(path: Path, *, base: str | None = None, tick: Tick | None = None) -> list[Learned]:
    """The spectra of a run's or an adapter's folder, in the order of its files. ``base``: of a model, where its base is now, if it has moved.

    Raises LuthierError for a folder that is neither a LoRA (or DoRA) nor a fully trained model, and where the base is not the one that was trained.
    """
    folder = adapter.artefact(path.expanduser())
    if folder is None:
        raise LuthierError(f"{path}: no such folder; name a run's, an adapter's or a trained model's folder")
    found = list(_of_lora(folder) if adapter.is_adapter(folder) else _of_model(folder, base, tick or (lambda done, of: None)))
    if not found:
        raise LuthierError(f"{folder}: no matrix of it was changed, so there is no spectrum")
    return found


def _of_lora(folder: Path) -> Iterator[Learned]:
    config, ours = adapter.describe(folder)
    if config.get("peft_type") != "LORA":
        kind = (ours.get("method") or {}).get("kind") or config.get("peft_type") or "unknown"
        raise LuthierError(f"{folder}: spectra are of LoRA, DoRA and full fine-tuning; this is {kind}, whose change is no matrix beside the base's")
    tensors = {k: t for k, t in adapter.read_tensors(folder / adapter.WEIGHTS).items() if ".lora_" in k}
    for name, pair in from_peft(config, tensors).items():
        yield Learned(name, (len(pair.b), pair.a.shape[1]), product_spectrum(pair.scale * pair.b.float(), pair.a.float()), given=pair.rank)


def _of_model(folder: Path, base: str | None, tick: Tick) -> Iterator[Learned]:
    ours = _ours(folder)
    known = ours.get("base") or {}
    source = hub.locate(Model(id=base or str(known.get("source", "")), revision=None if base else known.get("revision")))
    if known.get("hash") and (found := hub.fingerprint(source)) != known["hash"]:
        raise LuthierError(f"{source}: this base is {found}, and {folder} was trained from {known['hash']}; name the right one with --base")
    before, after = _matrices(source), _matrices(folder)
    names = [n for n in after if n in before]
    if not names:
        raise LuthierError(f"{folder}: none of its matrices has the name of one in {source}; name the base it was trained from with --base")
    for i, name in enumerate(names):
        new, old = _read(after[name], name), _read(before[name], name)
        if new.shape != old.shape:  # tokens were added
            new = new[: len(old), : old.shape[1]]
        change = new.double() - old.double()
        if bool(change.any()):
            found_here = spectrum(change, SHARE)
            size = (found_here.total / float(old.double().square().sum())) ** 0.5
            yield Learned(name.removesuffix(".weight"), (new.shape[0], new.shape[1]), found_here, None, size, rounding_energy(new))
        tick(i + 1, len(names))


def _ours(folder: Path) -> dict[str, Any]:
    path = folder / adapter.OURS
    if not path.is_file():
        raise LuthierError(f"{folder}: no {adapter.OURS} here, so it was not trained by luthier; name a run's folder")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise LuthierError(f"{path}: damaged: {e}; copy the folder again") from None
    return told if isinstance(told, dict) else {}


def _matrices(folder: Path) -> dict[str, Path]:
    """The file of every matrix of a model's folder."""
    out: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as f:
            out |= {k: path for k in f.keys() if len(f.get_slice(k).get_shape()) == 2}  # noqa: SIM118 (no mapping)
    return out


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as f:
        found: Tensor = f.get_tensor(name)
    return found


# --- what it comes to ------------------------------------------------------------------------------------------------------


def table(found: list[Learned]) -> list[Row]:
    """By kind of matrix."""
    groups: dict[tuple[str, tuple[int, int]], list[Learned]] = defaultdict(list)
    for one in found:
        groups[one.kind, one.shape].append(one)
    out = []
    for (kind, shape), some in groups.items():
        ranks, sizes, given = (
            [x.spectrum.rank(SHARE) for x in some],
            [x.size for x in some if x.size is not None],
            [x.given for x in some if x.given is not None],
        )
        stable = median(x.spectrum.stable_rank for x in some)
        out.append(Row(kind, shape, len(some), median(sizes) if sizes else None, stable, round(median(ranks)), max(ranks), max(given, default=None)))
    return out


def common_rank(found: list[Learned], share: float = SHARE) -> int:
    """The least rank that, given to every matrix alike, holds a share of the energy of all changes together."""
    total = sum(x.spectrum.total for x in found)
    known = torch.zeros(max(len(x.spectrum.energies) for x in found), dtype=torch.float64)
    for x in found:
        known[: len(x.spectrum.energies)] += x.spectrum.energies.cpu()
    return Spectrum(known, total).rank(share)


def sentences(found: list[Learned]) -> Iterator[str]:
    """What the spectra say."""
    given = [x.given for x in found if x.given is not None]
    ranks = [x.spectrum.rank(SHARE) for x in found]
    if given:
        most = max(given)
        yield (
            f"90 % of the energy of a change lie in {round(median(ranks))} of its {most} ranks (median over {len(found)} matrices; {min(ranks)} to "
            f"{max(ranks)}); a rank of {common_rank(found)} everywhere would hold 90 % of all changes together"
        )
        return
    inner = [x for x in found if ".*." in x.kind] or found
    yield (
        f"90 % of the energy of a change lie in {round(median(ranks))} ranks (median over {len(found)} matrices; {min(ranks)} to {max(ranks)}); a LoRA on all "
        f"matrices of the blocks would have needed rank {common_rank(inner)} to hold 90 % of theirs together"
    )
    noise = median(x.rounding / x.spectrum.total for x in found)
    if noise > NOISY:
        yield (
            f"the weights were saved rounded, which is about {min(1.0, noise):.0%} of the energy (median) and spreads over all ranks: they are too high; "
            "train with precision=float32 to see the change itself"
        )


def as_json(found: list[Learned]) -> list[Mapping[str, Any]]:
    """One record a matrix, its singular values included."""
    return [
        {
            "matrix": x.name,
            "shape": list(x.shape),
            "given": x.given,
            "relative_size": x.size,
            "rank_90": x.spectrum.rank(SHARE),
            "stable_rank": x.spectrum.stable_rank,
            "energy": x.spectrum.total,
            "rounding_energy": x.rounding,
            "singular_values": [round(float(v) ** 0.5, 8) for v in x.spectrum.energies],
        }
        for x in found
    ]
