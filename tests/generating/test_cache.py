"""The grid of answers: attention over shared prompts against attention over every row's own whole text."""

from __future__ import annotations

import pytest
import torch

from luthier.generating.cache import Grid
from luthier.generating.decoding import Growing

CPU = torch.device("cpu")


def slow(q, k, v, n_prefix, scaling, window, softcap):
    """One row, (H, d) the newest token's query; (T, H_kv, d) all keys and values; the first ``n_prefix`` are a prefix."""
    H, heads = q.shape[0], k.shape[1]
    out = torch.zeros(H, v.shape[2], dtype=torch.float64)
    for h in range(H):
        scores = (k[:, h * heads // H].double() @ q[h].double()) * (q.shape[1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if window is not None:
            age = len(k) - 1 - torch.arange(len(k))
            scores = scores.masked_fill((age >= window) & (torch.arange(len(k)) >= n_prefix), float("-inf"))
        out[h] = scores.softmax(-1) @ v[:, h * heads // H].double()
    return out


class Rows:
    """A grid of random prompts, and beside it every row's own text."""

    def __init__(self, lengths, heads, kv_heads, d, *, prefixes=None, samples=3, most=40, static=False, dtype=torch.float32, seed=0):
        self.g = torch.Generator().manual_seed(seed)
        self.heads, self.kv_heads, self.d, self.dtype = heads, kv_heads, d, dtype
        prefixes = prefixes or [0] * len(lengths)
        self.grid = Grid(2, lengths, max(lengths), max(prefixes), CPU, static=static)
        self.prefix = [p for p in prefixes for _ in range(samples)]
        text = self.some(len(lengths), max(lengths), kv_heads), self.some(len(lengths), max(lengths), kv_heads)
        with self.grid.read(slice(0, len(lengths))) as cache:
            for layer in range(2):
                cache.update(text[0].transpose(1, 2), text[1].transpose(1, 2), layer)
        self.own = []
        for i, (n, p) in enumerate(zip(lengths, prefixes, strict=True)):
            kv = self.some(p, kv_heads), self.some(p, kv_heads)
            for layer in range(2):
                if p:
                    self.grid.put_prefix(layer, i, *kv)
            self.own += [tuple(torch.cat([a, b[i, :n]]) for a, b in zip(kv, text, strict=True)) for _ in range(samples)]
        self.grid.open(samples, most)

    def some(self, *shape):
        return torch.randn(*shape, self.d, generator=self.g).to(self.dtype)

    def step(self, **how):
        """One token for every row: (what the grid says, what each row alone says)."""
        B = len(self.own)
        q, k, v = self.some(B, self.heads, 1), self.some(B, self.kv_heads, 1), self.some(B, self.kv_heads, 1)
        self.own = [tuple(torch.cat([a, b[i].transpose(0, 1)]) for a, b in zip(own, (k, v), strict=True)) for i, own in enumerate(self.own)]
        how = {"scaling": None, "window": None, "softcap": None} | how
        with self.grid.step():
            got = [self.grid.attend(layer, q, k, v, *how.values()) for layer in range(2)]
        assert torch.equal(*got)
        expected = torch.stack([slow(q[i, :, 0], *own, p, *how.values()) for i, (own, p) in enumerate(zip(self.own, self.prefix, strict=True))])
        return got[0][:, 0], expected

    def keep(self, rows):
        self.own, self.prefix = [self.own[b] for b in rows], [self.prefix[b] for b in rows]
        self.grid.keep(rows)


def close(pair, tolerance=1e-5):
    torch.testing.assert_close(pair[0].double(), pair[1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("how", [{}, {"scaling": 0.3}, {"window": 4}, {"window": 12}, {"softcap": 1.5}, {"window": 5, "softcap": 2.0, "scaling": 0.2}])
@pytest.mark.parametrize(("lengths", "prefixes"), [([9], None), ([7, 7], None), ([3, 11, 6], None), ([5, 2], [0, 3])])
def test_a_grid_attends_as_every_row_alone(lengths, prefixes, how, static):
    rows = Rows(lengths, 4, 2, 8, prefixes=prefixes, static=static)
    for _ in range(8):
        close(rows.step(**how))


@pytest.mark.parametrize(("heads", "kv_heads", "samples"), [(4, 4, 1), (4, 1, 1), (6, 2, 5), (1, 1, 4), (8, 8, 3)])
def test_heads_and_samples_stay_apart(heads, kv_heads, samples):
    rows = Rows([4, 9], heads, kv_heads, 8, samples=samples)
    for _ in range(3):
        close(rows.step())


@pytest.mark.parametrize("static", [False, True])
def test_room_is_made_for_longer_answers(static):
    rows = Rows([5], 2, 2, 4, samples=2, most=150, static=static)
    for i in range(150):
        pair = rows.step()
        if i % 21 == 0 or i in (63, 64, 127, 128, 149):
            close(pair)
    assert rows.grid.room == 150


@pytest.mark.parametrize("how", [{}, {"window": 6}])
def test_rows_leave_and_the_grid_shrinks(how):
    rows = Rows([3, 8, 5, 6], 4, 2, 8, samples=6, prefixes=[0, 2, 1, 0])
    made, sizes = torch.Generator().manual_seed(1), [rows.grid.cells]
    for left in (24, 19, 13, 13, 8, 5, 4, 2, 1):
        rows.keep(sorted(torch.randperm(len(rows.own), generator=made)[:left].tolist()))
        sizes.append(rows.grid.cells)
        for _ in range(2):
            close(rows.step(**how))
    assert sizes == sorted(sizes, reverse=True) and sizes[1] == 24 and sizes[-1] == 1 and len(set(sizes)) >= 4
    assert rows.grid.prompts == 1


def test_rows_that_only_fill_up_change_nothing():
    rows = Rows([3, 8], 4, 2, 8, samples=4)
    close(rows.step())
    rows.grid.keep([1, 5, 6, 1, 1, 5])  # as the last three, which are not looked at again
    own = rows.own
    for _ in range(3):
        q, k, v = (rows.some(6, h, 1) for h in (4, 2, 2))
        own = {b: tuple(torch.cat([a, x[i].transpose(0, 1)]) for a, x in zip(own[b], (k, v), strict=True)) for i, b in enumerate((1, 5, 6))}
        with rows.grid.step():
            got = rows.grid.attend(0, q, k, v, None, None, None)
        for i, b in enumerate((1, 5, 6)):
            torch.testing.assert_close(got[i, 0].double(), slow(q[i, :, 0], *own[b], 0, None, None, None), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("small", [0, 1 << 30])
def test_half_precision_is_attended_in_float32_where_that_is_little(small, monkeypatch):
    monkeypatch.setattr("luthier.generating.cache.SMALL", small)
    rows = Rows([40, 33], 4, 2, 16, samples=3, dtype=torch.bfloat16)
    errors = []
    for _ in range(20):
        got, expected = rows.step()
        assert got.dtype == torch.bfloat16
        errors.append(float((got.double() - expected).abs().max()))
    assert rows.grid.answers[0][0].dtype == (torch.float32 if small else torch.bfloat16)
    assert max(errors) < (6e-3 if small else 4e-2)
    rows.grid.open(2, 10)  # once more over the same prompts
    q, k = rows.some(4, 4, 1), rows.some(4, 2, 1)
    with rows.grid.step():
        assert rows.grid.attend(0, q, k, k, None, None, None).dtype == torch.bfloat16


def test_a_growing_layer_is_transformers_own_without_its_copies():
    from transformers.cache_utils import DynamicLayer

    ours, theirs = Growing(), DynamicLayer()
    made = torch.Generator().manual_seed(0)
    grown = 0
    for i, T in enumerate([5] + [1] * 200):
        B = 4 if i < 50 else 12 if i < 90 else 7
        if i == 50:
            ours.batch_repeat_interleave(3), theirs.batch_repeat_interleave(3)
        if i == 90:
            which = torch.tensor([0, 2, 3, 5, 7, 11, 1])
            ours.batch_select_indices(which), theirs.batch_select_indices(which)
        new = [torch.randn(B, 2, T, 3, generator=made) for _ in range(2)]
        before = ours.rooms
        for a, b in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(a, b)
        grown += ours.rooms is not before
        assert ours.get_seq_length() == theirs.get_seq_length() == 5 + i
    assert 3 <= grown <= 8
