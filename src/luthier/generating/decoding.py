"""Hidden states of the next position, token after token: what sampling steps through.

`DecoderSteps` continues prompts over a `cache.Grid`; `OwnCacheSteps` does so for families that keep their own attention, padded on the left, with the cache
transformers gives them; `Seq2SeqSteps` encodes prompts once and decodes answers. All put soft prompts and prefixes where training puts them, and may serve
each prompt by another route.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from ..core import PADDED_MULTIPLE, Incompatible, Segments, Stream, round_up
from ..modelling import attention
from ..modelling.anatomy import attentions, configs, trunk
from ..modelling.site import Frame, using
from ..nn.logprob import shape_logits
from .cache import FIRST_ROOM, Grid, attending
from .prepacked import whole_memory

_fits: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # what was found of each model
READ_TOKENS = 8192  # positions of prompts that are read in one forward, padding included
CACHE_BYTES, CACHE_SHARE = 1 << 30, 0.125  # of keys and values held at a time on a CPU; at most this share of the machine's memory
CUDA_SHARE = 0.4  # of the memory of a GPU that is free
ROWS = 256  # answers written together, at most: matrix products have long been at their best
LOGIT_BYTES = 256 << 20  # of the fp32 logits of one step


class Steps(Protocol):
    """One batch of prompts that is being answered."""

    drop_at: float  # finished rows are let go when no more than this share would be left

    def begin(self, prompts: Sequence[Sequence[int]]) -> Tensor: ...  # (G, D): the state that predicts the first token of every prompt's answers
    def fork(self, samples: int, most: int, *, last: bool = True) -> None: ...  # so many answers to each; not ``last``: more will be asked for
    def go_on(self, token_B: Tensor) -> Tensor: ...  # (B, D), prompt-major until `keep`
    def keep(self, rows: Sequence[int]) -> None: ...  # go on with these rows only, in this order; one may come several times
    def logits(self, hidden_BD: Tensor) -> Tensor: ...  # fp32 (B, V)


def steps_for(policy: Any, routes: Sequence[str | None]) -> Steps:
    """The steps of a model's kind."""
    if policy.base.anatomy.kind == "encoder_decoder":
        return Seq2SeqSteps(policy, routes)
    return (DecoderSteps if fits_a_grid(policy) else OwnCacheSteps)(policy, routes)


