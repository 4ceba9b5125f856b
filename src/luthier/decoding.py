"""Hidden states of the next position, token after token, with a key-value cache: what sampling steps through.

`DecoderSteps` continues prompts, padded on the left; `Seq2SeqSteps` encodes them once and decodes answers. Both put soft prompts and prefixes
where training puts them, and may serve each row by another route.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from .anatomy import trunk
from .core import Segments, Stream
from .site import Frame, using


class Steps(Protocol):
    """One batch of prompts that is being answered."""

    def begin(self, prompts: Sequence[Sequence[int]]) -> Tensor: ...  # (B, D): the state that predicts each row's first token
    def go_on(self, token_B: Tensor) -> Tensor: ...  # (B, D)
    def keep(self, rows: list[int]) -> None: ...  # drop the other rows
    def logits(self, hidden_BD: Tensor) -> Tensor: ...  # fp32 (B, V)
    def room(self, prompts: Sequence[Sequence[int]], limit: int) -> int: ...  # how many new tokens fit


class _Routed:
    """Rows with their routes: the frame of every forward."""

    def __init__(self, policy: Any, routes: Sequence[str | None]):
        self.policy, self.lm, self.anatomy, self.device = policy, policy.lm, policy.base.anatomy, policy.device
        self.routes = list(routes)
        with torch.no_grad():
            self.prefixes = policy.prefixes(tuple(dict.fromkeys(routes)))

    def frame(self) -> Frame:
        same = len(set(self.routes)) <= 1
        return Frame(self.routes[0] if same and self.routes else None if same else tuple(self.routes), None, None, self.prefixes)

    def logits(self, hidden_BD: Tensor) -> Tensor:
        with using(self.frame()):
            return self.anatomy.head(self.lm, hidden_BD)


class DecoderSteps(_Routed):
    """A decoder continues its prompts."""

    def begin(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        soft = {r: self.policy.prompt(r) for r in dict.fromkeys(self.routes)}
        lead = [0 if soft[r] is None else len(soft[r]) for r in self.routes]
        width = max(len(p) + n for p, n in zip(prompts, lead, strict=True))
        pad = self.policy.pad
        ids_BT = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=self.device)
        self.mask_BT = torch.tensor([[0] * (width - len(p) - n) + [1] * (len(p) + n) for p, n in zip(prompts, lead, strict=True)], device=self.device)
        shift_B = torch.tensor([self.policy._shift(r) + self.anatomy.first_position for r in self.routes], device=self.device)
        self.next_B = self.mask_BT.sum(1) + shift_B
        self.cache = DynamicCache(config=self.lm.config)
        positions_BT = (self.mask_BT.cumsum(1) - 1).clamp(min=0) + shift_B[:, None]
        with using(self.frame()):
            if not any(lead):
                return self._forward(positions_BT, input_ids=ids_BT)
            embedded = self.lm.get_input_embeddings()(ids_BT)
            for b, (p, r, n) in enumerate(zip(prompts, self.routes, lead, strict=True)):
                if n:
                    embedded[b, width - len(p) - n : width - len(p)] = soft[r].to(embedded.dtype)
            return self._forward(positions_BT, inputs_embeds=embedded)

    def go_on(self, token_B: Tensor) -> Tensor:
        self.mask_BT = torch.cat([self.mask_BT, self.mask_BT.new_ones(len(token_B), 1)], 1)
        positions_B, self.next_B = self.next_B, self.next_B + 1
        with using(self.frame()):
            return self._forward(positions_B[:, None], input_ids=token_B[:, None])

    def keep(self, rows: list[int]) -> None:
        index = torch.tensor(rows, device=self.device)
        self.cache.batch_select_indices(index)
        self.mask_BT, self.next_B = self.mask_BT[index], self.next_B[index]
        self.routes = [self.routes[b] for b in rows]

    def room(self, prompts: Sequence[Sequence[int]], limit: int) -> int:
        return limit - max(len(p) for p in prompts)

    def _forward(self, positions_BT: Tensor, **tokens: Tensor) -> Tensor:
        # Without padding the mask says nothing, and without a mask attention takes its fast path.
        masked = {"attention_mask": self.mask_BT} if bool((self.mask_BT == 0).any()) else {}
        return trunk(self.lm)(**tokens, position_ids=positions_BT, past_key_values=self.cache, use_cache=True, **masked).last_hidden_state[:, -1]


class Seq2SeqSteps(_Routed):
    """An encoder-decoder reads its prompts once and writes answers."""

    def begin(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        lengths = torch.tensor([len(p) for p in prompts])
        width = int(lengths.max())
        ids_BT = torch.tensor([list(p) + [self.policy.pad] * (width - len(p)) for p in prompts], device=self.device)
        rows = torch.arange(len(prompts))
        frame = self.frame()
        source, self.encoded = self.policy._encode(Stream(ids=ids_BT, segments=Segments(rows, torch.zeros_like(rows), lengths)), frame.route)
        self.mask_BT = (source.segments.example(source.shape) >= 0).long().to(self.device)
        self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        return self.go_on(torch.full((len(prompts),), self.anatomy.decoder_start, device=self.device))

    def go_on(self, token_B: Tensor) -> Tensor:
        seen = {"encoder_hidden_states": self.encoded, "encoder_attention_mask": self.mask_BT}
        with using(self.frame()):
            return self.lm.get_decoder()(input_ids=token_B[:, None], past_key_values=self.cache, use_cache=True, **seen).last_hidden_state[:, -1]

    def keep(self, rows: list[int]) -> None:
        index = torch.tensor(rows, device=self.device)
        self.cache.batch_select_indices(index)
        self.encoded, self.mask_BT = self.encoded[index], self.mask_BT[index]
        self.routes = [self.routes[b] for b in rows]

    def room(self, prompts: Sequence[Sequence[int]], limit: int) -> int:
        return limit
