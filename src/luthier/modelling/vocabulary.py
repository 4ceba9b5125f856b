"""Tokens added to the vocabulary under any method: their rows of the embedding and of the head are trained, and nothing else of either.

A new row starts as the mean of the rows of the tokens its text had before (Hewitt, 2021; the same for the head), frozen in the base; what is trained and
saved is the difference to it, fp32. A head tied to the embedding stays tied: both uses see one difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..core import Base, Delta, LuthierError
from .shards import is_sharded
from .site import Edit, Site, site_at

KEY = "tokens"


def extend(base: Base, tokens: Sequence[str]) -> None:
    """Teach tokenizer and base the new tokens; the base's rows grow where they must. Raises LuthierError for a token that is there, empty or twice."""
    tokenizer, lm = base.tokenizer, base.model
    if base.tokens == tuple(tokens):
        return
    if base.tokens:
        raise LuthierError(f"tokens: this base already has {', '.join(base.tokens)} added; every delta on it must have the same")
    if tokenizer is None:
        raise LuthierError("tokens: this model has no tokenizer to add them to")
    known = tokenizer.get_vocab()
    for i, token in enumerate(tokens):
        if not token.strip():
            raise LuthierError(f"tokens: {token!r} is empty; a token is a piece of text that becomes one id")
        if token in tokens[:i]:
            raise LuthierError(f"tokens: {token!r} is there twice; each is added once")
        if token in known:
            raise LuthierError(f"tokens: {token!r} is already in this model's vocabulary, as token {known[token]}; leave it out")
    pieces = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in tokens]
    tokenizer.add_tokens(list(tokens))
    base.tokens = tuple(tokens)
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    if is_sharded(lm.get_input_embeddings().weight):  # type: ignore[operator]
        raise LuthierError("tokens: the rows of this base's embedding lie on several ranks, and none can be added to them; use place.shard=none")
    rows = lm.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if max(ids) >= rows:
        lm.resize_token_embeddings(max(ids) + 1, mean_resizing=False)  # type: ignore[operator]
        lm.requires_grad_(False)
    if next(lm.parameters()).device.type == "meta":
        return
    with torch.no_grad():
        for weight in _rows(lm):
            for i, own in zip(ids, pieces, strict=True):
                weight[i] = weight[own].float().mean(0).to(weight.dtype)


def attach(base: Base, delta: Delta, name: str) -> None:
    """Add the trained rows of the tokens that `extend` has taught the base to a delta; nothing where there are none."""
    if not base.tokens:
        return
    lm: Any = base.model
    ids = base.tokenizer.convert_tokens_to_ids(list(base.tokens))
    if any(p is w for w in _rows(lm) for p in delta.params.values()):
        return  # the method trains the whole embedding, new rows included
    weights = _rows(lm)
    tied = len(weights) == 1 and lm.get_output_embeddings() is not None
    paths = {id(m): n for n, m in lm.named_modules()}
    head = lm.get_output_embeddings()
    # T5 and BART hold the embedding in several places
    readers = [(n, m) for n, m in lm.named_modules(remove_duplicate=False) if isinstance(m, nn.Embedding) and m.weight is weights[0]]
    made = {"embedding": nn.Parameter(torch.zeros(len(ids), weights[0].shape[1], device=weights[0].device))}
    index = torch.tensor(ids, device=weights[0].device)
    if head is not None:
        if not tied:
            made["head"] = nn.Parameter(torch.zeros(len(ids), weights[1].shape[1], device=weights[1].device))
        _put(lm, paths[id(head)], name, HeadRows(index, made["embedding" if tied else "head"]))
    for path, reader in readers:
        _put(lm, path, name, EmbeddingRows(index, made["embedding"], float(getattr(reader, "embed_scale", 1.0))))
    delta.params |= {f"{KEY}:{k}": p for k, p in made.items()}
    before = delta.fold
    if before is None:
        return

    def fold() -> None:
        with torch.no_grad():
            for weight, rows in zip(weights, made.values(), strict=True):
                weight[index] = (weight[index].float() + rows).to(weight.dtype)
        for module in [m for _, m in lm.named_modules()]:
            if isinstance(module, Site) and name in module.edits:
                edit = module.edits[name]
                if isinstance(edit, _Both):
                    module.edits[name] = edit.own
                elif isinstance(edit, EmbeddingRows | HeadRows):
                    del module.edits[name]
        before()

    delta.fold = fold


class EmbeddingRows(Edit):
    """Differences (n, D) to the embeddings of some ids; ``scale``: what the module multiplies its rows by."""

    def __init__(self, ids: Tensor, rows: nn.Parameter, scale: float = 1.0):
        super().__init__()
        self.register_buffer("ids", ids, persistent=False)
        self.rows, self.scale = rows, scale

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        hit: Tensor = x[..., None].eq(self.ids)  # type: ignore[arg-type]  # (..., n)
        return y + self.scale * linear(hit.to(y.dtype), self.rows.t().to(y.dtype))


class HeadRows(Edit):
    """Differences (n, D) to the head's rows of some ids."""

    def __init__(self, ids: Tensor, rows: nn.Parameter):
        super().__init__()
        self.register_buffer("ids", ids, persistent=False)
        self.rows = rows

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y.index_add(-1, self.ids, linear(x, self.rows.to(x.dtype)).to(y.dtype))  # type: ignore[arg-type]


class _Both(Edit):
    """The method's own edit of an embedding or head, then the rows."""

    def __init__(self, own: Edit, rows: Edit):
        super().__init__()
        self.own, self.rows = own, rows

    def before(self, x: Tensor) -> Tensor:
        return self.own.before(x)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return self.rows.after(x, self.own.after(x, y))

    def fold(self, weight: Tensor) -> Tensor | None:
        return self.own.fold(weight)


def _put(lm: nn.Module, path: str, name: str, edit: Edit) -> None:
    path = path.removesuffix(".base")
    site = site_at(lm, path)
    site.edits[name] = _Both(site.edits[name], edit) if name in site.edits else edit  # type: ignore[arg-type]


def _rows(lm: Any) -> list[Tensor]:
    """The weights that hold a row a token: one where the head is tied to the embedding."""
    embedding, head = lm.get_input_embeddings().weight, lm.get_output_embeddings()
    return [embedding] if head is None or head.weight is embedding else [embedding, head.weight]
