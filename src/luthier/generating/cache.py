"""Keys and values while answers are sampled: a prompt's are kept once, however many answers continue it, and an answer's are written in place.

Answers stand in a grid of cells, (G prompts, n samples), all of them the same number of tokens long. One step of attention is two products a layer over what is
shared and two over what is not: the queries of a prompt's samples read its keys together, as one matrix. Nothing is concatenated from step to step, and a
prefix is put before its prompts' keys once. Rows that are decoded need not be all cells: what has finished stays in its cell, unread, until half of the grid
has, and then the grid is made smaller.

Sharing a prompt's keys and values between samples: Juravsky et al., 2024, arXiv 2402.05099 (Hydragen). As there, the products are split; differing from it,
the scores of both parts go through one softmax, since on the devices meant here they are small beside the keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, Cache
from transformers.cache_utils import CacheLayerMixin

from ..core import round_up
from ..modelling.site import current

NAME = "luthier-decoding"  # of our attention over a grid, among those of transformers; it asks for no mask
GRID = "grid"  # the grid of a frame, among its plans
FIRST_ROOM = 64  # tokens an answer has room for at first; doubled when it is full
ODD = 16  # more room than a power of two: columns a power of two apart share a cache line's place
WIDTH_MULTIPLE = 16  # of what a half-precision product sees on a CPU, where every new shape costs generated code that stays in memory
FAR = 1 << 40  # the position of what no sliding window hides
SMALL = 4 << 20  # bytes of a layer's keys and values in float32, up to which a CPU is faster with them than with halves: products of these cost more to begin

KV = tuple[Tensor, Tensor]


class Prompts(CacheLayerMixin):
    """What one layer remembers of the prompts: (G, H_kv, L, d) keys and values, text behind a prefix, padding to the right."""

    is_sliding = False

    def __init__(self, grid: Grid):
        super().__init__()
        self.grid = grid

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Room for all prompts; what is never written must be finite, for it is multiplied by zero."""
        g = self.grid
        self.keys, self.values = (x.new_zeros(g.prompts, x.shape[1], g.width, x.shape[3]) for x in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> KV:
        """Keep a prompt's; a new token's are kept by `Grid.attend`, which gets them next."""
        g = self.grid
        if g.reading is not None:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            where = (g.reading, slice(None), slice(g.lead, g.lead + key_states.shape[2]))
            self.keys[where], self.values[where] = key_states, value_states  # type: ignore[index]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """No mask is made of it."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Positions are given to every forward, so nobody counts them here."""
        return 0

    def get_max_length(self) -> int:
        """None."""
        return -1


class Grid:
    """The prompts of a batch, and the answers that continue them. ``lead``: columns that the longest prefix takes before the text."""

    def __init__(self, layers: int, lengths: Sequence[int], width: int, lead: int, device: torch.device, *, static: bool = False):
        self.prompts, self.width, self.lead, self.device = len(lengths), lead + width, lead, device
        self.layers = [Prompts(self) for _ in range(layers)]
        self.cache = Cache(layers=list(self.layers))
        self.reading: slice | None = None  # the prompts that are being read
        self.length_G = torch.tensor(lengths, device=device)
        column_L = torch.arange(-lead, width, device=device)
        self.column_L = column_L.masked_fill(column_L < 0, FAR)
        self.seen_GL = (column_L >= 0) & (column_L < self.length_G[:, None])
        self.static = static  # every step has the shapes of the last one: what a CUDA graph repeats
        self.samples = 0
        self.dtype: torch.dtype | None = None  # of attention, where it is not the model's own
        self.asked: dict[int, tuple[float | None, int | None, float | None]] = {}  # layer -> the scaling, window and soft cap of its last attention

    @contextmanager
    def read(self, rows: slice) -> Iterator[Cache]:
        """The cache for a forward over these prompts."""
        self.reading = rows
        try:
            yield self.cache
        finally:
            self.reading = None

    def put_prefix(self, layer: int, prompt: int, keys: Tensor, values: Tensor) -> None:
        """Keys and values (P, H_kv, d) that a prompt sees before its text; they end where the text begins."""
        held = self.layers[layer]
        if not held.is_initialized:  # equal blocks are run once where memory is counted
            return
        where = (prompt, slice(None), slice(self.lead - len(keys), self.lead))
        held.keys[where], held.values[where] = keys.transpose(0, 1), values.transpose(0, 1)  # type: ignore[index]
        self.seen_GL[prompt, self.lead - len(keys) : self.lead] = True

    # --- answers ------------------------------------------------------------------------------------------------------

    def open(self, samples: int, most: int) -> None:
        """Begin ``samples`` answers to every prompt, of at most ``most`` tokens."""
        self.samples, self.most, self.new = samples, most, 0
        self.row_C: Tensor | None = None  # which row's tokens each cell takes; None: rows are cells
        self.cell_B: Tensor | None = None
        self.answers: dict[int, KV] = {}  # layer -> keys (G * H_kv * n, d, room), values (G * H_kv * n, room, d)
        self.room = most if self.static else min(most, FIRST_ROOM)
        self.at = torch.zeros(1, dtype=torch.long, device=self.device)  # column of the new token; read where ``static``
        self.dtype = self.dtype or self._dtype()
        self.whole = bool(self.seen_GL.all()) if self.device.type != "meta" else False

    def _dtype(self) -> torch.dtype | None:
        """float32 on a CPU, unless that is too much to read."""
        first = self.layers[0]
        if self.device.type != "cpu" or first.keys is None or first.values is None or first.keys.dtype == torch.float32:
            return None
        each = first.keys.shape[1] * (first.keys.shape[3] + first.values.shape[3]) * 4
        return torch.float32 if each * (self.prompts * self.width + self.cells * self.most) <= SMALL else None

    def _prompts(self, layer: int) -> KV:
        """Keys (G * H_kv, L, d) and values of the prompts, in the dtype that attention computes in."""
        held = self.layers[layer]
        assert held.keys is not None and held.values is not None
        if self.dtype is not None and held.keys.dtype != self.dtype:
            held.keys, held.values = held.keys.to(self.dtype), held.values.to(self.dtype)
        return held.keys.flatten(0, 1), held.values.flatten(0, 1)

    @property
    def cells(self) -> int:
        """Answers that there is room for."""
        return self.prompts * self.samples

    def keep(self, rows: Sequence[int]) -> None:
        """Decode only these rows from now on; one may come several times, and is then decoded once and written once."""
        cells = list(range(self.cells)) if self.cell_B is None else self.cell_B.tolist()
        cells = [cells[b] for b in rows]
        by_prompt: dict[int, list[int]] = {}
        for c in dict.fromkeys(cells):
            by_prompt.setdefault(c // self.samples, []).append(c)
        most = max(len(c) for c in by_prompt.values())
        if 2 * len(by_prompt) * most <= self.cells:
            cells = self._shrink(by_prompt, most, cells)
        self.cell_B = torch.tensor(cells, device=self.device)
        row = {c: b for b, c in reversed(list(enumerate(cells)))}
        self.row_C = torch.tensor([row.get(c, 0) for c in range(self.cells)], device=self.device)
        if cells == list(range(self.cells)):
            self.cell_B = self.row_C = None

    def _shrink(self, by_prompt: dict[int, list[int]], most: int, cells: list[int]) -> list[int]:
        """A grid of these prompts with ``most`` samples each; the new cells of ``cells``."""
        kept = [own[min(j, len(own) - 1)] for own in by_prompt.values() for j in range(most)]
        where = {c: i for i, c in reversed(list(enumerate(kept)))}
        prompt, cell = (torch.tensor(x, device=self.device) for x in (list(by_prompt), kept))
        for i, (k, v) in self.answers.items():
            heads = len(k) // self.cells
            index = (cell // self.samples * heads)[:, None] + torch.arange(heads, device=self.device)
            index = (index * self.samples + (cell % self.samples)[:, None]).view(len(prompt), most, heads).transpose(1, 2).flatten()
            self.answers[i] = (k.index_select(0, index), v.index_select(0, index))
        if len(prompt) < self.prompts:
            for held in self.layers:
                held.keys, held.values = held.keys.index_select(0, prompt), held.values.index_select(0, prompt)  # type: ignore[union-attr]
        self.length_G, self.seen_GL = self.length_G[prompt], self.seen_GL[prompt]
        self.prompts, self.samples = len(prompt), most
        return [where[c] for c in cells]

    @contextmanager
    def step(self) -> Iterator[dict[Any, Any]]:
        """The plans of the frame under which the next token of every row is read."""
        if not self.static and self.new == self.room:
            self.room = min(self.most, 2 * self.room)
            self.answers = {i: self._larger(k, v) for i, (k, v) in self.answers.items()}
        self.biases: dict[Any, Tensor | None] = {}
        self.sines: tuple[Tensor, Tensor] | None = None
        yield {GRID: self}
        self.new += 1
        if self.static:
            self.at += 1

    def _larger(self, k: Tensor, v: Tensor) -> KV:
        more = self._empty(k.shape[0], k.shape[1], v.shape[2], k)
        more[0][..., : self.new], more[1][:, : self.new] = k[..., : self.new], v[:, : self.new]
        return more

    def _empty(self, batches: int, d_key: int, d_value: int, like: Tensor) -> KV:
        return like.new_zeros(batches, d_key, self.room + ODD)[..., : self.room], like.new_zeros(batches, self.room, d_value)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None, softcap: float | None) -> Tensor:
        """(B, H, 1, d) queries of new tokens, with their own keys and values (B, H_kv, 1, d) -> (B, 1, H, d)."""
        self.asked[layer] = (scaling, window, softcap)
        dtype = q.dtype
        if self.row_C is not None:
            q, k, v = (x.index_select(0, self.row_C) for x in (q, k, v))
        if self.dtype is not None:
            q, k, v = (x.to(self.dtype) for x in (q, k, v))
        G, n, H, heads = self.prompts, self.samples, q.shape[1], k.shape[1]
        groups = H // heads
        prompt_k, prompt_v = self._prompts(layer)
        answer_k, answer_v = self._write(layer, k, v)
        seen = self.room if self.static else self._width(q)
        q_XmD = q.reshape(G, n, heads, groups, -1).transpose(1, 2).reshape(G * heads, n * groups, -1)  # X: a prompt's key head
        shared_XmL = torch.bmm(q_XmD, prompt_k.transpose(1, 2))
        own_XmT = torch.bmm(q_XmD.reshape(G * heads * n, groups, -1), answer_k[..., :seen]).view(G * heads, n * groups, seen)
        scores = torch.cat([shared_XmL, own_XmT], -1)
        bias_X1L = self._bias(window, seen, heads, scores)
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        if softcap is not None:
            scores = torch.tanh(scores * (scale / softcap)) * softcap
            scale = 1.0
        if bias_X1L is not None:
            scores = torch.add(bias_X1L, scores, alpha=scale)
        elif scale != 1.0:
            scores *= scale
        weights = scores.softmax(-1)
        out = torch.bmm(weights[..., : self.width], prompt_v).view(G * heads * n, groups, -1)
        out = torch.baddbmm(out, weights[..., self.width :].view(G * heads * n, groups, seen), answer_v[:, :seen])
        out = out.view(G, heads, n, groups, -1).transpose(1, 2).reshape(G * n, 1, H, -1).to(dtype)
        return out if self.cell_B is None else out.index_select(0, self.cell_B)

    def signed(self, sin_B1d: Tensor) -> Tensor:
        """Sines that a head turned by half its width is multiplied with, the first half negative; once a step."""
        if self.sines is None or self.sines[0] is not sin_B1d:
            first, second = sin_B1d.chunk(2, -1)
            self.sines = (sin_B1d, torch.cat([-first, second], -1))
        return self.sines[1]

    def _write(self, layer: int, k: Tensor, v: Tensor) -> KV:
        """Put a token's keys and values into every cell."""
        G, n, heads = self.prompts, self.samples, k.shape[1]
        if layer not in self.answers:
            self.answers[layer] = self._empty(G * heads * n, k.shape[3], v.shape[3], k)
        own_k, own_v = self.answers[layer]
        k, v = (x.reshape(G, n, heads, -1).transpose(1, 2) for x in (k, v))
        if self.static:
            own_k.index_copy_(2, self.at, k.reshape(G * heads * n, -1, 1))
            own_v.index_copy_(1, self.at, v.reshape(G * heads * n, 1, -1))
        else:
            own_k.view(G, heads, n, -1, self.room)[..., self.new], own_v.view(G, heads, n, self.room, -1)[..., self.new, :] = k, v
        return own_k, own_v

    def _width(self, like: Tensor) -> int:
        """Columns of the answers that are looked at: those that are there, rounded up where shapes are dear."""
        few_shapes = like.device.type == "cpu" and like.dtype != torch.float32
        return min(self.room, round_up(self.new + 1, WIDTH_MULTIPLE)) if few_shapes else self.new + 1

    def _bias(self, window: int | None, seen: int, heads: int, like: Tensor) -> Tensor | None:
        """(G * H_kv or 1, 1, L + T): 0 where a new token looks, else minus infinity; None: it sees everything. Made once a step for all layers like this."""
        if window is None and self.whole and seen == self.new + 1 and not self.static:
            return None
        key = (window, heads, like.dtype)
        if key not in self.biases:
            at = self.at if self.static else self.new
            column_T = torch.arange(seen, device=self.device)
            shared_GL, own_T = self.seen_GL, column_T <= at
            if window is not None:
                shared_GL, own_T = shared_GL & (self.column_L > (self.length_G + at - window)[:, None]), own_T & (column_T > at - window)
            visible_GL = torch.cat([shared_GL, own_T.expand(self.prompts, -1)], 1)
            bias_GL = like.new_zeros(visible_GL.shape).masked_fill_(~visible_GL, float("-inf"))
            self.biases[key] = bias_GL[:, None] if self.prompts == 1 else bias_GL.repeat_interleave(heads, 0)[:, None]
        return self.biases[key]


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' attentions call while answers are sampled."""
    frame = current()
    assert frame is not None
    grid: Grid = frame.plans[GRID]
    return grid.attend(module.layer_idx, query, key, value, scaling, sliding_window, softcap), None


@contextmanager
def attending(configs: Sequence[Any]) -> Iterator[None]:
    """Let the attentions that have these configurations read the grid of the frame; they are given back as they were."""
    own = [c._attn_implementation for c in configs]
    for c in configs:
        c._attn_implementation = NAME
    try:
        yield
    finally:
        for c, was in zip(configs, own, strict=True):
            c._attn_implementation = was


AttentionInterface.register(NAME, attend)
