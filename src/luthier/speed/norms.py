"""RMSNorm by a row kernel: one pass forward and one back where transformers' takes seven and fifteen, and only x is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .compiled import RowKernels
from .form import Form
from .rows import Rms
from .selftest import at_hand, differs


class Normed(Form):
    """Stands in for a norm's forward. A stand-in for its weight, tensors that the kernel does not take: the norm's own."""

    def __init__(self, module: nn.Module, plus_one: bool, run: RowKernels):
        super().__init__(module)
        self.plus_one, self.run = plus_one, run

    def faster(self, x: Tensor) -> Tensor | None:
        weight: Any = self.module._parameters["weight"]
        if type(self.module) is not self.kind or not self.run.fits(x, weight):
            return None
        return Rms.apply(x, weight, epsilon(self.module), self.plus_one, self.run)  # type: ignore[no-any-return]


def epsilon(module: nn.Module) -> float | None:
    """What is added to the mean square, under the names that families give it."""
    return next((e for name in ("variance_epsilon", "eps") if isinstance(e := getattr(module, name, None), float)), None)


def found(lm: nn.Module) -> Iterator[nn.Module]:
    """The norms that may be RMSNorms (T5 calls its own LayerNorm): one weight and no bias, one epsilon."""
    for module in lm.modules():
        own = "Norm" in type(module).__name__ and not hasattr(type(module), "weight")  # no property stands in for its weight
        if own and list(module._parameters) == ["weight"] and epsilon(module) and "forward" not in module.__dict__:
            yield module


def install(policy: Any, run: RowKernels) -> int:
    """Give every RMSNorm that is found equal the kernel. Returns how many."""
    put, tested = 0, {}
    for module in found(policy.lm):
        weight: Any = module._parameters["weight"]
        if type(module) not in tested:
            tested[type(module)] = next((one for one in (False, True) if _equals(module, weight, Normed(module, one, run))), None)
        if (plus_one := tested[type(module)]) is not None:
            Normed(module, plus_one, run).put()
            put += 1
    return put


def _equals(module: nn.Module, weight: Tensor, form: Normed) -> bool:
    if weight.is_meta:
        return form.plus_one == ("Gemma" in type(module).__name__)  # memory is the same either way

    def faster(x: Tensor) -> list[Tensor]:
        if (y := form.faster(x)) is None:
            raise RuntimeError("the faster form declines")
        return [y]

    with at_hand([module]):
        weight = module._parameters["weight"]  # type: ignore[assignment]
        return not differs(lambda x: [module(x)], faster, [module] if weight.requires_grad else [], len(weight), weight.dtype, weight.device)
