"""Exact parameter counts: what trains, by kind of module, next to what full fine-tuning would train there."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .anatomy import features, is_linear
from .policy import Policy
from .site import Site


@dataclass(frozen=True)
class Count:
    """Modules of one kind: their number, and what is trained in each of them."""

    module: str  # path with the block's number as *
    shape: tuple[int, int] | None  # (out, in) of a linear
    modules: int
    trained: int  # in one module
    whole: int  # the module's own parameters


def table(policy: Policy) -> list[Count]:
    """One Count per kind of module that holds trained parameters, in model order."""
    assert policy.delta is not None
    by_path: dict[str, int] = {}
    for key, p in policy.delta.params.items():
        path = key.partition(":")[0]
        by_path[path] = by_path.get(path, 0) + p.numel()
    out: dict[tuple[str, tuple[int, int] | None, int, int], list[str]] = {}
    for path, trained in by_path.items():
        module = policy.lm.get_submodule(path)
        module = module.base if isinstance(module, Site) else module
        n_in, n_out = features(module) if is_linear(module) else (0, 0)
        shape = (n_out, n_in) if is_linear(module) else None
        whole = sum(p.numel() for p in module.parameters(recurse=is_linear(module)))
        kind = (re.sub(r"\.\d+\.", ".*.", path), shape, trained, whole)
        out.setdefault(kind, []).append(path)
    return [Count(name, shape, len(paths), trained, whole) for (name, shape, trained, whole), paths in out.items()]


def total(policy: Policy) -> tuple[int, int]:
    """(trained, all): parameters the optimizer moves, and parameters of the base; a tied tensor counts once."""
    trained = sum(p.numel() for p in policy.trained().values())
    deltas = 0 if policy.method is None or policy.method.edits == "weights" else trained
    return trained, sum(p.numel() for p in policy.lm.parameters()) - deltas


def sentence(c: Count) -> str:
    """ "65,536 against 16,777,216, 256 times fewer" for one module."""
    if c.trained >= c.whole:
        return f"{c.trained:,} (all)"
    ratio = c.whole / c.trained
    return f"{c.trained:,} against {c.whole:,}, {ratio:,.0f} times fewer" if ratio >= 10 else f"{c.trained:,} against {c.whole:,}, {ratio:.1f} times fewer"
