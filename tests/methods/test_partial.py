"""Which tensors `partial` chooses, that it trains them as full fine-tuning would, and what a run of it leaves."""

import copy
import json
import random
import shutil

import pytest
import torch

import tiny
from luthier.core import Incompatible, next_token_batch
from luthier.errors import ConfigError
from luthier.methods.full import Method as Full
from luthier.methods.partial import Method
from luthier.modelling.site import restoring
from luthier.objectives.sft import Objective
from luthier.optim import Optimizer
from luthier.place.one import Place
from luthier.policy import Policy
from luthier.running.progress import Reporter
from luthier.running.starting import execute
from luthier.saving import adapter
from luthier.settings.config import load_run
from luthier.train import train


def chosen(family, **fields):
    base = tiny.base(family)
    return set(Method(**fields).attach(base, "default").params), base.model


def keys(model, test):
    """Keys of the parameters whose name passes."""
    return {":".join(n.rsplit(".", 1)) for n, _ in model.named_parameters() if test(n)}


class Feed:
    def __init__(self):
        self.step = 0

    def __next__(self):
        self.step += 1
        return [Objective().collate(tiny.rows(4, seed=self.step), pad=0, packed=False)]


def fit(policy, steps=6, lr=3e-3):
    optimizer = Optimizer(policy.trained(), lr=lr, weight_decay=0.01)
    return [s.loss for s in train(policy, Objective(), Feed(), optimizer, lr=lambda _: lr, steps=steps, place=Place(on="cpu"))]


def attached(base, **fields):
    method = Method(**fields)
    return Policy(base, method.attach(base, "default"), method=method)


@pytest.mark.parametrize(
    ("family", "fields", "test"),
    [
        ("llama", {}, lambda n: n.startswith("model.layers.1.")),
        ("llama", {"last_blocks": 2}, lambda n: n.startswith("model.layers.")),
        ("t5", {"last_blocks": 2}, lambda n: n.startswith(("decoder.block.1.", "decoder.block.2."))),
        ("gpt2", {"biases": True}, lambda n: n.endswith(".bias")),
        ("gpt2", {"norms": True}, lambda n: ".ln_" in n),
        ("gpt2", {"embeddings": True}, lambda n: n.split(".")[1] in ("wte", "wpe")),
        ("gpt2", {"matching": (r".*\.c_proj\.weight", "transformer.wpe.weight")}, lambda n: n.endswith("c_proj.weight") or "wpe" in n),
        ("gpt2", {"biases": True, "norms": True, "last_blocks": 1}, lambda n: n.endswith(".bias") or ".ln_" in n or ".h.1." in n),
        ("bert", {"biases": True}, lambda n: n.endswith("bias")),
        ("qwen3_moe", {"matching": (".*experts.*",)}, lambda n: "experts" in n),
    ],
)
def test_it_chooses_what_was_asked_for_and_nothing_else(family, fields, test):
    found, model = chosen(family, **fields)
    assert found == keys(model, test) and found


def test_bitfit_on_bert_counts_as_the_papers_arithmetic_says():
    """Per block of width d and feed-forward f: query, key, value, output, two norms: 6 d; up f, down d."""
    base = tiny.base("bert")
    d, f, blocks, vocabulary = 32, 48, 2, 50
    head = d + d + vocabulary  # transform, its norm, and the output's
    assert Method(biases=True).attach(base, "default").trainable == blocks * (7 * d + f) + d + head


def test_a_tied_head_trains_with_its_embedding_as_one_tensor():
    base = tiny.base("llama_tied")
    policy = attached(base, matching=(r"lm_head\.weight",))
    assert set(policy.delta.params) == {"model.embed_tokens:weight"}
    fit(policy, 2)
    lm = policy.lm
    assert torch.equal(lm.lm_head.weight, lm.model.embed_tokens.weight)
    assert not torch.equal(lm.lm_head.weight, lm.lm_head._parameters["weight"])
    policy.fold()
    assert lm.lm_head.weight is lm.model.embed_tokens.weight


def test_what_matches_nothing_is_an_error_that_says_what_there_is():
    with pytest.raises(
        Incompatible, match=r"method\.biases chooses nothing in this model \(llama\); there are 2 blocks, 0 bias terms, 5 tensors of norms and 1 of"
    ):
        chosen("llama", biases=True)
    with pytest.raises(Incompatible, match=r"matching: 'nothing' chooses nothing.*such as 'model\."):
        chosen("llama", matching=("nothing",))
    with pytest.raises(Incompatible, match="has 2 blocks, found 3; choose at most 2"):
        chosen("llama", last_blocks=3)
    with pytest.raises(ConfigError, match="no valid regular expression"):
        Method(matching=("(",))
    with pytest.raises(ConfigError, match="last_blocks: must be at least 1, found 0"):
        Method(last_blocks=0)


def test_packed_weights_are_refused_by_tensor_and_biases_beside_them_still_train():
    base = tiny.in_codes("qwen2")
    for fields in ({}, {"matching": (r".*\.q_proj\..*",)}):
        with pytest.raises(Incompatible, match=r"layers\.\d\.self_attn\.q_proj\.weight is packed into int8 codes.*choose biases or norms"):
            Method(**fields).attach(base, "default")
    policy = attached(base, biases=True)
    assert "model.layers.0.self_attn.q_proj:bias" in policy.delta.params
    losses = fit(policy, 8, lr=1e-2)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "bert"])
