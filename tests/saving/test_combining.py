"""Combinations of LoRA deltas: against slow loops over single entries, and against PEFT's add_weighted_adapter."""

import json
import warnings

import pytest
import torch

import tiny
from luthier.core import LuthierError
from luthier.deltas.lowrank import Pair
from luthier.methods.lora import Method
from luthier.policy import Policy
from luthier.saving import adapter, combining
from luthier.saving.combining import combine, concatenated, dare, decomposed, ties, truncated

IDS = torch.tensor([[5, 9, 11, 20, 33, 7]])
PARTS = {  # of unlike ranks, scales and targets; the embedding in both
    "a": {"targets": ("query", "value", "embedding"), "rank": 4, "alpha": 6.0},
    "b": {"targets": ("query", "down", "embedding"), "rank": 2, "alpha": 5.0, "rank_stabilised": True},
}


def saved(folder, name, family="llama", seed=None, **how):
    base = tiny.base(family)
    base.hash = "one"
    method = Method(**(PARTS[name] | how))
    policy = Policy(base, method.attach(base, "default"), method=method).eval()
    tiny.randomise(policy.delta.params, seed=seed if seed is not None else len(name) + ord(name[0]), std=0.3)
    adapter.save(policy, folder / name)
    return policy


def changes(policy):
    """Dense changes by path, (out, in)."""
    pairs = {path: policy.lm.get_submodule(path).edits["default"].pair() for path in {k.partition(":")[0] for k in policy.delta.params}}
    return {path: p.scale * (p.b @ p.a).detach() for path, p in pairs.items()}


def both(tmp_path, family="llama"):
    return {n: changes(saved(tmp_path, n, family)) for n in PARTS}


def combined(tmp_path, how="linear", family="llama", weights=(0.7, -0.3), **more):
    done = combine([(tmp_path / "a", weights[0]), (tmp_path / "b", weights[1])], tmp_path / "c", how=how, **more)
    base = tiny.base(family)
    base.hash = "one"
    policy = adapter.load(base, tmp_path / "c").eval()
    return done, policy


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_linear_is_the_weighted_sum_exactly(family, tmp_path):
    parts = both(tmp_path, family)
    done, policy = combined(tmp_path, family=family)
    mine = changes(policy)
    assert set(mine) == set(parts["a"]) | set(parts["b"]) and done.lost == 0.0 and done.rank == 6
    for path, change in mine.items():
        want = sum(w * parts[n][path] for n, w in (("a", 0.7), ("b", -0.3)) if path in parts[n])
        torch.testing.assert_close(change, want, atol=1e-6, rtol=1e-5)
    ranks = {k: len(p) for k, p in policy.delta.params.items() if k.endswith("_A")}
    assert set(ranks.values()) == ({2, 4, 6} if family == "llama" else {2, 6})  # GPT-2's query and value are one matrix


def slow_ties(changes, weights, density):
    """Entry by entry, as section 3 tells it."""
    out, kept = torch.zeros_like(changes[0]), []
    for c in changes:
        order = sorted(range(c.numel()), key=lambda i: -abs(float(c.flatten()[i])))[: int(density * c.numel())]
        kept.append({i: float(c.flatten()[i]) for i in order})
    for i in range(out.numel()):
        values = [k.get(i, 0.0) for k in kept]
        sign = 1.0 if sum(values) >= 0 else -1.0
        agree = [(w, v) for w, v in zip(weights, values, strict=True) if v * sign > 0]
        if agree:
            out.view(-1)[i] = sum(w * v for w, v in agree) / len(agree)
    return out


def test_ties_is_the_slow_loop():
    g = torch.Generator().manual_seed(0)
    three = [torch.randn(7, 9, generator=g) for _ in range(3)]
    for density in (0.1, 0.5, 1.0):
        torch.testing.assert_close(ties(three, [0.5, 1.0, -2.0], density), slow_ties(three, [0.5, 1.0, -2.0], density), atol=1e-6, rtol=1e-5)


def test_dare_keeps_the_mean_drops_its_share_and_repeats_by_seed():
    one, two = torch.ones(200, 300), torch.full((200, 300), 2.0)
    out = dare([one, two], [0.5, 1.0], 0.25, [1, 2])
    again = dare([one, two], [0.5, 1.0], 0.25, [1, 2])
    assert torch.equal(out, again) and not torch.equal(out, dare([one, two], [0.5, 1.0], 0.25, [3, 2]))
    values, counts = out.unique(return_counts=True)
    torch.testing.assert_close(values, torch.tensor([0.0, 2.0, 8.0, 10.0]))  # none, one / 0.25 * 0.5, two / 0.25, both
    share = counts / counts.sum()
    torch.testing.assert_close(share, torch.tensor([0.5625, 0.1875, 0.1875, 0.0625]), atol=0.01, rtol=0)
    assert float(out.mean()) == pytest.approx(2.5, abs=0.05)


