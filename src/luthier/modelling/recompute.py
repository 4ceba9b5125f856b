"""Which blocks compute their activations again in the backward instead of keeping them: none, all, or the first few, as many as memory asks for.

Chen et al., 2016, arXiv 1604.06174, with the blocks as segments; transformers' own layers do it. A block that is computed again costs its forward once more, a
quarter to a third of its time, and keeps only its input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ..core import Incompatible
from .anatomy import modules
from .site import Site, restoring

Recompute = str | int  # none, blocks, or how many


def blocks_of(lm: Any, stacks: Iterable[str]) -> list[Any]:
    """All blocks in the order in which they run, without the sites around them."""
    everything: Any = dict(modules(lm))
    return [b.base if isinstance(b, Site) else b for path in stacks for b in everything[path]]


def enable(lm: Any, stacks: Iterable[str], which: Recompute) -> None:
    """Set a model to compute so many blocks again. Raises Incompatible for more blocks than there are, or where the family cannot do it block by block."""
    if which == "none":
        return
    found = blocks_of(lm, stacks)
    if isinstance(which, int) and which > len(found):
        raise Incompatible(f"recompute: found {which}, and this model has {len(found)} blocks; accepted are none, blocks, or 1 to {len(found)}")
    lm.activation_checkpointing_enable({"use_reentrant": False, "context_fn": restoring})
    if isinstance(which, int):
        if not all(hasattr(b, "gradient_checkpointing") for b in found):
            disable(lm)
            raise Incompatible(f"recompute: the blocks of this family ({type(lm).__name__}) cannot be told apart here; use recompute=blocks")
        for block in found[which:]:
            block.gradient_checkpointing = False


def disable(lm: Any) -> None:
    """Keep all activations again."""
    lm.activation_checkpointing_disable()


@contextmanager
def recomputing(lm: Any, stacks: Iterable[str], which: Recompute) -> Iterator[None]:
    """The same for a while."""
    enable(lm, stacks, which)
    try:
        yield
    finally:
        if which != "none":
            disable(lm)
