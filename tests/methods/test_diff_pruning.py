"""Diff pruning's phases, its exact sparsity, its sparse file, and what a run of it leaves. Its formulas: tests/reference/test_diff_pruning_equations.py."""

import copy
import json
import random
import shutil

import pytest
import torch

import tiny
from luthier.core import Incompatible, LuthierError, next_token_batch
from luthier.errors import ConfigError
from luthier.methods.diff_pruning import Method, largest
from luthier.modelling.site import restoring
from luthier.objectives.sft import Objective
from luthier.optim import Optimizer
from luthier.place.one import Place
from luthier.policy import Policy
from luthier.running.progress import Reporter
from luthier.running.starting import execute
from luthier.saving import adapter
from luthier.saving.merging import merge
from luthier.settings.config import load_run
from luthier.train import train

FAMILIES = ["llama_tied", "gpt2", "qwen3_moe", "bert"]


def attached(family="llama", **fields):
    base = tiny.base(family)
    method = Method(**fields)
    return Policy(base, method.attach(base, "default"), method=method)


def batch(n=4, seed=0):
    return next_token_batch(tiny.rows(n, seed=seed), pad=0, packed=False)


class Feed:
    def __init__(self):
        self.step = 0

    def __next__(self):
        self.step += 1
        return [Objective().collate(tiny.rows(4, seed=self.step), pad=0, packed=False)]


def fit(policy, steps=6, lr=1e-2):
    optimizer = Optimizer(policy.trained(), lr=lr, weight_decay=0.01, patterns=policy.delta.optim)
    return list(train(policy, Objective(), Feed(), optimizer, lr=lambda _: lr, steps=steps, place=Place(on="cpu")))


def differing(family, policy):
    """Names and counts of weights that are not the base's, as a model that reads them sees it."""
    plain, out = dict(tiny.base(family).model.named_parameters()), {}
    policy.eval()
    for name, own in plain.items():
        path, _, leaf = name.rpartition(".")
        if count := int((getattr(policy.lm.get_submodule(path), leaf) != own).sum()):
            out[name] = count
    return out


@pytest.mark.parametrize("share", [0.001, 0.005, 0.1])
@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_share_of_all_parameters_differs_in_the_end(family, share):
    policy = attached(family, share=share)
    total = sum(p.numel() for p in policy.lm.parameters())
    fit(policy)
    found = differing(family, policy)
    assert sum(found.values()) == round(share * total)
    holders = [policy.lm.get_submodule(n.rpartition(".")[0]) for n in found]
    assert not any(isinstance(m, torch.nn.Embedding) for m in holders) and "lm_head.weight" not in found
    packed = policy.delta.pack()
    assert sum(v.numel() for k, v in packed.items() if k.endswith(".value")) == round(share * total)


def test_the_kept_are_the_largest_and_training_goes_on_among_them():
    policy = attached(share=0.02, search=0.5, gate_start=1.0)
    seen = {}
    optimizer = Optimizer(policy.trained(), lr=1e-2, patterns=policy.delta.optim)
    parts = policy.delta.on_step.__self__.parts
    for s in train(policy, Objective(), Feed(), optimizer, lr=lambda _: 1e-2, steps=6, place=Place(on="cpu")):
        if s.step == 3:  # the next step begins with pruning
            assert policy.delta.pending()
            seen = {k: p.change().clone() for k, p in parts.items()}
        if s.step == 4:
            assert not policy.delta.pending()
            after = {k: p.value.detach().clone() for k, p in parts.items()}
    every = torch.cat([v.abs().flatten() for v in seen.values()])
    kept = torch.cat([p.mask.flatten() for p in parts.values()])
    assert float(every[kept].min()) >= float(every[~kept].max()) and int(kept.sum()) == round(0.02 * sum(p.numel() for p in policy.lm.parameters()))
    assert any(not torch.equal(after[k][p.mask], p.value.detach()[p.mask]) for k, p in parts.items())
    assert all(torch.equal(p.mask, parts[k].mask) for k, p in parts.items())