@pytest.mark.parametrize("how", ["ties", "dare"])
def test_the_folder_holds_the_best_pair_of_the_rank(how, tmp_path):
    parts = both(tmp_path)
    done, policy = combined(tmp_path, how, rank=3, density=0.4, seed=7)
    mine = changes(policy)
    lost = total = 0.0
    paths = list(dict.fromkeys([*sorted_like(tmp_path / "a"), *sorted_like(tmp_path / "b")]))
    paths.sort(key=lambda p: "embed" not in p)
    for number, path in enumerate(paths):
        here = [(i, w, parts[n][path]) for i, (n, w) in enumerate((("a", 0.7), ("b", -0.3))) if path in parts[n]]
        dense = (
            slow_ties([c for *_, c in here], [w for _, w, _ in here], 0.4)
            if how == "ties"
            else dare([c for *_, c in here], [w for _, w, _ in here], 0.4, [combining._seed(7, i, number) for i, *_ in here])
        )
        u, s, vt = torch.linalg.svd(dense, full_matrices=False)
        torch.testing.assert_close(mine[path], u[:, :3] * s[:3] @ vt[:3], atol=1e-5, rtol=1e-4)
        lost, total = lost + float(s[3:].square().sum()), total + float(s.square().sum())
    assert done.lost == pytest.approx((lost / total) ** 0.5, rel=1e-4) and 0 < done.lost < 1
    assert json.loads((tmp_path / "c" / "luthier.json").read_text())["combined"]["density"] == 0.4


def sorted_like(folder):
    from luthier.deltas.lowrank import from_peft

    config, _ = adapter.describe(folder)
    return list(from_peft(config, adapter.read_tensors(folder / adapter.WEIGHTS)))


@pytest.mark.parametrize(("how", "theirs"), [("linear", "svd"), ("linear", "cat"), ("ties", "ties_svd")])
def test_peft_combines_alike(how, theirs, tmp_path):
    """Its cat is our linear, its svd ours with a rank, its ties_svd our ties. Its dare draws other numbers."""
    peft = pytest.importorskip("peft")
    for name in PARTS:
        saved(tmp_path, name, targets=("query", "down"), rank=4, seed=ord(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(tiny.model("llama").eval(), tmp_path / "a", adapter_name="a")
        model.load_adapter(tmp_path / "b", "b")
        model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "c", combination_type=theirs, svd_rank=3, density=0.4)
        model.set_adapter("c")
    rank = None if theirs == "cat" else 3
    _, policy = combined(tmp_path, how, weights=(0.7, 0.3), rank=rank, **({"density": 0.4} if how == "ties" else {}))
    with torch.no_grad():
        a, b = policy.lm(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits
    largest = float((a - b).abs().max())
    assert largest < 2e-5, f"largest difference {largest:.1e}"


def test_a_lower_rank_of_a_sum_is_its_truncated_svd():
    g = torch.Generator().manual_seed(0)
    pairs = [(Pair(torch.randn(3, 20, generator=g), torch.randn(12, 3, generator=g), 0.5), w) for w in (1.0, -2.0)]
    whole = concatenated(pairs)
    dense = whole.b @ whole.a
    pair, lost, size = truncated(whole, 2)
    u, s, vt = torch.linalg.svd(dense, full_matrices=False)
    torch.testing.assert_close(pair.b @ pair.a, u[:, :2] * s[:2] @ vt[:2], atol=1e-4, rtol=1e-4)
    assert lost == pytest.approx(float(s[2:].norm()), rel=1e-4) and size == pytest.approx(float(dense.norm()), rel=1e-4)


def test_a_large_matrix_is_decomposed_nearly_as_well_as_it_can_be(monkeypatch):
    g = torch.Generator().manual_seed(0)
    dense = torch.randn(300, 200, generator=g) * torch.rand(200, generator=g) ** 3
    _, best, size = decomposed(dense, 8)
    monkeypatch.setattr(combining, "DENSE", 100)
    before = torch.get_rng_state()
    _, near, _ = decomposed(dense, 8)
    assert best < near <= 1.005 * best < size
    assert torch.equal(torch.get_rng_state(), before)


def test_what_does_not_add_up_is_refused(tmp_path):
    for name in PARTS:
        saved(tmp_path, name)
    a, b = tmp_path / "a", tmp_path / "b"
    for message, parts, how in (
        ("at least two", [(a, 1.0)], {}),
        ("--density: linear keeps", [(a, 1.0), (b, 1.0)], {"density": 0.5}),
        ("--density: must be above 0", [(a, 1.0), (b, 1.0)], {"density": 0.0, "how": "ties"}),
        ("no such folder", [(a, 1.0), (tmp_path / "x", 1.0)], {}),
    ):
        with pytest.raises(LuthierError, match=message):
            combine(parts, tmp_path / "c", **how)
    ours = json.loads((b / "luthier.json").read_text())
    (b / "luthier.json").write_text(json.dumps(ours | {"base": ours["base"] | {"hash": "two"}}))
    with pytest.raises(LuthierError, match="trained on different bases"):
        combine([(a, 1.0), (b, 1.0)], tmp_path / "c")
    config = json.loads((b / "adapter_config.json").read_text())
    (b / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(LuthierError, match="only plain LoRA adapters are combined"):
        combine([(a, 1.0), (b, 1.0)], tmp_path / "c")
    assert not (tmp_path / "c").exists()
