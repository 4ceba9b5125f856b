"""Exact parameter counts: what trains, by kind of module, next to what full fine-tuning would train there."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .modelling.anatomy import features, is_linear, modules, numbers
from .modelling.packed import PackedLinear
from .policy import Policy


@dataclass(frozen=True)
class Count:
    """Modules of one kind: their number, and what is trained in each of them."""

    module: str  # path with the block's number as *; where no module is edited, what the delta calls its tensors ("prefix")
    shape: tuple[int, int] | None  # (out, in) of a linear
    modules: int
    trained: int  # in one module
    whole: int  # the module's own parameters; 0 where no module is edited


def table(policy: Policy) -> list[Count]:
    """One Count per kind of module that holds trained parameters, in model order."""
    assert policy.delta is not None
    by_path: dict[str, int] = {}
    for key, p in policy.delta.params.items():
        path = key.partition(":")[0]
        by_path[path] = by_path.get(path, 0) + p.numel()
    out: dict[tuple[str, tuple[int, int] | None, int, int], list[str]] = {}
    found = dict(modules(policy.lm))
    for path, trained in by_path.items():
        module = found.get(path)
        if module is None:  # virtual tokens
            out.setdefault((path, None, trained, 0), []).append(path)
            continue
        n_in, n_out = features(module) if is_linear(module) else (0, 0)
        shape = (n_out, n_in) if is_linear(module) else None
        whole = numbers(module) if is_linear(module) else sum(p.numel() for p in module.parameters(recurse=False))
        kind = (re.sub(r"\.\d+\.", ".*.", path), shape, trained, whole)
        out.setdefault(kind, []).append(path)
    return [Count(name, shape, len(paths), trained, whole) for (name, shape, trained, whole), paths in out.items()]


def total(policy: Policy) -> tuple[int, int]:
    """(trained, all): parameters the optimizer moves, and parameters of the base with its heads; a tied tensor counts once."""
    parts = [*(m for _, m in modules(policy.lm)), *policy.heads.modules()]
    own = {id(p): p for module in parts for p in module.parameters(recurse=False)}
    linears = [m for m in parts if isinstance(m, PackedLinear)]
    for t in (t for m in linears for t in m.stored().values()):  # parameters themselves where the base is sharded
        own.pop(id(t), None)
    return sum(p.numel() for p in policy.trained().values()), sum(p.numel() for p in own.values()) + sum(m.count for m in linears)


def sentence(c: Count) -> str:
    """ "65,536 against 16,777,216, 256 times fewer" for one module; the number alone where no module is edited."""
    if c.whole == 0:
        return f"{c.trained:,}"
    if c.trained >= c.whole:
        return f"{c.trained:,} (all)"
    ratio = c.whole / c.trained
    return f"{c.trained:,} against {c.whole:,}, {ratio:,.0f} times fewer" if ratio >= 10 else f"{c.trained:,} against {c.whole:,}, {ratio:.1f} times fewer"
