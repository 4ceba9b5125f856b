"""Bottleneck adapters on every family: placements, normalisations, routing, recomputation, counts."""

import time

import pytest
import torch
from torch.nn.functional import gelu, linear
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
from luthier import build
from luthier.core import Incompatible, next_token_batch
from luthier.errors import ConfigError
from luthier.methods.adapter import FUNCTIONS, Held, Method
from luthier.methods.lora import Method as Lora
from luthier.modelling.anatomy import blocks, modules
from luthier.modelling.site import Frame, restoring, using
from luthier.modelling.wiring import wirings
from luthier.policy import Policy

PLACEMENTS = ["houlsby", "pfeiffer", "block", "parallel"]
FAMILIES = ["llama", "gemma2", "gpt_neox", "gpt2", "granite", "qwen3_moe", "bert", "modernbert", "t5", "bart"]
WAYS = [{"placement": p} for p in PLACEMENTS] + [{"placement": "parallel", "reads": "stream"}, {"placement": "houlsby", "norms": True}]


def named(way):
    return "-".join(str(v) for v in way.values())


def policy_of(family, name="default", *, seed=1, base=None, **fields):
    base = base or tiny.base(family)
    method = Method(**{"bottleneck": 6, "activation": "gelu"} | fields)
    delta = method.attach(base, name)
    tiny.randomise(delta.params, seed=seed, std=0.2)
    return Policy(base, delta, method=method, name=name)


def batch(policy, rows=None, packed=None):
    family = policy.base.source.removeprefix("tiny-")
    rows = tiny.rows_for(family, 3) if rows is None else rows
    return next_token_batch(rows, pad=policy.pad, packed=policy.base.packs if packed is None else packed)


def real(hidden, b):
    """The states of real tokens."""
    return hidden[b.segments.example(b.shape) >= 0]


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bert", "t5", "bart"])
def test_it_starts_as_the_base_and_switched_off_is_the_base_bit_for_bit(family, placement, norms):
    plain = Policy(tiny.base(family))
    base = tiny.base(family)
    method = Method(placement=placement, norms=norms)
    policy = Policy(base, method.attach(base, "default"), method=method)
    b = batch(plain)
    with torch.no_grad():
        expected = plain.hidden(b)
        assert torch.equal(policy.hidden(b), expected)
        tiny.randomise(policy.delta.params, std=0.2)
        assert not torch.allclose(real(policy.hidden(b), b), real(expected, b), atol=1e-2)
        with policy.reference():
            assert torch.equal(policy.hidden(b), expected)


def hooked(policy, way):
    """The same adapters as hooks of plain torch on an untouched model, from the delta's tensors."""
    base = tiny.base(policy.base.source.removeprefix("tiny-"))
    everything, ways = dict(modules(base.model)), wirings(base, blocks(base.model))
    params, scale, kept = policy.delta.params, 4.0 if way["placement"] == "parallel" else 1.0, {}

    def adapter(path, u):
        p = {leaf: params[f"{path}:{leaf}"] for leaf in ("down.weight", "down.bias", "up.weight", "up.bias")}
        return scale * linear(gelu(linear(u, p["down.weight"], p["down.bias"])), p["up.weight"], p["up.bias"])

    def add(path, u_of):
        def hook(module, args, out):
            y = out[0] if isinstance(out, tuple) else out
            new = y + adapter(path, u_of(args[0], y))
            return (new, *out[1:]) if isinstance(out, tuple) else new

        everything[path].register_forward_hook(hook)

    def keep(path, key):
        everything[path].register_forward_pre_hook(lambda module, args: kept.__setitem__(key, args[0]))

    for b in blocks(base.model):
        stream, closing = ways[b.path].stream, ways[b.path].closing
        if way["placement"] == "houlsby":
            add(b.attention_out, lambda x, y: y)
            add(b.mlp_out, lambda x, y: y)
        elif way["placement"] == "parallel":
            keep(stream if way.get("reads") == "stream" else b.mlp_in, b.path)
            add(b.mlp_out, lambda x, y, b=b: kept[b.path])
        elif way["placement"] == "pfeiffer" and closing is not None:
            keep(stream, b.path)
            add(b.mlp_out, lambda x, y, b=b, closing=closing: everything[closing](y + kept[b.path]))
        else:
            add(b.path, lambda x, y: y)
        for n in b.norms if way.get("norms") else ():
            with torch.no_grad():
                for leaf, p in everything[n].named_parameters(recurse=False):
                    p += params[f"{n}:{leaf}"]
    return Policy(base)