def test_training_everything_equals_full_fine_tuning(family, recompute):
    full, ours = tiny.base(family), tiny.base(family)
    reference = Policy(full, Full().attach(full, "default"), method=Full())
    policy = attached(ours, matching=(".*",))
    if recompute:
        ours.model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": restoring})
    assert fit(policy) == pytest.approx(fit(reference), rel=1e-6)
    for key, p in reference.delta.params.items():
        torch.testing.assert_close(policy.delta.params[key], p, atol=1e-6, rtol=1e-5)


def test_training_a_part_equals_adamw_on_that_part_of_a_plain_model():
    ours, twin = tiny.base("gpt2"), tiny.base("gpt2")
    policy = attached(ours, biases=True, last_blocks=1)
    part = {n: p for n, p in twin.model.named_parameters() if n.endswith(".bias") or ".h.1." in n}
    for p in part.values():
        p.requires_grad_(True)
    matrices, vectors = [p for p in part.values() if p.ndim >= 2], [p for p in part.values() if p.ndim < 2]
    adam = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}], lr=3e-3)
    plain, feed, losses = Policy(twin), Feed(), []
    twin.model.train()
    for _ in range(6):
        (b,) = next(feed)
        loss = Objective().loss(plain, b).sums["tokens"] / b.units["tokens"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(part.values()), 1.0)
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    assert fit(policy) == pytest.approx(losses, rel=1e-6)
    for n, p in part.items():
        # A key's bias moves all scores of a query alike, so its gradient is rounding alone, which Adam makes large.
        torch.testing.assert_close(policy.delta.params[":".join(n.rsplit(".", 1))], p, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "gemma2", "qwen3_moe"])
def test_folded_after_training_is_the_trained_model_in_the_bases_own_weights(family):
    policy = attached(tiny.base(family), last_blocks=1, embeddings=True)
    fit(policy, 3)
    policy.eval()
    b = next_token_batch(tiny.rows(4), pad=0, packed=False)
    classes = {type(m) for m in tiny.model(family).modules()}
    with torch.no_grad():
        before = policy.hidden(b)
        with policy.reference():
            assert not torch.allclose(policy.hidden(b), before)
        policy.fold()
        assert torch.equal(policy.hidden(b), before)
    assert {type(m) for m in policy.lm.modules()} == classes


def test_two_partial_deltas_share_one_base():
    base = tiny.base("llama")
    one, two = Method(norms=True), Method(last_blocks=1)
    policy = Policy(base, one.attach(base, "one"), method=one, name="one")
    policy.add("two", two.attach(base, "two"))
    tiny.randomise(policy.deltas["one"].params, std=1.0)
    b = next_token_batch(tiny.rows(3), pad=0, packed=False)
    seen = {}
    with torch.no_grad():
        for route in ("one", "two", None):
            policy.use(route)
            seen[route] = policy.hidden(b)
    assert torch.equal(seen["two"], seen[None]) and not torch.allclose(seen["one"], seen[None])


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
    shape = "optim.steps=8 optim.batch_tokens=300 optim.lr=1e-2 evaluate.every_steps=4 evaluate.sample_tokens=4 checkpoint.every_steps=2 checkpoint.keep=9"
    fixed = [f"model={home / 'base'}", f"data.train={home / 'data.jsonl'}", f"out={out}", "name=r", "precision=float32", *shape.split()]
    return load_run(None, [*fixed, *more])


def cut(folder, step):
    """The run's folder as it was when it was stopped after ``step``."""
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    for name in ("best", "adapter", "model"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "result.json").unlink()


def saved(folder):
    return adapter.read_tensors(folder / "adapter" / adapter.DELTA)


def test_a_run_saves_its_tensors_alone_resumes_to_the_same_bits_and_reopens(home, tmp_path):
    from luthier.opening import load

    settings = ("method.kind=partial", "method.last_blocks=1", "method.norms=true", "evaluate.best=false")
    result = execute(run_of(home, tmp_path, *settings), reporter=Reporter(quiet=True))
    assert result.after.loss.value < result.before.loss.value
    whole = saved(tmp_path / "r")
    model = tiny.model("llama")
    assert set(whole) == keys(model, lambda n: n.startswith("model.layers.1.") or "norm" in n)
    shutil.copytree(tmp_path / "r", tmp_path / "cut" / "r")
    cut(tmp_path / "cut" / "r", 4)
    execute(load_run(str(tmp_path / "r" / "run.yaml")), resume=tmp_path / "cut" / "r", reporter=Reporter(quiet=True))
    again = saved(tmp_path / "cut" / "r")
    assert set(again) == set(whole) and all(torch.equal(again[k], whole[k]) for k in whole)
    policy = load(tmp_path / "r", model=str(home / "base"), precision="float32")
    assert all(torch.equal(policy.delta.params[k], v) for k, v in whole.items())
    first = copy.deepcopy(policy.lm.state_dict())
    with policy.reference():
        off = policy.generate([[7, 8, 9]], max_new=4).logps
    assert policy.generate([[7, 8, 9]], max_new=4).logps != off
    assert all(torch.equal(v, first[k]) for k, v in policy.lm.state_dict().items())
