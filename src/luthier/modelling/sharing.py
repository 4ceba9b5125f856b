"""What examples of a packed row have in common at their beginning, computed once: both answers of a pair, all answers of a group, a system prompt of many.

A stream in which S examples lie whole is made shorter: what neighbours share lies once, as a segment of its own, and what each has besides goes on from
it (`Segments.parent`): its positions go on from the parent's, and its queries see the parent's keys and values and, causally, their own (attention.py). A
hidden state of a decoder depends on what stands before it only, so hidden states and gradients are those of the whole stream; `Policy.hidden` gives them back
in its layout, where the state of a shared position stands once for every example. Nobody else has to know: the last prompt position predicts the first
token of every answer, and gets the gradients of all of them.

Of two answers of R tokens to a prompt of P, P + 2R positions are computed instead of 2 (P + R). Prefix sharing for DPO: Wang & Hegde, 2024, arXiv 2410.20305;
for groups: Liu et al., 2025, arXiv 2506.05433.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..core import PACKED_MULTIPLE, Alike, Segments, Stream, round_up

Sharing = Literal["auto", "on", "off"]
LEAST_TOKENS = 16  # auto: a shorter beginning is not worth a segment of its own
LEAST_SHARE = 0.05  # auto: of all positions, those that sharing saves


@dataclass(frozen=True)
class Shorter:
    """A stream with what examples share lying once."""

    stream: Stream
    take: Tensor  # (T',) which position of the whole stream each of its own is
    back: Tensor  # (T,) where each position of the whole stream lies in it; 0 on padding
    example: tuple[int, ...]  # of each segment an example it belongs to: whose route serves it

    def route(self, route: Any) -> Any:
        """A route of the whole stream for this one."""
        return tuple(route[s] for s in self.example) if isinstance(route, tuple) else route


def shorten(stream: Stream, route: Any, how: Sharing) -> Shorter | None:
    """The shorter form of a packed stream; None where nothing is shared, or, with ``how="auto"``, too little. What routes differ in is not shared."""
    segments = stream.segments
    tokens = int(segments.length.sum())  # all that lie here, also those that a rank only reads and does not count
    least = LEAST_TOKENS if how == "auto" else 1
    groups = [g for g in segments.alike if g.tokens >= least and _one_route(route, g)]
    saved = sum((g.examples - 1) * g.tokens for g in groups)
    if how == "off" or stream.shape[0] != 1 or stream.inputs or saved < (LEAST_SHARE * tokens if how == "auto" else 1):
        return None
    width = round_up(tokens - saved, PACKED_MULTIPLE)
    if how == "auto" and width >= stream.shape[1]:
        return None
    start, length = segments.start.numpy(), segments.length.numpy()
    pieces: list[tuple[int, int, int, int, int]] = []  # example, its first token here, end, parent, and how many examples begin with it
    at = 0
    for g in groups:
        pieces += [(s, 0, int(length[s]), -1, 1) for s in range(at, g.first)]
        parent, at = len(pieces), g.first + g.examples
        pieces.append((g.first, 0, g.tokens, -1, g.examples))
        pieces += [(s, g.tokens, int(length[s]), parent, 1) for s in range(g.first, at)]
    pieces += [(s, 0, int(length[s]), -1, 1) for s in range(at, len(segments))]
    lengths = np.array([b - a for _, a, b, _, _ in pieces])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    take, back = np.zeros(width, dtype=np.int64), np.zeros(stream.shape[1], dtype=np.int64)
    take[lengths.sum() :] = stream.shape[1] - 1 if tokens < stream.shape[1] else 0  # padding shows padding, where there is any
    for (s, a, b, _, examples), t in zip(pieces, starts.tolist(), strict=True):
        take[t : t + b - a] = np.arange(start[s] + a, start[s] + b)
        for e in range(s, s + examples):
            back[start[e] + a : start[e] + b] = np.arange(t, t + b - a)
    new = Segments(
        torch.zeros(len(pieces), dtype=torch.long), torch.from_numpy(starts), torch.from_numpy(lengths), parent=torch.tensor([p for *_, p, _ in pieces])
    )
    device = stream.ids.device
    where = torch.from_numpy(take).to(device)
    ids = stream.ids[0].index_select(0, where)[None]
    return Shorter(Stream(ids=ids, segments=new), where, torch.from_numpy(back).to(device), tuple(s for s, *_ in pieces))


def said(stream: Stream, how: Sharing) -> str:
    """What is computed of a stream like this one, in a sentence; "" where it is computed whole."""
    shorter = shorten(stream, None, how)
    if shorter is None:
        return ""
    return f"what examples begin with is computed once: {shorter.stream.tokens / stream.tokens:.0%} of the tokens (speed.share_prompts=off: all)"


def _one_route(route: Any, group: Alike) -> bool:
    return not isinstance(route, tuple) or len(set(route[group.first : group.first + group.examples])) == 1
