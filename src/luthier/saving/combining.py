"""Several LoRA deltas of one base, weighted, as one: from their folders, without the base.

- linear: the sum of w_i s_i B_i A_i, exactly, as one pair of the sum of the ranks: B = [w_1 s_1 B_1, w_2 s_2 B_2, ...], A below one another.
- ties: TIES (Yadav et al., 2023, arXiv 2306.01708, section 3): of each change the ``density`` largest entries are kept; for each entry the sign with more
  mass over all changes is elected; the weighted mean of those that have it is taken.
- dare: DARE (Yu et al., 2023, arXiv 2311.03099, section 3): of each change entries are dropped at random, a share of ``density`` is kept and divided by
  it; then the weighted sum is taken.

How it differs from the papers:
1. Both work on the dense changes of single matrices, not on one vector of all parameters; the result is brought back to a rank by the singular value
   decomposition, and what that loses is reported.
2. In ties the weights multiply what is averaged and not what elects the sign, as in PEFT; the paper has one factor for all.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .. import __version__, atomic
from ..core import LuthierError
from ..deltas.layout import exactly
from ..deltas.lowrank import Pair, best, from_peft, to_peft
from . import adapter

How = Literal["linear", "ties", "dare"]
DENSITY = {"ties": 0.2, "dare": 0.1}  # the papers': the largest 20 %; nine of ten dropped
DENSE = 1024  # above, a randomised decomposition: a full one of a 4096 x 4096 matrix takes half a minute


@dataclass
class Combined:
    """What was written."""

    folder: Path
    modules: int
    rank: int  # the largest
    lost: float  # norm of what the ranks cut off, relative to the norm of the whole change


def combine(
    parts: Sequence[tuple[Path, float]], folder: Path, *, how: How = "linear", rank: int | None = None, density: float | None = None, seed: int = 0
) -> Combined:
    """Write one LoRA adapter folder from weighted ones.

    ``rank``: of the result; default: what linear needs to be exact, the largest of the parts' for the others. ``density``: the share of entries that ties
    and dare keep (0.2 and 0.1). ``seed``: what dare drops. Raises LuthierError for fewer than two parts, adapters of different bases, and what is
    no plain LoRA.
    """
    if len(parts) < 2:
        raise LuthierError(f"combining takes at least two adapters, found {len(parts)}")
    if rank is not None and rank < 1:
        raise LuthierError(f"--rank: must be at least 1, found {rank}")
    if density is not None and (how == "linear" or not 0 < density <= 1):
        raise LuthierError(f"--density: {'linear keeps every entry' if how == 'linear' else f'must be above 0 and at most 1, found {density:g}'}")
    read = [_read(path) for path, _ in parts]
    _one_base(parts, [ours for _, ours, _ in read])
    paths = list(dict.fromkeys(p for _, _, pairs in read for p in pairs))
    paths.sort(key=lambda p: not any(p in pairs and pairs[p].embedding for _, _, pairs in read))  # embeddings first, their other uses after them
    made: dict[str, Pair] = {}
    lost = total = 0.0
    for number, path in enumerate(paths):
        first = _first_use(path, made, [pairs for _, _, pairs in read])
        if first is not None:
            made[path] = made[first].again(embedding=next(pairs[path].embedding for _, _, pairs in read if path in pairs))
            continue
        here = [(pairs[path], weight, i) for i, ((_, weight), (_, _, pairs)) in enumerate(zip(parts, read, strict=True)) if path in pairs]
        if how == "linear":
            pair = concatenated([(p, w) for p, w, _ in here])
            if rank is not None and rank < pair.rank:
                pair, cut, size = truncated(pair, rank)
                lost, total = lost + cut**2, total + size**2
        else:
            changes = [p.scale * (p.b.float() @ p.a.float()) for p, _, _ in here]
            weights = [w for _, w, _ in here]
            kept = density or DENSITY[how]
            dense = ties(changes, weights, kept) if how == "ties" else dare(changes, weights, kept, [_seed(seed, i, number) for _, _, i in here])
            pair, cut, size = decomposed(dense, rank or max(p.rank for p, _, _ in here), here[0][0].embedding)
            lost, total = lost + cut**2, total + size**2
        made[path] = pair
    _write(folder, parts, read[0][0], read[0][1], made, how, density)
    return Combined(folder, len(made), max(p.rank for p in made.values()), math.sqrt(lost / total) if total else 0.0)


# --- the changes ----------------------------------------------------------------------------------------------------


def concatenated(parts: Sequence[tuple[Pair, float]]) -> Pair:
    """The weighted sum as one pair; exact."""
    a = torch.cat([p.a.float() for p, _ in parts])
    b = torch.cat([p.b.float() * (w * p.scale) for p, w in parts], 1)
    return Pair(a, b, 1.0, parts[0][0].embedding)


def truncated(pair: Pair, rank: int) -> tuple[Pair, float, float]:
    """(the best pair of a lower rank, norm of what is lost, norm of the whole), without the dense change: two QR decompositions and a small SVD."""
    qb, rb = torch.linalg.qr(pair.scale * pair.b.float())
    qa, ra = torch.linalg.qr(pair.a.float().t())
    core = rb @ ra.t()
    a, b = best(core, rank)
    s = torch.linalg.svdvals(core)
    return Pair((a @ qa.t()).contiguous(), (qb @ b).contiguous(), 1.0, pair.embedding), float(s[rank:].norm()), float(s.norm())


def decomposed(dense: Tensor, rank: int, embedding: bool = False) -> tuple[Pair, float, float]:
    """(the best pair of a rank for a dense change (out, in), norm of what is lost, norm of the whole)."""
    rank = min(rank, *dense.shape)
    if min(dense.shape) <= DENSE:
        a, b = best(dense, rank)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(dense, q=min(2 * rank + 16, *dense.shape), niter=6)
        root = s[:rank].sqrt()
        a, b = root[:, None] * v.t()[:rank], u[:, :rank] * root
    a, b = a.contiguous(), b.contiguous()
    return Pair(a, b, 1.0, embedding), float((dense - b @ a).norm()), float(dense.norm())


def ties(changes: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Trim, elect a sign for each entry, and average those that have it."""
    trimmed = torch.stack([_largest(c, density) for c in changes])
    sign = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
    agree = trimmed.sign() == sign
    weighted = torch.stack([w * t for w, t in zip(weights, trimmed, strict=True)])
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(change: Tensor, density: float) -> Tensor:
    """A change with all but its largest entries set to 0."""
    flat = change.flatten()
    top = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, top, flat[top]).view_as(change)