@pytest.mark.parametrize("k", [1, 7, 50, 95])
def test_largest_is_a_sort_of_everything(k):
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=g) for s in ((5, 7), (40,), (2, 2, 5))]
    everything = torch.cat([t.flatten() for t in tensors])
    wanted = torch.zeros(95, dtype=torch.bool)
    wanted[everything.argsort(descending=True)[:k]] = True
    assert torch.equal(torch.cat([m.flatten() for m in largest(tensors, k)]), wanted)
    ties = largest([torch.zeros(30), torch.ones(30), torch.zeros(30)], 40)
    assert [int(m.sum()) for m in ties][1] == 30 and sum(int(m.sum()) for m in ties) == 40


def test_where_too_few_gates_are_open_the_rest_is_the_largest_behind_closed_ones():
    policy = attached(share=0.01, structured=False)
    parts = policy.delta.on_step.__self__.parts
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in parts.values():
            p.value.copy_(torch.randn(p.value.shape, generator=g))
            p.gate.fill_(-9.0)
        first = next(iter(parts.values()))
        first.gate.view(-1)[:10] = 9.0
        first.value.view(-1)[:10] = 1e-3
        every = torch.cat([p.value.abs().flatten() for p in parts.values()])
    policy.delta.on_step(1, 2)
    kept = torch.cat([p.mask.flatten() for p in parts.values()])
    assert bool(first.mask.view(-1)[:10].all()) and int(kept.sum()) == (k := policy.delta.on_step.__self__.kept)
    rest = kept.clone()
    rest[:10] = False
    assert torch.equal(rest.nonzero(), (every >= every.topk(k - 10).values.min()).nonzero())
    assert torch.equal(first.value.detach().view(-1)[:10], torch.full((10,), 1e-3)) and not any(bool(p.value.any()) for p in list(parts.values())[1:])


def test_the_noise_of_a_step_is_a_function_of_seed_and_step():
    policies = [attached(), attached(), attached()]
    torch.manual_seed(5)
    base = tiny.base("llama")
    torch.manual_seed(6)
    policies.append(Policy(base, Method().attach(base, "default"), method=Method()))

    def noise(policy, step):
        policy.delta.on_step(step, 20)
        return next(iter(policy.delta.on_step.__self__.parts.values())).noise.clone()

    first = [noise(policies[0], s) for s in range(4)]
    assert torch.equal(noise(policies[1], 3), first[3])  # without the steps before it
    assert not torch.equal(first[2], first[3])
    assert not torch.equal(noise(policies[3], 3), first[3])  # another seed


