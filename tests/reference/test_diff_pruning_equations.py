"""A whole diff pruning, search, pruning and fixed-mask finish, against the paper's equations written out in plain PyTorch."""

import math

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import tiny
from luthier import build
from luthier.core import IGNORE
from luthier.methods.diff_pruning import Method
from luthier.objectives.sft import Objective
from luthier.optim import Optimizer
from luthier.place.one import Place
from luthier.policy import Policy
from luthier.train import train

STEPS, SEARCH, LR, GATES, PENALTY, SHARE, START = 8, 5, 5e-3, 0.1, 1e-4, 0.03, 1.0


class Feed:
    def __init__(self):
        self.step = 0

    def __next__(self):
        self.step += 1
        rows = tiny.rows(4, seed=self.step)
        return [Objective().collate(rows[:2], pad=0, packed=False), Objective().collate(rows[2:], pad=0, packed=False)]


def start(shape):
    """Differences to begin with: from zero, Adam moves all of them equally far, and which are the largest is rounding alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape.numel())) * 0.02


def ours(family, structured, temperature):
    """Losses, penalties, the noise of each step by weight, and the delta."""
    base = build.adopt(tiny.model(family))
    method = Method(
        share=SHARE, structured=structured, search=SEARCH / STEPS, penalty=PENALTY, gate_lr=GATES, gate_start=START, temperature=temperature, low=-0.8, high=1.3
    )
    policy = Policy(base, method.attach(base, "default"), method=method)
    with torch.no_grad():
        for k, value in policy.delta.params.items():
            if k.endswith(".value"):
                value.copy_(start(value.shape))
    optimizer = Optimizer(policy.trained(), lr=LR, weight_decay=0.01, patterns=policy.delta.optim)
    parts = policy.delta.on_step.__self__.parts
    noise, steps = [], []
    for s in train(policy, Objective(), Feed(), optimizer, lr=lambda _: LR, steps=STEPS, clip=0, place=Place(on="cpu")):
        noise.append({k: (p.noise.clone(), None if p.group_noise is None else p.group_noise.clone()) for k, p in parts.items() if p.noise is not None})
        steps.append(s)
    return policy, steps, noise


def slowly(family, structured, temperature, noise):
    """The same with plain tensors: losses, penalties, and the difference by name."""
    low, high = -0.8, 1.3
    model = tiny.model(family).requires_grad_(False)
    own = dict(model.named_parameters())
    total = sum(p.numel() for p in own.values())
    open_ = {n: p for n, p in own.items() if not any(k in n for k in ("embed_tokens", "wte", "wpe", "lm_head"))}
    w = {n: start(p.shape).requires_grad_() for n, p in open_.items()}
    a = {n: torch.full_like(p, START, requires_grad=True) for n, p in open_.items()}
    g = {n: torch.full((), START, requires_grad=True) for n in open_} if structured else {}

    def gate(x, e):
        return (torch.sigmoid((x + e) / temperature) * (high - low) + low).clamp(min=0).clamp(max=1)

    def still(x):
        return (torch.sigmoid(x) * (high - low) + low).clamp(min=0).clamp(max=1)

    def chance(x):
        return torch.sigmoid(x - temperature * math.log(-low / high))

    values = list(w.values())
    adam = torch.optim.AdamW(
        [
            {"params": [p for p in values if p.ndim >= 2], "lr": LR, "weight_decay": 0.01},
            {"params": [p for p in values if p.ndim < 2], "lr": LR, "weight_decay": 0.0},
            {"params": [*a.values(), *g.values()], "lr": GATES, "weight_decay": 0.0},
        ]
    )
    key = lambda n: ":".join(n.rsplit(".", 1))  # noqa: E731
    feed, losses, penalties, mask = Feed(), [], [], None
    model.train()
    for step in range(STEPS):
        if step == SEARCH:
            with torch.no_grad():
                change = {n: still(a[n]) * w[n] * (still(g[n]) if structured else 1) for n in open_}
                order = torch.cat([c.abs().flatten() for c in change.values()]).argsort(descending=True)
                flat = torch.zeros(len(order), dtype=torch.bool)
                assert sum(int((c != 0).sum()) for c in change.values()) > 2 * SHARE * total  # enough gates are open to choose among
                flat[order[: round(SHARE * total)]] = True
                mask = dict(
                    zip(open_, (m.view(open_[n].shape) for n, m in zip(open_, flat.split([p.numel() for p in open_.values()]), strict=True)), strict=True)
                )
                for n in open_:
                    w[n].copy_(change[n] * mask[n])
        batches = next(feed)
        units = sum(b.units["tokens"] for b in batches)
        loss = torch.zeros(())
        for b in batches:
            if mask is None:
                parts = {n: gate(a[n], noise[step][key(n)][0]) * w[n] * (gate(g[n], noise[step][key(n)][1]) if structured else 1) for n in open_}
            else:
                parts = {n: w[n] * mask[n] for n in open_}
            seen = b.segments.example(b.shape) >= 0
            weights = own | {n: own[n] + parts[n] for n in open_}
            logits = functional_call(model, weights, kwargs={"input_ids": b.ids, "attention_mask": seen.long()}, tie_weights=True).logits
            loss = loss + cross_entropy(logits.flatten(0, 1), b.targets.flatten(), ignore_index=IGNORE, reduction="sum") / units
        price = torch.zeros(())
        if mask is None:
            for n in open_:
                price = price + PENALTY * (chance(a[n]) * (chance(g[n]) if structured else 1)).sum()
        (loss + price).backward()
        if mask is not None:
            for p in [*a.values(), *g.values()]:
                p.grad = torch.zeros_like(p)
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
        penalties.append(price.item())
    return losses, penalties, {key(n): (w[n] * mask[n]).detach() for n in open_}


@pytest.mark.parametrize(("structured", "temperature"), [(True, 1.0), (False, 1.0), (True, 0.7)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_run_equals_the_equations_written_out(family, structured, temperature):
    policy, steps, noise = ours(family, structured, temperature)
    losses, penalties, difference = slowly(family, structured, temperature, noise)
    assert [len(n) > 0 for n in noise] == [True] * SEARCH + [False] * (STEPS - SEARCH)
    assert [s.loss for s in steps] == pytest.approx(losses, rel=2e-5)
    assert [s.metrics["penalty"] for s in steps] == pytest.approx(penalties, rel=1e-5) and penalties[0] > 0
    packed = policy.delta.pack()
    found = {k: torch.zeros(d.numel()) for k, d in difference.items()}
    for k, t in found.items():
        if f"{k}.index" in packed:
            t[packed[f"{k}.index"].long()] = packed[f"{k}.value"]
    everything = torch.cat(list(found.values()))
    expected = torch.cat([difference[k].flatten() for k in found])
    assert int((expected != 0).sum()) == int((everything != 0).sum()) > 500
    torch.testing.assert_close(everything, expected, atol=1e-4, rtol=1e-3)
