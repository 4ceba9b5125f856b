"""What is measured on a model at load, instead of assumed: its head, its attention under our function, padding and packing.

A family that behaves otherwise keeps its own attention and one example a row, or, for the head, is refused: nothing is silently wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..core import Base, Incompatible, Segments
from . import attention
from .anatomy import attentions, configs, trunk
from .site import Frame, using

LENGTHS = (11, 7)
FIRST = torch.tensor([-1, 0, 0])  # the second and the third segment go on from the first


@torch.no_grad()
def run(base: Base) -> dict[str, Any]:
    """Probe a base in evaluation mode and leave it with the attention that was found right.

    Returns {"head": largest relative difference, "attention": same, of a padded batch to each example alone, or None, "packs": bool,
    "shares": bool, "implementation": name}, and "why" where attention stayed the model's own. Encoder-decoders keep one example a row.
    Raises Incompatible where the head is not understood.
    """
    lm, seq2seq = base.model, base.anatomy.kind == "encoder_decoder"
    examples = _examples(base)
    alone = [_seq2seq(lm, [e])[0] if seq2seq else _hidden(lm, e[None])[0] for e in examples]
    out: dict[str, Any] = {"head": _head(base, examples[0], alone[0]), "attention": None, "packs": False, "shares": False}
    own = {id(c): c._attn_implementation for c in configs(lm)}
    use(lm, attention.NAME)
    try:
        missed = {a.path for a in attentions(lm)} - _reached(base, examples[0])
        if missed:
            raise Incompatible(f"{sorted(missed)[0]} attends by itself")
        padded = _seq2seq(lm, examples) if seq2seq else _hidden(lm, pad_sequence(examples, batch_first=True), _segments(packed=False), _first(base))
        out["attention"] = max(_difference(padded[i, : len(e)], alone[i]) for i, e in enumerate(examples))
        if out["attention"] > _tolerance(lm):
            raise Incompatible(f"padding changes hidden states under our attention (difference {out['attention']:.2g})")
        out["packs"] = not seq2seq and _packs(lm, examples, alone, _first(base))
        out["shares"] = out["packs"] and base.anatomy.kind == "decoder" and _shares(lm, examples, _first(base))
    except (Incompatible, TypeError, ValueError, RuntimeError) as e:  # a family whose attention does not go through transformers' interface
        out["why"] = str(e).splitlines()[0]
        for c in configs(lm):
            c._attn_implementation = own[id(c)]
    out["implementation"] = lm.config._attn_implementation
    return out


def use(lm: Any, implementation: str) -> None:
    """Make every part of a model attend by this function; T5's stacks have configurations of their own."""
    for c in configs(lm):
        c._attn_implementation = implementation


def _head(base: Base, ids: Tensor, hidden: Tensor) -> float:
    """Difference of the head we make from hidden states to the model's own logits, which may be no more than rounding."""
    lm = base.model
    more = {"decoder_input_ids": ids[None]} if base.anatomy.kind == "encoder_decoder" else {}
    logits = lm(input_ids=ids[None], use_cache=False, **more).logits[0]
    head = _difference(base.anatomy.head(lm, hidden), logits)
    if head > _tolerance(lm):
        bias = getattr(lm, "final_logits_bias", None)
        biased = bias is not None and bool(bias.any())
        raise Incompatible(
            f"the head of this model ({base.anatomy.family}) makes logits that its hidden states do not explain (difference {head:.2g}); "
            + ("it adds a bias of its own to each token's, final_logits_bias, which is not supported" if biased else "the family is not supported")
        )
    return head


def _reached(base: Base, ids: Tensor) -> set[str]:
    """Paths of the attentions that call our function in a forward."""
    positions = torch.arange(len(ids), device=ids.device) + _first(base)
    found = attention.keys_and_values(base.model, ids, positions)
    return {a.path for a in attentions(base.model) if a.module in found}


def _packs(lm: Any, examples: list[Tensor], alone: list[Tensor], first: int) -> bool:
    """Change example 1 of a packed row: example 2 must not move by one bit, and must equal itself alone."""
    other = examples[0].roll(1)
    one, two = (_hidden(lm, torch.cat([e, examples[1]])[None], _segments(packed=True), first)[0, len(e) :] for e in (examples[0], other))
    return torch.equal(one, two) and _difference(one, alone[1]) <= _tolerance(lm)


def _shares(lm: Any, examples: list[Tensor], first: int) -> bool:
    """Let two texts go on from one beginning: changing one must not move the other by one bit, and that must equal itself with the beginning, alone."""
    (before, after), n = examples, 3
    segments = Segments(torch.zeros(3).long(), torch.tensor([0, len(before), len(before) + n]), torch.tensor([len(before), n, len(after)]), (), FIRST)
    one, two = (_hidden(lm, torch.cat([before, e, after])[None], segments, first)[0, len(before) + n :] for e in (before[:n], before[-n:]))
    alone = _hidden(lm, torch.cat([before, after])[None])[0, len(before) :]
    return torch.equal(one, two) and _difference(one, alone) <= _tolerance(lm)


def _hidden(lm: Any, ids_BT: Tensor, segments: Segments | None = None, first: int = 0) -> Tensor:
    """Hidden states; with no segments everything is left to the model, its positions too."""
    where = {} if segments is None else {"position_ids": (segments.positions((ids_BT.shape[0], ids_BT.shape[1])) + first).to(ids_BT.device)}
    with using(Frame(None, segments)):
        return trunk(lm)(input_ids=ids_BT, use_cache=False, **where).last_hidden_state


def _seq2seq(lm: Any, examples: list[Tensor]) -> Tensor:
    """The decoder's hidden states where example s answers itself; several are padded on both sides, under transformers' masks."""
    ids_BT = pad_sequence(examples, batch_first=True)
    seen_BT = None if len(examples) == 1 else pad_sequence([torch.ones_like(e) for e in examples], batch_first=True)
    with using(Frame(None, None)):
        encoded = lm.get_encoder()(input_ids=ids_BT, attention_mask=seen_BT).last_hidden_state
        more = {"encoder_hidden_states": encoded, "encoder_attention_mask": seen_BT, "use_cache": False}
        return lm.get_decoder()(input_ids=ids_BT, attention_mask=seen_BT, **more).last_hidden_state


def _segments(*, packed: bool) -> Segments:
    a, b = LENGTHS
    return Segments(torch.tensor([0, 0 if packed else 1]), torch.tensor([0, a if packed else 0]), torch.tensor([a, b]))


def _examples(base: Base) -> list[Tensor]:
    """Random tokens; none is padding, by which RoBERTa would count its positions."""
    g = torch.Generator().manual_seed(0)
    config = base.model.config.get_text_config()
    usual = torch.tensor([i for i in range(config.vocab_size) if i != getattr(config, "pad_token_id", None)])
    return [usual[torch.randint(0, len(usual), (n,), generator=g)].to(next(base.model.parameters()).device) for n in LENGTHS]


def _first(base: Base) -> int:
    return base.anatomy.first_position


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-6))


def _tolerance(lm: Any) -> float:
    return 1e-4 if next(lm.parameters()).dtype == torch.float32 else 5e-2
