"""One token a row from its logits, and the random numbers for it.

Random numbers are a function of (seed, number of the prompt, sample, step), and of nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 64  # steps whose random numbers are drawn at once
LIKELIEST = 1024  # tokens looked at for top_p before the whole vocabulary is sorted
SPREAD = 0x9E3779B97F4A7C15  # 2^64 by the golden ratio: samples of one prompt start far from those of its neighbours


class Draws:
    """Uniform numbers in [0, 1), one a row and step. A row without a seed gets zeros."""

    def __init__(self, seeds: Sequence[int | None], device: torch.device):
        self.device = device
        self.generators = [None if s is None else torch.Generator().manual_seed(s) for s in seeds]
        self.step = 0

    def next(self) -> Tensor:
        """(B,) for the next step."""
        if self.step % BLOCK == 0:
            none = torch.zeros(BLOCK)
            self.block = torch.stack([none if g is None else torch.rand(BLOCK, generator=g) for g in self.generators]).to(self.device)
        self.step += 1
        return self.block[:, (self.step - 1) % BLOCK]

    def keep(self, rows: Sequence[int], living: int) -> None:
        """Go on with these rows; from ``living`` on they are only there to fill up."""
        self.generators = [self.generators[b] if i < living else None for i, b in enumerate(rows)]
        self.block = self.block[torch.tensor(rows, device=self.device)]


def seed_of(seed: int, number: int, sample: int) -> int:
    """Where the random numbers of one answer start."""
    return (seed * 1_000_003 + number + sample * SPREAD) % 2**63


def choose(p_BV: Tensor, u_B: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """(B,) one token a row by inverse transform of a uniform number, from probabilities (B, V).

    top_k (Fan et al., 2018, arXiv 1805.04833) leaves the k likeliest tokens, top_p (Holtzman et al., 2019, arXiv 1904.09751) the smallest set of the likeliest
    that reaches this share; 0 and 1 leave all. Only where tokens are left out are they sorted, and no more of them than it takes.
    """
    order_BV = None
    if top_k > 0 or top_p < 1.0:
        p_BV, order_BV = _likeliest(p_BV, top_k, top_p)
    total_BV = p_BV.cumsum(-1)
    last_B1 = total_BV[:, -1:]
    rank_B1 = torch.searchsorted(total_BV, u_B[:, None] * last_B1, right=True)
    rank_B1 = torch.minimum(rank_B1, torch.searchsorted(total_BV, last_B1.contiguous()))  # rounding must not lead behind the last that can be
    return (rank_B1 if order_BV is None else order_BV.gather(1, rank_B1)).squeeze(1)


def _likeliest(p_BV: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """The probabilities that are left, sorted, and their tokens."""
    V = p_BV.shape[-1]
    some = min(top_k or LIKELIEST, V)
    p_BK, order_BK = p_BV.topk(some)
    if not top_k and some < V and bool((p_BK.sum(-1) < top_p).any()):
        p_BK, order_BK = p_BV.sort(-1, descending=True)
    if top_p < 1.0:  # the likeliest token always stays
        p_BK[:, 1:][p_BK.cumsum(-1)[:, :-1] >= top_p] = 0
    return p_BK, order_BK


def pick(logits_BV: Tensor, u_B: Tensor | None, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """(B,) tokens, (B,) fp32 log p of each in the model's own distribution, (B,) the same at ``temperature``, nothing cut.

    temperature 0: the likeliest token, whose log p at temperature 0 is 0. ``u_B``: uniform numbers, None where temperature is 0.
    """
    p_BV = (logits_BV if temperature in (0.0, 1.0) else logits_BV / temperature).softmax(-1)
    token_B = logits_BV.argmax(-1) if u_B is None else choose(p_BV, u_B, top_k, top_p)
    tempered_B = p_BV.gather(1, token_B[:, None]).squeeze(1).log()
    if temperature == 1.0:
        return token_B, tempered_B, tempered_B
    if temperature == 0.0:
        return token_B, tempered_B, torch.zeros_like(tempered_B)
    return token_B, logits_BV.log_softmax(-1).gather(1, token_B[:, None]).squeeze(1), tempered_B