@pytest.mark.parametrize("way", WAYS, ids=named)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_placement_equals_the_same_adapters_as_plain_hooks(family, way):
    policy = policy_of(family, **way)
    plain, b = hooked(policy, way), batch(policy)
    with torch.no_grad():
        torch.testing.assert_close(real(policy.hidden(b), b), real(plain.hidden(b), b), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("way", WAYS, ids=named)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3_moe", "modernbert"])
def test_packed_equals_unpacked(family, way):
    policy = policy_of(family, **way)
    packed, padded = batch(policy), batch(policy, packed=False)
    if not policy.base.packs:
        pytest.skip("this family holds one example a row")
    with torch.no_grad():
        torch.testing.assert_close(real(policy.hidden(packed), packed), real(policy.hidden(padded), padded), atol=1e-5, rtol=1e-5)


def gradients(policy, b):
    for p in policy.delta.params.values():
        p.grad = None
    policy.train()
    hidden = real(policy.hidden(b), b)
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return {k: p.grad.clone() for k, p in policy.delta.params.items()}


@pytest.mark.parametrize("way", WAYS, ids=named)
@pytest.mark.parametrize("family", ["llama", "gemma2", "bert", "bart", "t5"])
def test_recomputing_blocks_changes_no_gradient(family, way):
    policy = policy_of(family, **way)
    b = batch(policy)
    kept = gradients(policy, b)
    ran = []
    policy.lm.activation_checkpointing_enable({"use_reentrant": False, "context_fn": lambda: (ran.append(1), restoring())[1]})
    again = gradients(policy, b)
    assert ran, "nothing was recomputed"
    largest = max(float(g.abs().max()) for g in kept.values())
    for k, g in kept.items():
        assert g.abs().max() > 0, k
        torch.testing.assert_close(again[k], g, atol=2e-6 * largest, rtol=1e-5)  # an encoder's gradients may add up in another order


@pytest.mark.parametrize(("family", "recompute"), [("llama", False), ("gemma2", True), ("bert", False), ("bert", True), ("t5", False), ("bart", True)])
def test_every_placement_a_lora_and_the_base_in_one_batch_equal_each_alone(family, recompute):
    base = tiny.base(family)
    policy = policy_of(family, "w0", base=base, **WAYS[0])
    for i, way in enumerate(WAYS[1:], 1):
        policy.add(f"w{i}", policy_of(family, f"w{i}", base=base, seed=i, **way).delta)
    lora = Lora(targets=("all",)).attach(base, "lora")
    tiny.randomise(lora.params, seed=9)
    policy.add("lora", lora)
    route = (*(f"w{i}" for i in range(len(WAYS))), None, "lora", "w3+lora", "w5+w1")
    if recompute:
        policy.lm.activation_checkpointing_enable({"use_reentrant": False, "context_fn": restoring})
    policy.train()
    frozen = {k: v.clone() for k, v in policy.lm.state_dict().items() if ".edits." not in k}
    rows = tiny.rows_for(family, len(route))
    params = {f"{n} {k}": p for n, d in policy.deltas.items() for k, p in d.params.items()}

    def pulled(outputs):
        """Gradients of one number made of every example's states."""
        for p in params.values():
            p.grad = None
        sum((h * torch.linspace(-1, 1, h.numel()).view_as(h)).sum() for h in outputs).backward()
        return {k: p.grad.clone() for k, p in params.items()}

    for packed in {False, base.packs}:
        b = batch(policy, rows, packed=packed)
        b.route = route
        together = policy.hidden(b)
        example = b.segments.example(b.shape)
        mixed = [together[example == s] for s in range(len(route))]
        alone = []
        for row, name in zip(rows, route, strict=True):
            policy.use(name)
            one = batch(policy, [row], packed=False)
            alone.append(real(policy.hidden(one), one))
        for m, a in zip(mixed, alone, strict=True):
            torch.testing.assert_close(m, a, atol=1e-5, rtol=1e-5)
        one, other = pulled(mixed), pulled(alone)
        largest = max(float(g.abs().max()) for g in other.values())
        for k, g in other.items():
            torch.testing.assert_close(one[k], g, atol=1e-5 * largest, rtol=1e-3, msg=lambda m, k=k: f"{k}: {m}")
    assert all(torch.equal(v, frozen[k]) for k, v in policy.lm.state_dict().items() if ".edits." not in k)


def test_two_orders_of_one_stack_in_one_batch_are_refused_and_each_alone_is_its_own():
    base = tiny.base("llama")
    policy = policy_of("llama", "a", base=base, placement="block")
    policy.add("b", policy_of("llama", "b", base=base, placement="block", seed=2).delta)
    rows = tiny.rows(2)
    b, n = batch(policy, [rows[0], rows[0]], packed=False), len(rows[0])
    with torch.no_grad():
        b.route = ("b", "a+b")  # the order of first appearance would be b before a
        mixed = policy.hidden(b)[1, :n]
        policy.use("a+b")
        b.route = None
        torch.testing.assert_close(mixed, policy.hidden(b)[1, :n], atol=1e-6, rtol=1e-6)
        policy.use("b+a")
        assert not torch.allclose(policy.hidden(b)[1, :n], mixed, atol=1e-3)
        b.route = ("a+b", "b+a")
        with pytest.raises(Incompatible, match="two orders"):
            policy.hidden(b)


# --- what is held ---------------------------------------------------------------------------------------------------


def test_what_is_held_is_the_frames_own_and_forgotten_at_use():
    held, one, two = Held(), Frame(), Frame()
    a, b, c = torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)
    held.before(c)
    with using(one):
        held.before(a)
    with using(two):
        held.before(b)
    with using(one):
        assert held.take() is a
    with using(two):
        assert held.take() is b
    assert held.take() is c
    assert not one.plans and not two.plans and not held.outside


