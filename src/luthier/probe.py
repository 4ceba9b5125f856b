"""What is measured on a model at load, instead of assumed: its head, its attention under our function, and packing.

A family that behaves otherwise keeps its own attention and one example a row, or, for the head, is refused: nothing is silently wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import attention
from .anatomy import trunk
from .core import Base, Incompatible, Segments
from .site import Frame, using

LENGTHS = (11, 7)


@torch.no_grad()
def run(base: Base) -> dict[str, Any]:
    """Probe a base in evaluation mode and leave it with the attention that was found right.

    Returns {"head": largest relative difference, "attention": same or None, "packs": bool, "implementation": name}.
    Raises Incompatible where the head is not understood.
    """
    lm = base.model
    own = lm.config._attn_implementation
    examples = _examples(base)
    alone = [_hidden(lm, e[None], None)[0] for e in examples]
    logits = lm(input_ids=examples[0][None], use_cache=False).logits[0]
    head = _difference(base.anatomy.head(lm, alone[0]), logits)
    if head > _tolerance(lm):
        raise Incompatible(
            f"the head of this model ({base.anatomy.family}) makes logits that its hidden states do not explain (difference {head:.2g}); "
            "the family is not supported"
        )
    out: dict[str, Any] = {"head": head, "attention": None, "packs": False, "implementation": own}
    lm.config._attn_implementation = attention.NAME
    try:
        padded = _hidden(lm, torch.nn.utils.rnn.pad_sequence(examples, batch_first=True), _segments(packed=False))
        out["attention"] = max(_difference(padded[i, : len(e)], alone[i]) for i, e in enumerate(examples))
        if out["attention"] <= _tolerance(lm):
            out["implementation"] = attention.NAME
            out["packs"] = _packs(lm, examples, alone)
    except (TypeError, ValueError, RuntimeError) as e:  # a family whose attention does not go through transformers' interface
        out["why"] = str(e).splitlines()[0]
    lm.config._attn_implementation = out["implementation"]
    return out


def _packs(lm: Any, examples: list[Tensor], alone: list[Tensor]) -> bool:
    """Change example 1 of a packed row: example 2 must not move by one bit, and must equal itself alone."""
    other = examples[0].roll(1)
    first, second = (_hidden(lm, torch.cat([e, examples[1]])[None], _segments(packed=True))[0, len(e) :] for e in (examples[0], other))
    return torch.equal(first, second) and _difference(first, alone[1]) <= _tolerance(lm)


def _hidden(lm: Any, ids_BT: Tensor, segments: Segments | None) -> Tensor:
    positions = None if segments is None else segments.positions((ids_BT.shape[0], ids_BT.shape[1])).to(ids_BT.device)
    with using(Frame(None, segments)):
        return trunk(lm)(input_ids=ids_BT, position_ids=positions, use_cache=False).last_hidden_state


def _segments(*, packed: bool) -> Segments:
    a, b = LENGTHS
    return Segments(torch.tensor([0, 0 if packed else 1]), torch.tensor([0, a if packed else 0]), torch.tensor([a, b]))


def _examples(base: Base) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    vocabulary = base.model.config.get_text_config().vocab_size
    return [torch.randint(0, vocabulary, (n,), generator=g).to(next(base.model.parameters()).device) for n in LENGTHS]


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-6))


def _tolerance(lm: Any) -> float:
    return 1e-4 if next(lm.parameters()).dtype == torch.float32 else 5e-2
