"""A base with a delta and heads: what every objective trains, every evaluation scores and every answer comes from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import attention, generation
from .anatomy import trunk
from .core import Base, Batch, Delta, Incompatible, Method, Rollout
from .nn.logprob import chunks, linear_logp, shape_logits
from .site import Frame, sites, using


class Policy(nn.Module):
    """The model being trained. ``name`` is the delta's; with no delta it is the base itself."""

    def __init__(
        self, base: Base, delta: Delta | None = None, *, method: Method | None = None, name: str = "default", heads: dict[str, nn.Module] | None = None
    ):
        super().__init__()
        self.lm = base.model
        self.heads = nn.ModuleDict(heads or {})
        self.base, self.delta, self.method = base, delta, method
        self.active: str | None = None
        self.use(name if delta is not None else None)

    def use(self, name: str | None) -> None:
        """Choose the delta that serves calls without a route; None: the base."""
        self.active = name
        for site in sites(self.lm).values():
            site.active = name

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.lm.parameters()).device

    def trained(self) -> dict[str, nn.Parameter]:
        """Everything the optimizer moves: the delta's parameters and the heads'."""
        params = dict(self.delta.params) if self.delta is not None else {}
        return params | {f"heads.{n}": p for n, p in self.heads.named_parameters()}

    def hidden(self, batch: Batch) -> Tensor:
        """(B, T, D) last hidden states, aligned with ``batch.ids``. Examples never see one another."""
        route: Any = self.active if batch.route is None else batch.route
        example_BT = batch.segments.example(batch.shape).to(self.device) if isinstance(route, tuple) else None
        inputs: dict[str, Any] = {"input_ids": batch.ids, **batch.inputs, "use_cache": False}
        if self.lm.config._attn_implementation == attention.NAME:
            inputs["position_ids"] = batch.segments.positions(batch.shape).to(self.device)
            frame = Frame(route, batch.segments, example_BT)
        else:  # the model's own attention: one example a row, masked by transformers
            if not batch.segments.plain:
                raise Incompatible(f"{self.base.anatomy.family} was found to leak between examples of one row; use data.pack=no")
            inputs["attention_mask"] = (batch.segments.example(batch.shape) >= 0).to(self.device)
            frame = Frame(route, None, example_BT)
        with using(frame):
            return trunk(self.lm)(**inputs).last_hidden_state

    def score(self, hidden_ND: Tensor, token_N: Tensor, *, temperature: float = 1.0, want: Sequence[str] = ("logp",)) -> dict[str, Tensor]:
        """What the head says of N scored positions, fp32 (N,) each, without N x V logits.

        logp: log p(token). entropy: of the distribution, in nats. mean_logp: average log p over the vocabulary.
        """
        head, rule = self.lm.get_output_embeddings(), self.base.anatomy
        if tuple(want) == ("logp",) and type(head) is nn.Linear:
            weight = head.weight if head.weight.dtype == hidden_ND.dtype else head.weight.to(hidden_ND.dtype)
            return {"logp": linear_logp(hidden_ND, weight, head.bias, token_N, scale=rule.head_scale / temperature, cap=rule.head_cap)}

        def some(h_nD: Tensor, token_n: Tensor) -> tuple[Tensor, ...]:
            logp_nV = (shape_logits(head(h_nD), rule.head_scale, rule.head_cap) / temperature).log_softmax(-1)
            values = {
                "logp": lambda: logp_nV.gather(1, token_n[:, None]).squeeze(1),
                "entropy": lambda: -(logp_nV.exp() * logp_nV).sum(-1),
                "mean_logp": lambda: logp_nV.mean(-1),
            }
            return tuple(values[w]() for w in want)

        vocabulary = self.lm.config.get_text_config().vocab_size
        parts = [checkpoint(some, hidden_ND[c], token_N[c], use_reentrant=False) for c in chunks(max(1, len(hidden_ND)), vocabulary)]
        return {w: torch.cat([p[i] for p in parts]) for i, w in enumerate(want)}

    def generate(self, source: Sequence[Sequence[int]], **how: Any) -> Rollout:
        """Continue each prompt of token ids; see generation.generate for the choices."""
        training = self.training
        self.eval()
        try:
            return generation.generate(self.lm, self.base.anatomy, source, pad=self.base.tokenizer.pad_token_id or 0, limit=self.base.max_positions, **how)
        finally:
            self.train(training)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The base, with the delta off: no gradients, evaluation mode. Raises Incompatible for a delta that trained the base itself."""
        if self.method is not None and self.method.edits == "weights":
            raise Incompatible("a method that trains the base's own weights has no base left to switch to; load the base again")
        active, training = self.active, self.training
        self.use(None)
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.use(active)
            self.train(training)

    def fold(self) -> None:
        """Write the delta into the base's weights, for good. Raises Incompatible where the method cannot."""
        if self.delta is None or self.delta.fold is None:
            raise Incompatible("this delta cannot be folded into weights: it changes what no single weight holds")
        self.delta.fold()
        self.delta = None
        self.use(None)