def test_noise_is_one_for_all_micro_batches_and_recomputation_of_a_step():
    policy = attached("gpt2", gate_start=0.5)
    tiny.randomise({k: p for k, p in policy.delta.params.items() if k.endswith(".value")}, std=0.02)
    policy.delta.on_step(0, 10)
    policy.train()

    def gradients():
        for p in policy.delta.params.values():
            p.grad = None
        out = Objective().loss(policy, batch()).sums["tokens"]
        out.backward()
        return float(out.detach()), {k: p.grad.clone() for k, p in policy.delta.params.items()}

    plain = gradients()
    assert gradients()[0] == plain[0]
    policy.lm.activation_checkpointing_enable({"use_reentrant": False, "context_fn": restoring})
    again = gradients()
    assert again[0] == plain[0] and all(torch.equal(again[1][k], g) for k, g in plain[1].items())
    assert sum(bool(g.any()) for k, g in plain[1].items() if k.endswith(".gate")) > 5
    policy.delta.on_step(1, 10)
    assert gradients()[0] != plain[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_never_moves_and_is_there_in_every_phase(family):
    policy, plain = attached(family), Policy(tiny.base(family))
    with torch.no_grad():
        expected = plain.eval().hidden(batch())
    before = copy.deepcopy(policy.lm.state_dict())
    optimizer = Optimizer(policy.trained(), lr=1e-2, patterns=policy.delta.optim)
    for _ in train(policy, Objective(), Feed(), optimizer, lr=lambda _: 1e-2, steps=4, place=Place(on="cpu")):
        with policy.reference():
            assert torch.equal(policy.hidden(batch()), expected)
    assert all(torch.equal(v, before[k]) for k, v in policy.lm.state_dict().items())


def test_the_penalty_is_charged_while_gates_are_searched_and_closes_them():
    cheap, dear = attached(penalty=0.0), attached(penalty=1e-2)
    for policy in (cheap, dear):
        policy.history = fit(policy, 8, lr=1e-2)
    assert cheap.history[0].metrics["penalty"] == 0
    assert dear.history[0].metrics["penalty"] > dear.history[3].metrics["penalty"] > 0
    assert [s.metrics["penalty"] for s in dear.history[4:]] == [0.0] * 4
    mean = {n: torch.cat([p.detach().flatten() for k, p in d.delta.params.items() if k.endswith(".gate")]).mean() for n, d in (("c", cheap), ("d", dear))}
    assert float(mean["d"]) < float(mean["c"]) - 0.3  # of four steps: once the mask is fixed gates get no gradient, and rest


def test_a_tensor_whose_gate_is_shut_by_chance_is_said_to_rest():
    policy = attached(gate_start=0.0)
    optimizer = Optimizer(policy.trained(), lr=1e-3)
    # Later, Adam's momentum moves a value whose gate is shut.
    next(train(policy, Objective(), Feed(), optimizer, lr=lambda _: 1e-3, steps=30, place=Place(on="cpu")))
    moved = {k: bool(p.any()) for k, p in policy.delta.params.items() if k.endswith(".value")}
    assert policy.delta.resting() == {k for k, m in moved.items() if not m} and 0 < len(policy.delta.resting()) < len(moved)


def test_gates_learn_at_a_rate_of_their_own():
    policy = attached(gate_lr=0.05)
    optimizer = Optimizer(policy.trained(), lr=1e-3, weight_decay=0.1, patterns=policy.delta.optim)
    factor = {n: g.lr_factor for g in optimizer.groups for n in g.names}
    decay = {n: s["weight_decay"] for g, s in zip(optimizer.groups, optimizer.adam.param_groups, strict=True) for n in g.names}
    assert {k.rsplit(".", 1)[1]: f for k, f in factor.items()} == {"value": 1.0, "gate": pytest.approx(50.0), "group": pytest.approx(50.0)}
    assert {k.rsplit(".", 1)[1] for k, d in decay.items() if d} == {"value"}


def test_saved_it_is_places_and_values_and_restored_it_serves_the_same():
    policy = attached("gpt2")
    fit(policy)
    policy.eval()
    kept = adapter.tensors_of(policy)
    assert {k.rsplit(".", 1)[1] for k in kept} == {"index", "value"}
    assert all(v.dtype == (torch.int32 if k.endswith("index") else torch.float32) for k, v in kept.items())
    again = attached("gpt2")
    adapter.restore(again, kept, "here")
    with torch.no_grad():
        torch.testing.assert_close(again.eval().hidden(batch()), policy.hidden(batch()), atol=0, rtol=0)
    mine = adapter.tensors_of(again)
    assert set(mine) == set(kept) and all(torch.equal(mine[k], kept[k]) for k in kept)
    assert again.delta.trainable == sum(v.numel() for k, v in kept.items() if k.endswith("value"))
    with again.reference(), torch.no_grad():
        assert torch.equal(again.hidden(batch()), Policy(tiny.base("gpt2")).eval().hidden(batch()))


def test_going_on_from_a_saved_one_trains_its_values_and_moves_no_place():
    policy = attached("gpt2")
    fit(policy)
    kept = adapter.tensors_of(policy)
    again = attached("gpt2")
    adapter.restore(again, kept, "here")
    losses = [s.loss for s in fit(again, 4)]
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    after = adapter.tensors_of(again)
    assert all(torch.equal(after[k], v) for k, v in kept.items() if k.endswith("index"))
    assert all(not torch.equal(after[k], v) for k, v in kept.items() if k.endswith("value"))
    assert sum(differing("gpt2", again).values()) == sum(v.numel() for k, v in kept.items() if k.endswith("value"))


def test_a_file_of_another_base_is_refused():
    policy = attached("gpt2")
    fit(policy)
    kept = adapter.tensors_of(policy)
    key = next(k for k in kept if k.endswith("index"))
    kept[key] = kept[key] + 10_000_000
    with pytest.raises(LuthierError, match="lies outside this tensor"):
        adapter.restore(attached("gpt2"), kept, "here")
    with pytest.raises(LuthierError, match="does not fit this base"):
        adapter.restore(attached("llama"), adapter.tensors_of(policy), "here")


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("family", FAMILIES[:3])
def test_folded_after_training_equals_attached_and_leaves_the_bases_classes(family, restored):
    policy = attached(family)
    fit(policy)
    if restored:
        kept, policy = adapter.tensors_of(policy), attached(family)
        adapter.restore(policy, kept, "here")
    policy.eval()
    with torch.no_grad():
        before = policy.hidden(batch())
        policy.fold()
        assert torch.equal(policy.hidden(batch()), before)
        assert not torch.equal(before, Policy(tiny.base(family)).eval().hidden(batch()))
    assert {type(m) for m in policy.lm.modules()} == {type(m) for m in tiny.model(family).modules()}


def test_merged_and_opened_by_plain_transformers_it_is_the_same_model(tmp_path):
    policy = attached("llama_tied")
    fit(policy)
    merged = merge(policy, tmp_path / "m")
    assert merged.folded == 0 and merged.reopened < 1e-6 and merged.same_greedy


def test_tied_embeddings_differ_as_one_tensor():
    policy = attached("llama_tied", embeddings=True, share=0.3)
    assert sum(k.endswith(".value") for k in policy.delta.params) == len(list(policy.lm.parameters()))
    fit(policy)
    lm = policy.eval().lm
    assert torch.equal(lm.lm_head.weight, lm.model.embed_tokens.weight) and not torch.equal(lm.lm_head.weight, lm.lm_head._parameters["weight"])


def test_in_a_16_bit_base_differences_below_its_resolution_still_add_up():
    base = tiny.base("llama")
    base.model.to(torch.bfloat16)
    method = Method(gate_start=9.0, structured=False)
    policy = Policy(base, method.attach(base, "default"), method=method)
    key, value = next((k, p) for k, p in policy.delta.params.items() if k.endswith("norm:weight.value"))
    module = base.model.get_submodule(key.split(":")[0])
    seen = set()
    with torch.no_grad():
        for _ in range(100):
            value += 1e-4  # a 78th of what bf16 tells apart at 1
            seen.add(float(module.weight[0]))
        assert module.weight.dtype == torch.bfloat16 and seen == {1.0, 1.0078125}


def test_what_cannot_be_done_is_said():
    with pytest.raises(Incompatible, match=r"method\.share: 1 of all parameters are .* are open to change; use less, or embeddings"):
        attached(share=1.0)
    for fields, said in (({"low": 0.1}, "low: must be below 0"), ({"high": 1.0}, "high: must be above 1"), ({"share": 0.0}, "share: must be above 0")):
        with pytest.raises(ConfigError, match=said):
            Method(**fields)
    with pytest.raises(LuthierError, match="at least 2 steps"):
        fit(attached(), 1)
    policy = attached()
    policy.delta.on_step(0, 4)
    with pytest.raises(LuthierError, match="nothing is pruned yet"):
        policy.delta.pack()


@pytest.mark.parametrize(("search", "boundary"), [(0.0, 1), (0.5, 5), (1.0, 9)])
def test_at_least_one_step_searches_and_one_trains_what_was_kept(search, boundary):
    policy = attached(search=search)
    phases = []
    optimizer = Optimizer(policy.trained(), lr=1e-3)
    for _ in train(policy, Objective(), Feed(), optimizer, lr=lambda _: 1e-3, steps=10, place=Place(on="cpu")):
        phases.append(policy.delta.pending())
    assert phases == [True] * boundary + [False] * (10 - boundary)


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny base and a data file."""
    folder = tmp_path_factory.mktemp("home")
    tiny.folder(folder / "base")
    rng = random.Random(0)
    with (folder / "data.jsonl").open("w") as f:
        for _ in range(60):
            prompt = " ".join(rng.choices(["red", "green", "blue", "one", "two"], k=rng.randint(1, 5)))
            f.write(json.dumps({"prompt": prompt, "completion": prompt.upper()}) + "\n")
    return folder


def run_of(home, out, *more):
    shape = "optim.steps=10 optim.batch_tokens=300 optim.lr=1e-2 evaluate.every_steps=5 evaluate.samples=0 checkpoint.every_steps=1 checkpoint.keep=20"
    fixed = [f"model={home / 'base'}", f"data.train={home / 'data.jsonl'}", f"out={out}", "name=r", "precision=float32", *shape.split()]
    return load_run(None, [*fixed, "method.kind=diff_pruning", "method.gate_start=1", *more])


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    """A finished run, and its result."""
    out = tmp_path_factory.mktemp("whole")
    return out / "r", execute(run_of(home, out), reporter=Reporter(quiet=True))


def saved(folder):
    return adapter.read_tensors(folder / "adapter" / adapter.DELTA)


@pytest.mark.parametrize("step", [2, 5, 8])  # while gates are searched, right before pruning, and long after it
def test_a_run_resumes_to_the_same_bits_from_every_phase(whole, tmp_path, step):
    shutil.copytree(whole[0], tmp_path / "r")
    for path in (tmp_path / "r" / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    for name in ("adapter", "best"):
        if name == "adapter" or step <= 5:
            shutil.rmtree(tmp_path / "r" / name)
    execute(load_run(str(whole[0] / "run.yaml")), resume=tmp_path / "r", reporter=Reporter(quiet=True))
    first, again = saved(whole[0]), saved(tmp_path / "r")
    assert set(first) == set(again) and all(torch.equal(first[k], again[k]) for k in first)
    losses = [
        [(x["step"], x["loss"]) for x in map(json.loads, (f / "metrics.jsonl").read_text().splitlines()) if x["event"] == "train"]
        for f in (whole[0], tmp_path / "r")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 10


def test_the_best_of_a_run_is_of_the_sparse_form_and_so_is_the_file(home, whole):
    folder, result = whole
    assert result.best_step > 5 and result.after.loss.value < result.before.loss.value
    tensors = saved(folder)
    total = sum(p.numel() for p in tiny_base(home).parameters())
    assert sum(v.numel() for k, v in tensors.items() if k.endswith(".value")) == round(0.005 * total)
    size = (folder / "adapter" / adapter.DELTA).stat().st_size
    assert size < 0.05 * 4 * total + 10_000


def tiny_base(home):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(home / "base")


def test_a_run_reopens_as_it_was_measured_and_another_can_start_from_it(home, whole, tmp_path):
    from luthier.opening import load

    folder, result = whole
    policy = load(folder, model=str(home / "base"), precision="float32")
    first = saved(folder)
    assert all(torch.equal(policy.delta.params.get(k, policy.delta.buffers.get(k)), v) for k, v in first.items())
    second = execute(run_of(home, tmp_path, f"method.from={folder}", "optim.steps=3"), reporter=Reporter(quiet=True))
    assert second.before.loss.value == pytest.approx(result.after.loss.value, rel=1e-5)
    assert all(torch.equal(saved(tmp_path / "r")[k], v) for k, v in first.items() if k.endswith("index"))


def test_early_stopping_waits_until_it_is_pruned(home, tmp_path):
    result = execute(
        run_of(home, tmp_path, "optim.lr=0.5", "optim.clip=0", "evaluate.patience=1", "evaluate.every_steps=2", "optim.steps=12"), reporter=Reporter(quiet=True)
    )
    assert result.steps > 6 and result.best_step > 6
