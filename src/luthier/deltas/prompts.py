"""Vectors put before examples: a stream made longer by each example's soft prompt, and the way back to the stream as it was.

A soft prompt is never a token id, so it cannot meet a vocabulary, a mask of trained tokens or a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from ..core import PACKED_MULTIPLE, PADDED_MULTIPLE, Base, Incompatible, Stream, round_up
from ..settings.plugins import Range, within_ranges


@dataclass(frozen=True, kw_only=True)
class Virtual:
    """What the methods with virtual tokens have in common."""

    edits: ClassVar[Literal["sequence"]] = "sequence"

    length: Annotated[int, Range(1)] = 20
    """Virtual tokens before every example, or in every layer; they count against the model's positions."""
    from_: str | None = None
    """Start from the delta saved in this adapter's or run's folder, instead of from new values."""

    def __post_init__(self) -> None:
        within_ranges(self)

    @property
    def shift(self) -> int:
        """Positions the text moves."""
        return self.length


@dataclass(frozen=True)
class Longer:
    """A stream with room for prompts in front of its examples."""

    stream: Stream  # ids are the padding token where a prompt goes
    slots: dict[int, Tensor]  # example -> (P,) flat positions of its prompt
    back: Tensor  # (B, T) flat positions of the original stream's tokens; 0 on padding


def make_room(stream: Stream, lengths: Sequence[int], pad: int) -> Longer:
    """``lengths``: the prompt's length for each example. Rows stay rows; widths are rounded up as in the collator."""
    (B, T), old = stream.shape, stream.segments
    room = torch.tensor(list(lengths))
    added = torch.zeros(B, dtype=torch.long).index_add_(0, old.row, room)
    used = torch.zeros(B, dtype=torch.long).scatter_reduce_(0, old.row, old.start + old.length, "amax")
    packed = len(old) > B or bool(old.start.any())
    width = round_up(int((used + added).max()), PACKED_MULTIPLE if packed else PADDED_MULTIPLE)
    before = [int(room[(old.row == b) & (old.start < t)].sum()) for b, t in zip(old.row.tolist(), old.start.tolist(), strict=True)]
    start = old.start + torch.tensor(before)
    new = replace(old, start=start, length=room + old.length)
    take = torch.full((B, width), -1, dtype=torch.long)  # which old position each new one shows
    back = torch.zeros(B, T, dtype=torch.long)
    slots = {}
    for s, (b, t0, t1, n, p) in enumerate(zip(old.row.tolist(), old.start.tolist(), start.tolist(), old.length.tolist(), room.tolist(), strict=True)):
        take[b, t1 + p : t1 + p + n] = torch.arange(b * T + t0, b * T + t0 + n)
        back[b, t0 : t0 + n] = torch.arange(b * width + t1 + p, b * width + t1 + p + n)
        if p:
            slots[s] = torch.arange(b * width + t1, b * width + t1 + p)
    index, empty = take.clamp(min=0).flatten().to(stream.ids.device), (take < 0).to(stream.ids.device)

    def moved(x_BT: Tensor, fill: int) -> Tensor:
        return x_BT.flatten(0, 1).index_select(0, index).view(B, width, *x_BT.shape[2:]).masked_fill(empty.view(B, width, *[1] * (x_BT.dim() - 2)), fill)

    inputs = {k: moved(v, 0) for k, v in stream.inputs.items()}
    return Longer(Stream(ids=moved(stream.ids, pad), segments=new, inputs=inputs), slots, back.to(stream.ids.device))


def put_in(embedded_BWD: Tensor, longer: Longer, prompts: Sequence[Tensor | None]) -> Tensor:
    """The embedded stream with each example's prompt (P, D) in its slots."""
    where = [longer.slots[s] for s in longer.slots]
    vectors = [prompts[s] for s in longer.slots]
    if not where:
        return embedded_BWD
    flat = embedded_BWD.flatten(0, 1)
    values = torch.cat([v.to(flat.dtype) for v in vectors if v is not None])
    return flat.index_copy(0, torch.cat(where).to(flat.device), values).view_as(embedded_BWD)


# --- where virtual tokens start -------------------------------------------------------------------------------------


def starting_ids(base: Base, length: int, text: str | None) -> Tensor:
    """(P,) token ids to begin from: those of a text, repeated to the length, or, with no text or no tokenizer, sampled ones without the special tokens."""
    device = next(base.model.parameters()).device
    if text is not None and base.tokenizer is not None:
        ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise Incompatible(f"method.init_text: {text!r} has no token in this model's vocabulary")
        return torch.tensor((ids * (1 + length // len(ids)))[:length], device=device)
    special = set(getattr(base.tokenizer, "all_special_ids", None) or ())
    vocabulary = base.model.config.get_text_config().vocab_size  # type: ignore[operator, union-attr]
    usual = torch.tensor([i for i in range(vocabulary) if i not in special])
    return usual[torch.randint(len(usual), (length,))].to(device)


def leave_room(base: Base, length: int) -> None:
    """Raise Incompatible where virtual tokens take all of a model's positions."""
    if length >= base.max_positions:
        raise Incompatible(f"method.length: {length} virtual tokens leave no room in this model's {base.max_positions} positions")