def fits_a_grid(policy: Any) -> bool:
    """Whether a decoder reads its keys and values from a grid: its attention is ours, and a few tokens that were tried once come out as without a cache.

    Hybrids with states of another kind do not, for example.
    """
    if policy.lm.config._attn_implementation != attention.NAME:
        return False
    if policy.lm not in _fits:
        try:
            _fits[policy.lm] = _difference(policy) <= (1e-3 if next(policy.lm.parameters()).dtype == torch.float32 else 5e-2)
        except (Incompatible, ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            _fits[policy.lm] = False
    return _fits[policy.lm]


@torch.no_grad()
def _difference(policy: Any) -> float:
    """Of the base's states over a grid to those of the text at once, relative to the largest."""
    vocabulary = policy.lm.config.get_text_config().vocab_size
    ids = [(17 * i + 5) % vocabulary for i in range(6)]
    steps = DecoderSteps(policy, [None])
    found = [steps.begin([ids[:4]])]
    steps.fork(1, 2)
    found += [steps.go_on(torch.tensor([t], device=steps.device)) for t in ids[4:]]
    with using(Frame()):
        whole_TD = trunk(policy.lm)(input_ids=torch.tensor([ids], device=steps.device), use_cache=False).last_hidden_state[0, 3:]
    return float((torch.cat(found) - whole_TD).abs().max() / whole_TD.abs().max().clamp(min=1e-6))


def cache_tokens(policy: Any) -> int:
    """Positions whose keys and values are held at a time where nothing else is asked for; the same on a CPU whatever else it holds."""
    size = next(policy.lm.parameters()).element_size()
    bytes_each = size * sum(a.columns for a in attentions(policy.lm))
    cuda = policy.device.type == "cuda"
    ceiling = CUDA_SHARE * torch.cuda.mem_get_info(policy.device)[0] if cuda else min(CACHE_BYTES, CACHE_SHARE * whole_memory())
    return max(1, int(ceiling) // max(1, bytes_each))


def rows(policy: Any) -> int:
    """Answers written together where nothing else is asked for."""
    return max(1, min(ROWS, LOGIT_BYTES // (4 * policy.lm.config.get_text_config().vocab_size)))


class _Routed:
    """Prompts and rows with their routes: the frame of every forward."""

    def __init__(self, policy: Any, routes: Sequence[str | None]):
        self.policy, self.lm, self.anatomy, self.device = policy, policy.lm, policy.base.anatomy, policy.device
        self.prompt_routes = self.routes = list(routes)
        self.last = policy.base.max_positions - 1 + self.anatomy.first_position  # rows that are finished and still there stay at this position
        with torch.no_grad():
            self.prefixes = policy.prefixes(tuple(dict.fromkeys(routes)))

    def frame(self, **more: Any) -> Frame:
        same = len(set(self.routes)) <= 1
        return Frame(self.routes[0] if same and self.routes else None if same else tuple(self.routes), None, None, **{"prefixes": self.prefixes, **more})

    def logits(self, hidden_BD: Tensor) -> Tensor:
        with using(self.frame()):
            raw_BV = self.lm.get_output_embeddings()(self.anatomy.before_head(self.lm, hidden_BD))
            return shape_logits(raw_BV, self.anatomy.head_scale, self.anatomy.head_cap)


class DecoderSteps(_Routed):
    """A decoder whose attention is ours continues its prompts."""

    static, drop_at = False, 1.0

    def begin(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Prompts are read in pieces, padded on the right, under the attention that training uses."""
        pads = {r: 0 if (p := self.policy.prompt(r)) is None else len(p) for r in dict.fromkeys(self.routes)}
        lengths = [len(p) + pads[r] for p, r in zip(prompts, self.routes, strict=True)]
        width = round_up(max(lengths), PADDED_MULTIPLE)
        layers: dict[int, Any] = {int(a.module.layer_idx): a.module for a in attentions(self.lm)}  # type: ignore[arg-type]
        rows = [{i: attention.prefix_of(self.frame(), r, m) for i, m in layers.items()} for r in self.routes] if self.prefixes else []
        lead = max((len(kv[0]) for row in rows for kv in row.values() if kv is not None), default=0)
        self.configs = configs(self.lm)
        self.grid = Grid(1 + max(layers), lengths, width, lead, self.device, static=self.static)
        self.next_G = torch.tensor([n + self.policy._shift(r) + self.anatomy.first_position for n, r in zip(lengths, self.routes, strict=True)])
        self.next_G = self.next_G.to(self.device)
        each = max(1, READ_TOKENS // width)
        hidden_GD = torch.cat([self._read(prompts, slice(i, i + each)) for i in range(0, len(prompts), each)])
        for g, row in enumerate(rows):
            for i, kv in row.items():
                if kv is not None:
                    self.grid.put_prefix(i, g, *kv)
        return hidden_GD

    def _read(self, prompts: Sequence[Sequence[int]], piece: slice) -> Tensor:
        """(g, D) last states of some of the prompts."""
        some, routes = prompts[piece], self.routes[piece]
        row = torch.arange(len(some))
        length = torch.tensor([len(p) for p in some])
        width = round_up(int(length.max()), PADDED_MULTIPLE)
        ids_BT = torch.tensor([list(p) + [self.policy.pad] * (width - len(p)) for p in some], device=self.device)
        stream = Stream(ids=ids_BT, segments=Segments(row, torch.zeros_like(row), length))
        with self.grid.read(slice(*piece.indices(len(prompts)))) as cache:
            route = routes[0] if len(set(routes)) == 1 else tuple(routes)
            longer, hidden_BTD = self.policy._states(trunk(self.lm), stream, route, prompted=True, past_key_values=cache)
        last = (stream if longer is None else longer.stream).segments.length - 1
        return hidden_BTD[row.to(self.device), last.to(self.device)]

    def fork(self, samples: int, most: int, *, last: bool = True) -> None:
        self.grid.open(samples, most)
        self.next_B = self.next_G.repeat_interleave(samples)
        self.routes = [r for r in self.prompt_routes for _ in range(samples)]

    def go_on(self, token_B: Tensor) -> Tensor:
        position_B, self.next_B = self.next_B, (self.next_B + 1).clamp(max=self.last)
        with self.grid.step() as plans:
            return self._forward(token_B, position_B, plans)

    def _forward(self, token_B: Tensor, position_B: Tensor, plans: dict[Any, Any]) -> Tensor:
        with attending(self.configs), using(self.frame(prefixes={}, plans=plans)):
            how = {"position_ids": position_B[:, None], "past_key_values": self.grid.cache, "use_cache": True}
            return trunk(self.lm)(input_ids=token_B[:, None], **how).last_hidden_state[:, -1]

    def keep(self, rows: Sequence[int]) -> None:
        self.grid.keep(rows)
        self.next_B = self.next_B[torch.tensor(rows, device=self.device)]
        self.routes = [self.routes[b] for b in rows]


class Growing(DynamicLayer):
    """transformers' own layer for models whose attention is their own, and for encoder-decoders: room is made for many tokens at a time."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.rooms: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As DynamicLayer's."""
        n = self.get_seq_length()
        new = n + key_states.shape[2]
        old: list[Tensor] = [self.keys, self.values] if n else []  # type: ignore[has-type]
        there = [_same_memory(o, room) for o, room in zip(old, self.rooms, strict=False)]  # not so where rows were chosen or repeated since
        if not self.rooms or new > self.rooms[0].shape[2] or not all(there):
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            shape = (key_states.shape[0], key_states.shape[1], max(round_up(new + 1, FIRST_ROOM), 3 * n // 2))
            self.rooms = [x.new_empty(*shape, x.shape[3]) for x in (key_states, value_states)]
            for room, x in zip(self.rooms, old, strict=False):
                room[:, :, :n] = x
        for room, x in zip(self.rooms, (key_states, value_states), strict=True):
            room[:, :, n:new] = x
        self.keys, self.values = (room[:, :, :new] for room in self.rooms)
        return self.keys, self.values


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


class _Cached(_Routed):
    """Rows in a cache of transformers, each with its own copy of its prompt."""

    drop_at = 0.75  # it takes a copy of what is left
    per_row: tuple[str, ...]
    cache: Any
    mask_BT: Tensor

    def fork(self, samples: int, most: int, *, last: bool = True) -> None:
        if not hasattr(self, "begun"):
            self.begun = {n: getattr(self, n) for n in self.per_row}
            self.begun_cache = self.cache
        self.cache = self.begun_cache if last else copy.deepcopy(self.begun_cache)
        if samples > 1:
            self.cache.reorder_cache(torch.arange(len(self.prompt_routes), device=self.device).repeat_interleave(samples))
        for name in self.per_row:
            setattr(self, name, self.begun[name].repeat_interleave(samples, 0))
        self.routes = [r for r in self.prompt_routes for _ in range(samples)]

    def keep(self, rows: Sequence[int]) -> None:
        index = torch.tensor(rows, device=self.device)
        self.cache.reorder_cache(index)  # the one choice of rows that layers of every kind know
        for name in self.per_row:
            setattr(self, name, getattr(self, name)[index])
        self.routes = [self.routes[b] for b in rows]


class OwnCacheSteps(_Cached):
    """A decoder that keeps its own attention continues its prompts."""

    per_row = ("mask_BT", "next_B")

    def begin(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        soft = {r: self.policy.prompt(r) for r in dict.fromkeys(self.routes)}
        lead = [0 if soft[r] is None else len(soft[r]) for r in self.routes]
        width = max(len(p) + n for p, n in zip(prompts, lead, strict=True))
        pad = self.policy.pad
        ids_BT = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=self.device)
        self.mask_BT = torch.tensor([[0] * (width - len(p) - n) + [1] * (len(p) + n) for p, n in zip(prompts, lead, strict=True)], device=self.device)
        self.padded = len({len(p) + n for p, n in zip(prompts, lead, strict=True)}) > 1
        shift_B = torch.tensor([self.policy._shift(r) + self.anatomy.first_position for r in self.routes], device=self.device)
        self.next_B = self.mask_BT.sum(1) + shift_B
        self.cache = DynamicCache(config=self.lm.config)
        self.cache.layers = [Growing() if type(x) is DynamicLayer else x for x in self.cache.layers]
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
        positions_B, self.next_B = self.next_B, (self.next_B + 1).clamp(max=self.last)
        with using(self.frame()):
            return self._forward(positions_B[:, None], input_ids=token_B[:, None])

    def _forward(self, positions_BT: Tensor, **tokens: Tensor) -> Tensor:
        # Without padding the mask says nothing, and without a mask attention takes its fast path.
        masked = {"attention_mask": self.mask_BT} if self.padded else {}
        return trunk(self.lm)(**tokens, position_ids=positions_BT, past_key_values=self.cache, use_cache=True, **masked).last_hidden_state[:, -1]


class Seq2SeqSteps(_Cached):
    """An encoder-decoder reads its prompts once and writes answers."""

    per_row = ("encoded", "mask_BT")
    encoded: Tensor

    def begin(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        lengths = torch.tensor([len(p) for p in prompts])
        width = int(lengths.max())
        ids_BT = torch.tensor([list(p) + [self.policy.pad] * (width - len(p)) for p in prompts], device=self.device)
        rows = torch.arange(len(prompts))
        frame = self.frame()
        source, self.encoded = self.policy._encode(Stream(ids=ids_BT, segments=Segments(rows, torch.zeros_like(rows), lengths)), frame.route)
        self.mask_BT = (source.segments.example(source.shape) >= 0).long().to(self.device)
        own = DynamicCache()
        own.layer_class_to_replicate = Growing
        self.cache = EncoderDecoderCache(own, DynamicCache())
        return self.go_on(torch.full((len(prompts),), self.anatomy.decoder_start, device=self.device))

    def go_on(self, token_B: Tensor) -> Tensor:
        seen = {"encoder_hidden_states": self.encoded, "encoder_attention_mask": self.mask_BT}
        with using(self.frame()):
            return self.lm.get_decoder()(input_ids=token_B[:, None], past_key_values=self.cache, use_cache=True, **seen).last_hidden_state[:, -1]