def dare(changes: Sequence[Tensor], weights: Sequence[float], density: float, seeds: Sequence[int]) -> Tensor:
    """Drop at random, rescale what is left, and add."""
    out = torch.zeros_like(changes[0])
    for change, weight, seed in zip(changes, weights, seeds, strict=True):
        kept = torch.rand(change.shape, generator=torch.Generator().manual_seed(seed)) < density
        out += weight * change * kept / density
    return out


def _first_use(path: str, made: Mapping[str, Pair], parts: Sequence[Mapping[str, Pair]]) -> str | None:
    """The embedding, done already, whose matrix this module uses again in every part that edits it; None where it is a matrix of its own."""
    here = [pairs for pairs in parts if path in pairs]
    return next((e for e in made if all(e in pairs and pairs[path].repeats(pairs[e]) for pairs in here)), None)


def _seed(seed: int, part: int, module: int) -> int:
    return (seed * 1_000_003 + part) * 1_000_003 + module


# --- folders --------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Pair]]:
    """(PEFT's configuration, ours, pairs) of an adapter's or run's folder."""
    folder = adapter.artefact(path.expanduser())
    if folder is None:
        raise LuthierError(f"{path}: no such folder; name an adapter's or a run's folder")
    config, ours = adapter.describe(folder)
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("modules_to_save"):
        found = (ours.get("method") or {}).get("kind") or config.get("peft_type")
        beside = " with a head" if config.get("modules_to_save") else ""
        raise LuthierError(f"{folder}: only plain LoRA adapters are combined, since only they add up; this is {found}{beside}")
    if (folder / adapter.DELTA).is_file() and any(k.startswith("heads.") for k in adapter.read_tensors(folder / adapter.DELTA)):
        raise LuthierError(f"{folder}: this adapter has a head of its own, and heads do not add up")
    tensors = {k: t for k, t in adapter.read_tensors(folder / adapter.WEIGHTS).items() if ".base_layer." not in k}
    return config, ours | {"folder": str(folder)}, from_peft(config, tensors)


def _one_base(parts: Sequence[tuple[Path, float]], ours: Sequence[Mapping[str, Any]]) -> None:
    known = {
        (o.get("base") or {}).get("hash"): (path, o["base"]["source"]) for (path, _), o in zip(parts, ours, strict=True) if (o.get("base") or {}).get("hash")
    }
    if len(known) > 1:
        said = " and ".join(f"{path} on {source!r}" for path, source in list(known.values())[:2])
        raise LuthierError(f"these adapters were trained on different bases: {said}; only adapters of one base add up")


def _write(
    folder: Path, parts: Sequence[tuple[Path, float]], config: dict[str, Any], ours: dict[str, Any], made: dict[str, Pair], how: How, density: float | None
) -> None:
    """The folder, with all else as in the first part's: its tokenizer, its base."""
    said, tensors = to_peft(made, rank_stabilised=False)
    rank = said["r"]
    method = {
        "kind": "lora",
        "rank": rank,
        "alpha": float(said["lora_alpha"]),
        "ranks": {exactly(p): r for p, r in said["rank_pattern"].items()},
        "alphas": {exactly(p): a for p, a in said["alpha_pattern"].items()},
        "targets": [exactly(p) for p in made],
    }
    recipe = {"how": how, "parts": [{"folder": str(p), "weight": w} for p, w in parts]} | ({"density": density or DENSITY[how]} if how != "linear" else {})
    first = Path(ours.pop("folder"))
    mine = {adapter.CONFIG, adapter.WEIGHTS, adapter.OURS, adapter.DELTA, "README.md"}
    facts = {k: v for k, v in ours.items() if k not in ("training", "method", "luthier")}
    with atomic.folder(folder) as new:
        for file in first.iterdir():
            if file.is_file() and file.name not in mine:
                shutil.copy(file, new / file.name)
        adapter.write(new, config | said | {"lora_dropout": 0.0}, {k: t.cpu().contiguous() for k, t in tensors.items()})
        atomic.as_json(new / adapter.OURS, {"luthier": __version__, "method": method, **facts, "combined": recipe})
