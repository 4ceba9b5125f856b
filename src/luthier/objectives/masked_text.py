"""Hide part of a text and learn to find it again: BERT's masked tokens for encoders, T5's span corruption for encoder-decoders.

Encoders: Devlin et al., 2018, arXiv 1810.04805, section 3.1, task 1: of each row 15 % of the tokens are chosen; of these 80 % become the mask token,
10 % a random token, 10 % stay; the loss is the cross-entropy of the chosen ones, read at their own positions.
Encoder-decoders: Raffel et al., 2019, arXiv 1910.10683, section 3.1.4 and figure 2: 15 % of the tokens in spans of 3 on average; each span becomes one
sentinel in the source, and the answer is the spans, each behind its sentinel, with one more sentinel at the end.

What is hidden is a function of (seed, epoch, row), so every epoch hides something else and a resumed run goes on bit for bit; in evaluation it is a function
of the row alone, so that losses can be compared.

How we differ:
1. Rows are documents in pieces, and there is no next-sentence task (as RoBERTa: Liu et al., 2019, arXiv 1907.11692, section 4.2).
2. Exactly round(share x n) tokens of a row are chosen and at least one; BERT's sentences also had a maximum of 20.
3. A random token is never a special token.
4. Spans may begin with a text's first token and need not end with its last: all placements are equally likely. T5's own code begins with a kept token
   and ends with a hidden one; the final sentinel of the paper's figure, which that code leaves out, is there.
5. A text that would need more spans than the tokenizer has sentinels has longer spans instead.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..core import IGNORE, Base, Batch, Incompatible, Loss, Policy, Renders, Row, lay_out, next_token_batch, next_token_loss, next_token_losses
from ..nn.corruption import Hiding, choose_spans, choose_tokens, hide_spans, hide_tokens
from ..settings.plugins import Range, within_ranges


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Find hidden tokens (encoders) or hidden spans (encoder-decoders)."""

    terms: ClassVar[Mapping[str, float]] = {"tokens": 1.0}
    needs: ClassVar[frozenset[str]] = frozenset()
    couples: ClassVar[bool] = False
    renders: ClassVar[Renders] = "masked"

    share: Annotated[float, Range(0, 0.9, low_open=True)] = 0.15
    """Share of the tokens that is hidden."""
    span: Annotated[float, Range(1)] = 3.0
    """Mean length of a hidden span, in tokens (encoder-decoders only; an encoder's hidden tokens are chosen one by one)."""

    def __post_init__(self) -> None:
        within_ranges(self)

    def serves(self, kind: str) -> None:
        """Raise Incompatible for a kind of model that has no place for it."""
        if kind == "decoder":
            raise Incompatible(
                "objective masked_text: a decoder reads from left to right and has no mask token to fill; use objective: text, which learns the next token"
            )

    def heads(self, base: Base) -> dict[str, nn.Module]:
        """No head of its own: the model's. Raises Incompatible for a decoder."""
        self.serves(base.anatomy.kind)
        return {}

    def collate(self, rows: Sequence[Row], *, pad: int, packed: bool) -> Batch:
        """Hide and batch. A row's ``train`` says which tokens may be hidden; its ``extras["hiding"]`` what they are hidden by."""
        hiding: Hiding = rows[0].extras["hiding"]
        if hiding.mask is None:
            return next_token_batch([self._spans(r, hiding) for r in rows], pad=pad, packed=packed)
        chosen = [choose_tokens(_chance(r), r.train, self.share) for r in rows]
        hidden = [hide_tokens(_chance(r, 1), r.ids, c, hiding.mask, hiding.usual) for r, c in zip(rows, chosen, strict=True)]
        ids_BT, targets_BT, segments = lay_out([Row(h, np.zeros(len(h), dtype=bool)) for h in hidden], pad, packed)
        for r, c, b, t in zip(rows, chosen, segments.row.tolist(), segments.start.tolist(), strict=True):
            targets_BT[b, t : t + len(r)] = torch.from_numpy(np.where(c, r.ids, IGNORE))
        units = {"tokens": int(sum(c.sum() for c in chosen))}
        return Batch(ids=ids_BT, segments=segments, targets=targets_BT, units=units, where=tuple(r.where for r in rows))

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """Sum of -log p over the hidden tokens; for spans over the whole answer."""
        return next_token_loss(policy, batch)

    def losses(self, policy: Policy, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """The same of each row."""
        return next_token_losses(policy, batch)

    def _spans(self, row: Row, hiding: Hiding) -> Row:
        """The answer as the row, the corrupted text as its source."""
        hidden = choose_spans(_chance(row), len(row), self.share, self.span, most=len(hiding.sentinels) - 1)
        source, answer = hide_spans(row.ids, hidden, hiding.sentinels)
        end = [] if hiding.eos is None else [hiding.eos]
        ids = np.concatenate([[hiding.start], answer, end]).astype(np.int32)
        train = np.full(len(ids), bool(row.train.any()))  # a row with nothing to train stands for a rank without rows
        train[0] = False
        return Row(ids, train, row.where, {"source": np.concatenate([source, end]).astype(np.int32)})


def _chance(row: Row, use: int = 0) -> np.random.Generator:
    """The generator of a row at a visit; without a visit, of the row's own tokens."""
    seed = row.visit or (zlib.crc32(row.ids.tobytes()),)
    return np.random.default_rng([*seed, use])