@pytest.mark.parametrize("family", ["bert", "bart"])
@pytest.mark.parametrize("placement", ["pfeiffer", "parallel"])
def test_a_forward_outside_any_frame_computes_the_same_and_leaves_nothing(family, placement):
    policy = policy_of(family, placement=placement)
    ids = {"input_ids": torch.tensor([[5, 6, 7, 8]])} | ({"decoder_input_ids": torch.tensor([[2, 9, 4]])} if family == "bart" else {})
    with torch.no_grad():
        outside = policy.lm(**ids).logits
        frame = Frame("default")
        with using(frame):
            torch.testing.assert_close(policy.lm(**ids).logits, outside, atol=0, rtol=0)
    assert not frame.plans
    assert not any(m.outside for m in policy.lm.modules() if isinstance(m, Held))


# --- normalisations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt2", "cohere", "bert", "t5", "modernbert"])
def test_trained_normalisations_equal_a_base_whose_own_are_moved(family):
    policy = policy_of(family, norms=True)
    norms = [n for b in blocks(policy.lm) for n in b.norms]
    shifts = {k: p for k, p in policy.delta.params.items() if k.split(":")[0] in norms and k.split(":")[1] in ("weight", "bias")}
    assert len(shifts) >= 2
    with torch.no_grad():
        for k, p in policy.delta.params.items():
            p.copy_(p if k in shifts else torch.zeros_like(p))
        moved = Policy(tiny.base(family))
        own = dict(moved.lm.named_parameters())
        for k, p in shifts.items():
            own[k.replace(":", ".")] += p
        b = batch(policy)
        torch.testing.assert_close(real(policy.hidden(b), b), real(moved.hidden(b), b), atol=2e-5, rtol=2e-5)


def test_every_normalisation_of_a_block_is_trained_and_counted():
    policy = policy_of("bert", norms=True)
    without = policy_of("bert")
    assert policy.delta.trainable - without.delta.trainable == 2 * 2 * (32 + 32)  # two layers, two norms each, weight and bias
    assert {k.split(":")[0] for k in set(policy.delta.params) - set(without.delta.params)} == {n for b in blocks(policy.lm) for n in b.norms}


# --- counts ---------------------------------------------------------------------------------------------------------


