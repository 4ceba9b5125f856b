"""Weights laid out for the products of a few rows, for as long as answers are sampled.

A decoding step multiplies few rows by every weight. On a CPU torch lays a weight out anew in each of these products, which takes about as long as the product;
here it is laid out once, as oneDNN's own products read it, and weights in codes are decoded once. Results differ by rounding only. The copies are as large as
the weights, so they are made where memory allows and enough tokens are to come, and are dropped at the end: weights may have moved by the next time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from ..modelling.packed import PackedLinear
from . import lean

STEPS = 16  # from how many tokens on it pays: laying out took as long as the products of 6 (bfloat16) to 13 (float32) tokens save
MEMORY_SHARE = 0.125  # of the machine's, at most; not of what is free, so that a run computes the same bits when it is resumed
ROWS = 32  # what the layout is chosen for


@contextmanager
def products(lm: Any, tokens: int) -> Iterator[None]:
    """Let what decoding uses multiply by weights that are laid out for it, where enough ``tokens`` are to come; afterwards all is as it was."""
    changed: list[nn.Module] = []
    try:
        if tokens >= STEPS:
            _lay_out(lm, changed)
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]


@torch.no_grad()
def _lay_out(lm: Any, changed: list[nn.Module]) -> None:
    """Give blocks and linears a forward of their own. Weights stay as they are where memory or this build of torch does not allow a copy."""
    dtype = next(lm.parameters()).dtype
    linears = {m for m in _decoder(lm) if _plain(m) and _on_cpu(m)} if size(lm) and _supported(dtype) else set()

    def merged(parts: Sequence[Any]) -> Callable[[Tensor], Tensor] | None:
        if not linears.issuperset(parts) or len({dtype if isinstance(m, PackedLinear) else m.weight.dtype for m in parts}) > 1:
            return None
        linears.difference_update(parts)
        return _product(parts, dtype)

    def apart(modules: Iterable[Any]) -> None:
        for module in modules:
            module.__dict__["forward"] = _product([module], dtype)
            changed.append(module)

    for block in lean.usual(lm) if not lm.config.is_encoder_decoder else ():
        block.__dict__["forward"] = lean.Lean(block, merged, apart)
        changed.append(block)
    apart(linears)


def size(lm: Any) -> int:
    """Bytes that laid-out weights take beside a model on a CPU; 0 where they are too many, and weights stay as they are."""
    numbers = sum(_shape(m)[0] * _shape(m)[1] for m in _decoder(lm) if _plain(m))
    wanted = numbers * next(lm.parameters()).element_size()
    return wanted if wanted <= MEMORY_SHARE * whole_memory() else 0


def whole_memory() -> int:
    """Bytes of memory of this machine, or of the container this runs in."""
    everything = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")
    return min(everything, int(text)) if limit.is_file() and (text := limit.read_text().strip()).isdigit() else everything


def _decoder(lm: Any) -> Iterator[nn.Module]:
    part = lm.get_decoder() if lm.config.is_encoder_decoder else lm.base_model
    yield from {id(m): m for m in [*part.modules(), *lm.get_output_embeddings().modules()]}.values()


def _plain(module: nn.Module) -> bool:
    """A linear of the usual classes that nothing has changed, its weight its own."""
    if "forward" in module.__dict__:
        return False
    if isinstance(module, PackedLinear):
        return type(module).forward is PackedLinear.forward
    return type(module) is nn.Linear or (type(module).__name__ == "Conv1D" and not hasattr(type(module), "weight"))  # no property stands in for its weight


def _on_cpu(module: Any) -> bool:
    weights = list(module.stored().values()) if isinstance(module, PackedLinear) else [module.weight]
    return all(w.device.type == "cpu" for w in weights) and (isinstance(module, PackedLinear) or module.weight.dtype in (torch.float32, torch.bfloat16))


def _shape(module: Any) -> tuple[int, int]:
    return (module.out_features, module.in_features) if isinstance(module, PackedLinear) else tuple(module.weight.shape)


def _supported(dtype: torch.dtype) -> bool:
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    try:
        w = torch.eye(16, dtype=dtype)
        laid_out = torch.ops.mkldnn._reorder_linear_weight(w, ROWS)
        return torch.equal(torch.ops.mkldnn._linear_pointwise(w, laid_out, None, "none", [], ""), w)
    except (RuntimeError, AttributeError):
        return False


def _weight(module: Any, dtype: torch.dtype) -> Tensor:
    """(out, in)"""
    if isinstance(module, PackedLinear):
        return module.dense(dtype)
    weight = module.weight.detach()
    return weight.t() if type(module).__name__ == "Conv1D" else weight


def _product(modules: Sequence[Any], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The outputs of linears that read the same input, one behind the other."""
    weight = torch.cat([_weight(m, dtype) for m in modules]) if len(modules) > 1 else _weight(modules[0], dtype).contiguous()
    biases = [m.bias.detach().to(weight.dtype) if m.bias is not None else weight.new_zeros(_shape(m)[0]) for m in modules]
    bias = torch.cat(biases) if any(m.bias is not None for m in modules) else None
    laid_out, dtype = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS), weight.dtype
    product, own = torch.ops.mkldnn._linear_pointwise, [type(m).forward for m in modules]

    def forward(x: Tensor) -> Tensor:
        if x.dtype == dtype:
            return product(x, laid_out, bias, "none", [], "")
        return torch.cat([f(m, x) for f, m in zip(own, modules, strict=True)], -1)

    return forward
