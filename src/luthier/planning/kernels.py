"""Attention on the meta device by the kernel that torch would choose on the device that is meant.

Meta's own choice is the plain one, which keeps every score. On a CPU torch is asked, with small tensors of the same kind; on CUDA the rule is: flash attention
in 16 bits without a mask, memory-efficient attention where keys and values have as many heads as queries, else the scores are written out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.overrides import TorchFunctionMode

from ..modelling import across, attention
from ..modelling.anatomy import attentions
from ..modelling.site import current

aten = torch.ops.aten


class _Kernels(TorchFunctionMode):
    """Attention on meta by the kernel that torch would choose on the device."""

    def __init__(self, device: str):
        super().__init__()
        self.device, self.causal = device, True  # whether the module that is running sees what stands before only

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not sdpa:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if self.device == "cpu":
            if self._short(q, attn_mask, dropout_p, is_causal):
                n = q.shape[2]
                triangle = torch.ones(n, n, dtype=torch.bool, device=q.device).tril() if attn_mask is None else attn_mask
                return attention.two_products(q, k, v, triangle, scale)
            if _flash_on_cpu(q, k, v, attn_mask, dropout_p, is_causal, enable_gqa):
                bias = attn_mask.to(q.dtype) if attn_mask is not None and attn_mask.dtype == torch.bool else attn_mask
                return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout_p, is_causal, attn_mask=bias, scale=scale)[0]
        elif self.device == "cuda":
            half, grouped = q.dtype in (torch.float16, torch.bfloat16), q.shape[1] != k.shape[1]
            if attn_mask is None and half and q.shape[-1] <= 256:
                return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
            if not grouped:
                bias = None if attn_mask is None else attn_mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
                return aten._scaled_dot_product_efficient_attention(q, k, v, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]
        return sdpa(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)  # on meta: written out, all scores kept

    def _short(self, q: Tensor, mask: Tensor | None, dropout: float, causal: bool) -> bool:
        """Whether attention.py writes it out itself: it asks the device of the query, which is meta here."""
        frame = current()
        inside = frame is not None and frame.segments is not None
        return inside and q.shape[2] <= attention.SHORT and q.dtype == torch.bfloat16 and dropout == 0.0 and (causal or (mask is not None and self.causal))


def _flash_on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool, grouped: bool) -> bool:
    """Ask torch, with tensors of the same kind and two positions."""
    twins = [torch.empty(1, t.shape[1], 2, t.shape[3], dtype=t.dtype, device="cpu", requires_grad=t.requires_grad) for t in (q, k, v)]
    if mask is not None:
        mask = torch.empty([1] * (mask.dim() - 2) + [2, 2], dtype=mask.dtype, device="cpu", requires_grad=mask.requires_grad)
    choice: Any = torch._fused_sdp_choice
    return bool(choice(*twins, mask, dropout, causal, scale=None, enable_gqa=grouped) == 1)


@contextmanager
def attending(lm: Any, device: str) -> Iterator[None]:
    """Every attention by the device's kernels, in recomputation too: a mode around the backward is off while the backward runs."""
    kernels, found = _Kernels(device), [a.module for a in attentions(lm)]

    def within(own: Callable[..., Any], causal: bool) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            kernels.causal = causal
            before = across.MEANT.set(device)
            try:
                with kernels:
                    return own(*args, **kwargs)
            finally:
                across.MEANT.reset(before)

        return forward

    before = [m.__dict__.get("forward") for m in found]  # a faster form of its own (speed/)
    for module in found:
        module.forward = within(module.forward, bool(getattr(module, "is_causal", True)))  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module, own in zip(found, before, strict=True):
            if own is None:
                del module.forward
            else:
                module.forward = own