def on_meta(width, layers, vocabulary=32000, inner=None):
    with torch.device("meta"):
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            intermediate_size=inner or 4 * width,
        )
        return build.adopt(LlamaForCausalLM(config))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_from_1024_to_64_are_131072_weights_a_layer_beside_the_biases(placement):
    delta = Method(placement=placement, bottleneck=64).attach(on_meta(1024, 12), "default")
    weights = sum(p.numel() for k, p in delta.params.items() if k.endswith(".weight"))
    times = 2 if placement == "houlsby" else 1
    assert weights == times * 1_572_864 == times * 12 * 131_072
    assert delta.trainable - weights == times * 12 * (64 + 1024)
    assert delta.trainable == Method(placement=placement).attach(on_meta(1024, 12), "default").trainable  # 1/16 of 1024 is 64


def test_the_share_of_a_7b_llama_is_counted_in_two_seconds_and_lies_in_the_published_band():
    started = time.monotonic()
    base = on_meta(4096, 32, inner=11008)
    delta = Method().attach(base, "default")
    assert time.monotonic() - started < 2
    total = sum(p.numel() for n, p in base.model.named_parameters() if ".edits." not in n)
    assert total == 6_738_415_616
    assert delta.trainable == 32 * 2 * (2 * 4096 * 256 + 256 + 4096)
    assert 0.01 < delta.trainable / total < 0.05


# --- settings -------------------------------------------------------------------------------------------------------


def test_scale_is_4_beside_the_feed_forward_and_1_behind_it_and_can_be_set():
    assert [Method(placement=p).scale for p in PLACEMENTS] == [1.0, 1.0, 1.0, 4.0]
    base, plain = tiny.base("llama"), Policy(tiny.base("llama"))
    changes = []
    for i, scale in enumerate((1e-3, 2e-3)):
        policy = policy_of("llama", f"d{i}", base=base, scale=scale)
        b = batch(policy)
        with torch.no_grad():
            policy.use(f"d{i}")
            changes.append(policy.hidden(b) - plain.hidden(b))
    assert changes[0].norm() * 2 == pytest.approx(float(changes[1].norm()), rel=0.02)


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_each_activation_is_its_own_function(activation):
    x = torch.linspace(-3, 3, 50)
    own = {"relu": x.clamp(min=0), "gelu": x * 0.5 * (1 + torch.erf(x / 2**0.5)), "silu": x / (1 + (-x).exp())}
    torch.testing.assert_close(FUNCTIONS[activation](x), own[activation], atol=1e-6, rtol=1e-6)


def test_dropout_is_on_what_is_added_in_training_only():
    policy = policy_of("llama", placement="block", dropout=0.5)
    plain, b = policy_of("llama", placement="block"), None
    b = batch(policy)
    with torch.no_grad():
        assert torch.equal(policy.eval().hidden(b), plain.hidden(b))
        policy.train()
        torch.manual_seed(0)
        one, two = policy.hidden(b), policy.hidden(b)
    assert not torch.equal(one, two)
    site = policy.lm.get_submodule("model.layers.0")
    edit = site.edits["default"].train()
    y = torch.randn(200, 32)
    with torch.no_grad():
        whole, some = edit.eval().after(y, y) - y, edit.train().after(y, y) - y
    kept = some.abs() > 1e-6
    assert 0.45 < kept.float().mean() < 0.55
    torch.testing.assert_close(some[kept], 2 * whole[kept], atol=1e-5, rtol=1e-4)


def test_cross_attention_gets_an_adapter_where_it_is_asked_for():
    def places(**fields):
        return {k.split(":")[0] for k in policy_of("bart", **fields).delta.params}

    assert places(cross=True) - places() == {b.cross_out for b in blocks(tiny.model("bart")) if b.cross_out}
    with pytest.raises(Incompatible, match=r"method.cross.*bert.*no cross-attention"):
        policy_of("bert", cross=True)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"reads": "stream"}, "reads: stream is a choice of placement parallel"),
        ({"placement": "block", "cross": True}, "cross: is a choice of placement houlsby"),
        ({"bottleneck": 0}, "bottleneck: must be at least 1"),
        ({"scale": 0.0}, "scale: must be above 0"),
        ({"dropout": 1.0}, "dropout: must be 0 to 0.99"),
    ],
)
def test_settings_that_would_do_nothing_or_harm_are_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        Method(**fields)
