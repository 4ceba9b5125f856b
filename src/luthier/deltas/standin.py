"""Tensors that stand in for a base's own parameters: how a delta changes weights and can still be switched off.

A linear, a norm, an embedding or a mixture's experts read their parameters as ``self.weight``. `stand_in` puts a property of that name in front of the
parameter: where the delta serves, reading it gives a function of the base's own tensor, else the base's own tensor. The parameter itself never moves and
keeps its place and name, so saving, counting and other deltas see the untouched base. Which delta serves is read from the Frame, as at a Site, so
recomputation under gradient checkpointing sees what its forward saw. A weight serves all rows of a batch, so one batch cannot mix routes here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core import Incompatible
from ..modelling.anatomy import modules
from ..modelling.site import current, members

Value = Callable[[Tensor, bool], Tensor]  # (the base's own tensor, training) -> what stands in for it


@dataclass(frozen=True, eq=False)
class Weight:
    """One parameter of the base with every module that holds it: a tied tensor is one Weight."""

    tensor: nn.Parameter
    holders: tuple[tuple[nn.Module, str], ...]  # module and attribute
    names: tuple[str, ...]  # "model.embed_tokens.weight"; the first is its own name

    @property
    def key(self) -> str:
        """ "<module path>:<attribute>", as in Delta.params."""
        path, _, leaf = self.names[0].rpartition(".")
        return f"{path}:{leaf}"

    def put(self, name: str, value: Value) -> None:
        """Let ``value`` stand in, wherever the tensor is held, for forwards that the delta ``name`` serves."""
        for module, leaf in self.holders:
            stand_in(module, leaf, name, value)

    def leave(self, name: str) -> None:
        """Undo `put`."""
        for module, leaf in self.holders:
            step_aside(module, leaf, name)

    @torch.no_grad()
    def fold(self, name: str) -> None:
        """Write what stands in into the base's own tensor, and stop standing in."""
        module, leaf = self.holders[0]
        self.tensor.copy_(module.__dict__[_TABLE][leaf][name](self.tensor, False))
        self.leave(name)


def weights(model: nn.Module) -> Iterator[Weight]:
    """Every parameter of the untouched base in model order, tied tensors once."""
    found: dict[nn.Parameter, list[tuple[str, nn.Module, str]]] = {}
    for path, module in modules(model):
        for leaf, tensor in module._parameters.items():
            if tensor is not None:
                found.setdefault(tensor, []).append((f"{path}.{leaf}" if path else leaf, module, leaf))
    for tensor, held in found.items():
        yield Weight(tensor, tuple((m, leaf) for _, m, leaf in held), tuple(name for name, _, _ in held))


_TABLE, _ROUTE = "_stand_ins", "_stand_in_route"


def stand_in(module: nn.Module, leaf: str, name: str, value: Value) -> None:
    """Let ``value`` stand in for ``module``'s parameter ``leaf`` where the delta ``name`` serves. Several deltas of a route apply in its order."""
    if _TABLE not in module.__dict__:
        own = type(module)
        # A class of its own, called as before: families are told by class names, and linears by isinstance.
        module.__class__ = type(own.__name__, (own,), {"__module__": own.__module__, "__doc__": own.__doc__})
        module.__dict__[_TABLE] = {}
    setattr(type(module), leaf, property(lambda m, leaf=leaf: _read(m, leaf)))  # type: ignore[misc]
    module.__dict__[_TABLE].setdefault(leaf, {})[name] = value


def step_aside(module: nn.Module, leaf: str, name: str) -> None:
    """Undo `stand_in`; the last one gives the module its own class back."""
    table = module.__dict__[_TABLE]
    del table[leaf][name]
    if not any(table.values()):
        del module.__dict__[_TABLE]
        module.__dict__.pop(_ROUTE, None)
        module.__class__ = type(module).__bases__[0]


def use(model: nn.Module, route: str | None) -> None:
    """What serves forwards that run outside any frame."""
    for module in model.modules():
        if _TABLE in module.__dict__:
            module.__dict__[_ROUTE] = route


def _read(module: Any, leaf: str) -> Tensor:
    tensor, table = module._parameters[leaf], module.__dict__.get(_TABLE, {}).get(leaf)
    frame = current()
    route = module.__dict__.get(_ROUTE) if frame is None else frame.route
    if not table:
        return tensor
    wanted = {tuple(n for n in members(r) if n in table) for r in (route if isinstance(route, tuple) else (route,))}
    if len(wanted) > 1:
        named = ", ".join(sorted({n for names in wanted for n in names}))
        raise Incompatible(
            f"the delta {named} changes the base's own weights, which all examples of one batch share, so it serves a whole batch or none of it; "
            "give it batches of its own"
        )
    for name in next(iter(wanted)):
        tensor = table[name](tensor, module.training)
    return tensor
