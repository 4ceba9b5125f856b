"""Trained keys and values for every attention: what prefix tuning and P-tuning v2 share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop

from ..core import Base, Delta
from ..modelling.anatomy import attentions
from ..modelling.attention import keys_and_values
from ..nn.prompts import Projected, Table
from .layout import virtual
from .prompts import leave_room, starting_ids


def attach_prefix(base: Base, key: str, length: int, *, hidden: int | None, text: str | None, std: float, dropout: float = 0.0) -> Delta:
    """A delta of ``length`` virtual tokens in every attention of a base, made by a table or by an MLP of width ``hidden``.

    ``text``: begin at the keys and values of its tokens, else at noise of standard deviation ``std``. Columns lie as in PEFT: for each attention
    its keys, then its values, heads first. Raises Incompatible where the prefix leaves no room, or the model's attention is its own.
    """
    leave_room(base, length)
    own = attentions(base.model)
    width = sum(a.columns for a in own)
    device = next(base.model.parameters()).device
    made: Any = Table(length, width, std=std, device=device) if hidden is None else Projected(length, base.width, hidden, width, device=device)
    if text is not None and device.type != "meta":
        ids = starting_ids(base, length, text)
        found = keys_and_values(base.model, ids, torch.arange(length, device=device) + base.anatomy.first_position)
        start = torch.cat([x.float().reshape(length, -1) for a in own for x in found[a.module]], 1)
        if hidden is None:
            with torch.no_grad():
                made.table.copy_(start)
        else:
            made.begin_at(start)

    def prefix() -> dict[nn.Module, tuple[Tensor, Tensor]]:
        flat = made()
        if dropout and base.model.training:
            flat = drop(flat, dropout)
        out, at = {}, 0
        for a in own:
            k, v = flat[:, at : at + a.columns].view(length, 2, a.heads, a.dim).unbind(1)
            out[a.module] = (k, v)
            at += a.columns
        return out

    return Delta(
        {f"{key}:{n}": p for n, p in made.named_parameters()},
        buffers={f"{key}:{n}": b for n, b in made.named_buffers()},
        prefix=prefix,
        shift=length,
        export=None  # PEFT gives an encoder-decoder's encoder no prefix
        if base.anatomy.kind == "encoder_decoder"
        else lambda: (virtual(base, "PREFIX_TUNING", length, deep=True) | {"prefix_projection": False}, {"prompt_embeddings": made().detach()}),
    )


def read_prefix(tensors: dict[str, Tensor], key: str) -> tuple[int, dict[str, Tensor]]:
    """(length, params) of PEFT's ``prompt_embeddings``, which already lie as ours do."""
    table = tensors["prompt_embeddings"]
    return len(table), {f"{key}:table": table}
