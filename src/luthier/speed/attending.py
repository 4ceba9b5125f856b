"""Self-attention that is built as Llama's is, in training: rotary positions by a row kernel. The attention itself is attention.attend's (byhand.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import Segments
from ..modelling import attention
from ..modelling.anatomy import is_linear
from ..modelling.site import Frame, Site, current, using
from .compiled import RowKernels
from .form import Form
from .rows import Rotate
from .selftest import TOKENS, at_hand, differs

LINEARS, NORMS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("q_norm", "k_norm")


class Attending(Form):
    """Stands in for the forward of a self-attention that is built as Llama's is."""

    def __init__(self, module: Any, how: attention.How, run: RowKernels):
        super().__init__(module)
        self.how, self.run = how, run

    def faster(
        self, hidden_states: Tensor, *args: Any, position_embeddings: Any = None, attention_mask: Any = None, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        m, frame, x_BTD = self.module, current(), hidden_states
        if args or frame is None or frame.segments is None or attention.RECORD in frame.plans or past_key_values is not None or position_embeddings is None:
            return None
        cosine, sine = position_embeddings
        shape = (*x_BTD.shape[:-1], -1, m.head_dim)
        if tuple(cosine.shape) != (*x_BTD.shape[:-1], m.head_dim) or not self.run.fits(x_BTD, cosine, sine) or m.config._attn_implementation != attention.NAME:
            return None
        q, k, v = (getattr(m, n)(x_BTD).view(shape) for n in LINEARS[:3])
        if "q_norm" in m._modules:
            q, k = m.q_norm(q), m.k_norm(k)
        q, k = (Rotate.apply(x.contiguous(), cosine, sine, self.run) for x in (q, k))
        dropout = m.attention_dropout if m.training else 0.0
        how: dict[str, Any] = {"dropout": dropout, "scaling": self.how.scaling, "sliding_window": self.how.window, "softcap": self.how.softcap}
        y = attention.attend(m, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attention_mask, **how, **kwargs)[0]
        return m.o_proj(y.reshape(*x_BTD.shape[:-1], -1)), None


def usual(module: Any) -> bool:
    """q, k, v, o by their usual names, norms of q and k or none, nothing else inside."""
    children = dict(module.named_children())
    if not set(LINEARS) <= set(children) <= {*LINEARS, *NORMS} or len(set(children) & set(NORMS)) == 1 or "forward" in module.__dict__:
        return False
    if not all(hasattr(module, n) for n in ("head_dim", "attention_dropout", "config", "layer_idx")) or module._parameters:
        return False
    return all(is_linear(c.base if isinstance(c, Site) else c) for n, c in children.items() if n in LINEARS)


def install(policy: Any, run: RowKernels) -> int:
    """Give every usual self-attention the faster form, where it is found equal. Returns how many."""
    put, tested = 0, {}
    if policy.lm.config._attn_implementation != attention.NAME:
        return 0
    for module in list(policy.lm.modules()):
        if not usual(module) or (how := _asked(policy, module)) is None:
            continue
        form = Attending(module, how, run)
        if (kind := (type(module), how)) not in tested:
            tested[kind] = _equals(policy, form)
        if tested[kind]:
            form.put()
            put += 1
    return put


def _rotation(policy: Any, module: Any) -> tuple[Tensor, Tensor]:
    """cos and sin (1, TOKENS, d) of some positions."""
    angle = torch.rand(1, TOKENS, module.head_dim // 2, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 2) * 6
    return angle.cos().to(policy.device, policy.lm.dtype), angle.sin().to(policy.device, policy.lm.dtype)


def _two() -> Segments:
    first = TOKENS // 2 + 1
    return Segments(torch.tensor([0, 0]), torch.tensor([0, first]), torch.tensor([first, TOKENS - first]))


@torch.no_grad()
def _asked(policy: Any, module: Any) -> attention.How | None:
    """What a module asks of its attention, as its own forward says it; None where it says something that is not known here."""
    x = torch.zeros(1, TOKENS, policy.lm.config.get_text_config().hidden_size, dtype=policy.lm.dtype, device=policy.device)
    said: dict[Any, Any] = {}
    mode = module.training
    module.eval()
    try:
        with at_hand([module]), using(Frame(None, _two(), plans={attention.ASKED: said})):
            type(module).forward(module, hidden_states=x, position_embeddings=_rotation(policy, module), attention_mask=None)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None
    finally:
        module.train(mode)
    how, more = said.get(module, (None, ()))
    return None if more or how is None or how.scaling is None else how


def _equals(policy: Any, form: Attending) -> bool:
    m, lm = form.module, policy.lm
    if policy.device.type == "meta":
        return True
    where = _rotation(policy, m)

    def plain(x: Tensor) -> list[Tensor]:
        with using(Frame(None, _two())):
            return [form.kind.forward(m, hidden_states=x, position_embeddings=where, attention_mask=None)[0]]

    def faster(x: Tensor) -> list[Tensor]:
        with using(Frame(None, _two())):
            done = form.faster(x, position_embeddings=where)
        if done is None:
            raise RuntimeError("the faster form declines")
        return [done[0]]

    mode = m.training
    m.eval()
    try:
        with at_hand([m]):
            return not differs(plain, faster, [], lm.config.get_text_config().hidden_size, lm.dtype, policy.device)
    finally:
        m.train(mode)
