"""Encoders and encoder-decoders end to end, and the blocks of every family."""

import importlib
import json

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

import tiny
from luthier import build, counts
from luthier.core import Incompatible, LuthierError, next_token_batch
from luthier.methods.lora import Method as Lora
from luthier.modelling.anatomy import attentions, blocks, configs, max_positions, modules
from luthier.modelling.site import Edit, restoring, site_at
from luthier.objectives.sft import Objective
from luthier.optim import Optimizer
from luthier.place.one import Place
from luthier.policy import Policy
from luthier.precision.float32 import Precision
from luthier.train import train

NEW = tiny.ENCODERS + tiny.SEQ2SEQ
SEQUENCE = ["prefix", "prompt", "p_tuning", "p_tuning_v2"]


def method_of(kind, **choices):
    return importlib.import_module(f"luthier.methods.{kind}").Method(**choices)


def attached(family, method, *, moved=True):
    base = tiny.base(family)
    delta = method.attach(base, "default")
    if moved:
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in delta.params.values():
                p.add_(torch.randn(p.shape, generator=g) * 0.1)
    return Policy(base, delta, method=method)


def batch_of(policy, family, n=4, packed=None):
    return next_token_batch(tiny.rows_for(family, n), pad=policy.pad, packed=policy.base.packs if packed is None else packed)


def grads(policy, batch):
    for p in policy.trained().values():
        p.grad = None
    policy.train()
    loss = Objective().loss(policy, batch).sums["tokens"] / batch.units["tokens"]
    loss.backward()
    return float(loss.detach()), {k: p.grad.clone() for k, p in policy.trained().items()}


# --- blocks ---------------------------------------------------------------------------------------------------------


class Add(Edit):
    """Adds a constant vector to a module's output."""

    def __init__(self, vector):
        super().__init__()
        self.vector = vector

    def after(self, x, y):
        return y + self.vector


def inputs_of(family):
    ids = torch.arange(3, 12)[None]
    return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)} if family in tiny.SEQ2SEQ else {})


@torch.no_grad()
def change_of(model, family, block, where):
    """How much a constant vector at ``where`` moves the block's residual stream, as multiples of that vector: before a norm of the sum, if there is one.

    With every sublayer after it silenced, the block's output moves by what ``where`` added to the stream.
    """
    vector = torch.linspace(-1, 1, 32)
    later = {"attention_out": [block.cross_out, block.mlp_out], "cross_out": [block.mlp_out], "mlp_out": []}[where]
    for path in filter(None, later):
        module = model.get_submodule(path)
        module.register_forward_hook(lambda m, i, o: torch.zeros_like(o) if isinstance(o, torch.Tensor) else (torch.zeros_like(o[0]), *o[1:]))
    seen = {}
    sums = [n for n in block.norms if isinstance(model.get_submodule(n), nn.LayerNorm)] if family in ("bert", "roberta", "bart") else []
    if sums:  # these put a norm behind each sum: what goes into it is the stream
        which = sums[{"attention_out": 0, "cross_out": 1, "mlp_out": -1}[where]]
        model.get_submodule(which).register_forward_pre_hook(lambda m, i: seen.__setitem__("x", i[0].clone()))
    else:
        model.get_submodule(block.path).register_forward_hook(lambda m, i, o: seen.__setitem__("x", (o[0] if isinstance(o, tuple) else o).clone()))
    model(**inputs_of(family), use_cache=False)
    before = seen["x"]
    site = site_at(model, getattr(block, where))
    site.edits["add"] = Add(vector)
    site.active = "add"
    model(**inputs_of(family), use_cache=False)
    return (seen["x"] - before) / vector


@pytest.mark.parametrize("family", list(tiny.MODELS))
@pytest.mark.parametrize("where", ["attention_out", "cross_out", "mlp_out"])
def test_a_constant_at_a_sublayers_end_is_added_to_the_residual_stream(family, where):
    """In every block. Granite multiplies it: its tiny model by 0.25."""
    found = 0
    for i, block in enumerate(blocks(tiny.model(family))):
        if getattr(block, where) is None:
            assert where == "cross_out" and (block.stack == "encoder" or family not in tiny.SEQ2SEQ)
            continue
        found += 1
        moved = change_of(tiny.model(family).eval(), family, blocks(tiny.model(family))[i], where)
        expected = 0.25 if family == "granite" else 1.0
        torch.testing.assert_close(moved, torch.full_like(moved, expected), atol=2e-4, rtol=0)
    assert found or where == "cross_out"


@pytest.mark.parametrize("family", list(tiny.MODELS))
def test_what_goes_into_the_feed_forward_is_what_mlp_in_reads(family):
    """It is as wide as the residual stream, and with zeros there the sublayer gives the same for every token."""
    model = tiny.model(family).eval()
    block = blocks(model)[-1]
    seen, out = [], []

    def silence(module, inputs):
        seen.append(inputs[0].shape[-1])
        return torch.zeros_like(inputs[0]), *inputs[1:]

    model.get_submodule(block.mlp_in).register_forward_pre_hook(silence)
    model.get_submodule(block.mlp_out).register_forward_hook(lambda m, i, o: out.append(o[0] if isinstance(o, tuple) else o))
    with torch.no_grad():
        model(**inputs_of(family), use_cache=False)
    flat = out[0].reshape(-1, 32)
    assert seen == [32]
    torch.testing.assert_close(flat, flat[:1].expand_as(flat))


def test_blocks_are_in_model_order_an_encoders_first():
    found = blocks(tiny.model("t5"))
    assert [b.stack for b in found] == ["encoder"] * 2 + ["decoder"] * 3
    assert [b.path for b in found] == [f"encoder.block.{i}" for i in range(2)] + [f"decoder.block.{i}" for i in range(3)]
    assert [b.cross is None for b in found] == [True] * 2 + [False] * 3
    assert all(len(b.norms) == (2 if b.stack == "encoder" else 3) for b in found)
    assert {b.stack for f in tiny.ENCODERS for b in blocks(tiny.model(f))} == {"encoder"}
    assert {b.stack for f in tiny.DECODERS for b in blocks(tiny.model(f))} == {"decoder"}


@pytest.mark.parametrize("family", list(tiny.MODELS))
def test_paths_do_not_change_when_deltas_stand_in_the_model(family):
    plain, edited = tiny.base(family), tiny.base(family)
    delta = Lora(targets=("all",)).attach(edited, "default")
    assert delta.params
    assert [n for n, _ in modules(plain.model)] == [n for n, _ in modules(edited.model)]
    assert blocks(plain.model) == blocks(edited.model)
    assert [(a.path, a.heads, a.dim) for a in attentions(plain.model)] == [(a.path, a.heads, a.dim) for a in attentions(edited.model)]
    assert edited.anatomy.targets(edited.model, ["all"]) == plain.anatomy.targets(plain.model, ["all"])
    assert set(Lora(targets=("all",)).attach(edited, "second").params) == set(delta.params)


def test_a_block_with_unknown_names_is_refused():
    model = tiny.model("llama")
    for layer in model.model.layers:
        layer.strange = layer.mlp
        del layer.mlp
    with pytest.raises(Incompatible, match=r"model\.layers\.0: the feed-forward of this block is not called"):
        blocks(model)


# --- what a model is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", NEW)
def test_the_probe_finds_our_attention_right_and_measures_packing(family):
    base = tiny.base(family)
    assert base.anatomy.kind == ("encoder" if family in tiny.ENCODERS else "encoder_decoder")
    assert base.probes["implementation"] == "luthier" and base.probes["attention"] < 1e-5 and base.probes["head"] < 1e-5
    assert base.packs == base.probes["packs"] == (family in tiny.ENCODERS)
    assert base.anatomy.first_position == (2 if family == "roberta" else 0)  # its padding id is 1
    assert base.max_positions == {"roberta": 62, "t5": 2048, "t5_gated": 2048}.get(family, 64)
    if family in tiny.SEQ2SEQ:
        assert base.anatomy.decoder_start == base.model.config.decoder_start_token_id


@pytest.mark.parametrize("blind", [1, 2], ids=["none of them", "every other one"])
def test_an_attention_that_is_not_reached_stays_the_models_own_and_takes_no_prefix(blind, monkeypatch):
    from transformers.models.bert import modeling_bert

    own, calls = modeling_bert.ALL_ATTENTION_FUNCTIONS.get_interface, []

    def some(name, default):
        calls.append(name)
        return default if len(calls) % blind == 0 else own(name, default)

    monkeypatch.setattr(modeling_bert.ALL_ATTENTION_FUNCTIONS, "get_interface", some)
    base = tiny.base("bert")
    assert base.probes["implementation"] == "sdpa" and not base.packs
    assert ("its own" if blind == 1 else "bert.encoder.layer.1.attention.self attends by itself") in base.probes["why"]
    with pytest.raises(Incompatible, match="its own"):
        Policy(base, method_of("prefix", length=2, init="random").attach(base, "default")).hidden(batch_of(Policy(base), "bert"))


def test_a_bias_of_the_logits_is_refused_by_name():
    model = tiny.model("bart")
    model.final_logits_bias += 0.5 * torch.arange(tiny.V)
    with pytest.raises(Incompatible, match="final_logits_bias"):
        build.adopt(model)


@pytest.mark.parametrize("family", NEW)
def test_every_role_is_found_in_both_stacks_and_both_attentions(family):
    base = tiny.base(family)
    found = base.anatomy.targets(base.model, ["query"])
    assert {p.rpartition(".")[0] for p in found} == {a.path for a in attentions(base.model)}
    linears = [n for n, m in modules(base.model) if isinstance(m, nn.Linear) and any(n.startswith(s + ".") for s in base.anatomy.stacks.values())]
    assert base.anatomy.targets(base.model, ["all"]) == linears  # nothing in a block is without a role
    assert not set(base.anatomy.targets(base.model, ["attention"])) & set(base.anatomy.targets(base.model, ["mlp"]))


@pytest.mark.parametrize("family", ["llama", *NEW])
def test_the_vector_a_classifier_reads_is_the_first_or_the_last_tokens(family):
    policy = Policy(tiny.base(family))
    rows = tiny.rows_for(family)
    batch = next_token_batch(rows, pad=policy.pad, packed=policy.base.packs)
    with torch.no_grad():
        pooled = policy.base.anatomy.pool(policy.hidden(batch), batch.segments)
        for s, row in enumerate(rows):
            alone = policy.hidden(next_token_batch([row], pad=policy.pad, packed=False))[0, : len(row)]
            torch.testing.assert_close(pooled[s], alone[0 if family in tiny.ENCODERS else -1], atol=1e-5, rtol=1e-5)


# --- forwards -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def own_hidden(family, row):
    """transformers' own hidden states of one example, by its own attention, and its logits."""
    model = tiny.model(family).eval()
    ids = torch.from_numpy(row.ids).long()[None]
    if family in tiny.SEQ2SEQ:
        out = model(input_ids=torch.from_numpy(row.extras["source"]).long()[None], decoder_input_ids=ids, output_hidden_states=True, use_cache=False)
        return out.decoder_hidden_states[-1][0], out.logits[0]
    out = model(input_ids=ids, output_hidden_states=True)
    return model.base_model(input_ids=ids).last_hidden_state[0], out.logits[0]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", NEW)
def test_hidden_states_and_scores_are_transformers_own(family, packed):
    base = tiny.base(family)
    if packed and not base.packs:
        with pytest.raises(Incompatible, match="leak"):
            Policy(base).hidden(next_token_batch(tiny.rows_for(family), pad=0, packed=True))
        return
    policy, rows = Policy(base), tiny.rows_for(family)
    batch = next_token_batch(rows, pad=policy.pad, packed=packed)
    with torch.no_grad():
        hidden = policy.hidden(batch).flatten(0, 1)
        for s, row in enumerate(rows):
            expected, logits = own_hidden(family, row)
            first = int(batch.segments.first(batch.shape[1])[s])
            here = hidden[first : first + len(row)]
            torch.testing.assert_close(here, expected, atol=1e-5, rtol=1e-5)
            token = torch.from_numpy(row.ids).long()
            logp = logits.log_softmax(-1).gather(1, token[:, None]).squeeze(1)
            torch.testing.assert_close(policy.score(here, token)["logp"], logp, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(policy.score(here, token, want=("logp", "entropy"))["logp"], logp, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", NEW)
@pytest.mark.parametrize("kind", ["lora", *SEQUENCE])
def test_recomputing_blocks_changes_nothing(kind, family):
    policy = attached(family, method_of(kind, **({"targets": ("all",)} if kind == "lora" else {"length": 5})))
    batch = batch_of(policy, family)
    loss, kept = grads(policy, batch)
    policy.lm.activation_checkpointing_enable({"use_reentrant": False, "context_fn": restoring})
    again, recomputed = grads(policy, batch)
    assert again == pytest.approx(loss, rel=1e-6)
    largest = max(float(g.abs().max()) for g in kept.values())
    for k, g in kept.items():
        torch.testing.assert_close(recomputed[k], g, atol=1e-6 * largest, rtol=1e-4)


def fit(policy, batch, steps=12, lr=3e-2):
    class Same:
        def __next__(self):
            return [batch]

    optimizer = Optimizer(policy.trained(), lr=lr)
    return [s.loss for s in train(policy, Objective(), Same(), optimizer, lr=lambda _: lr, steps=steps, place=Place(on="cpu"))]


@pytest.mark.parametrize("family", NEW)
@pytest.mark.parametrize(
    ("kind", "choices"),
    [("lora", {"targets": ("query", "value")}), ("lora", {"targets": ("all",)}), *((k, {"length": 5}) for k in SEQUENCE)],
    ids=["lora", "lora-all", *SEQUENCE],
)
def test_methods_train_and_nothing_else_moves(kind, choices, family):
    policy = attached(family, method_of(kind, **choices), moved=False)
    trained = {id(p) for p in policy.trained().values()}
    frozen = {n: p.detach().clone() for n, p in policy.lm.named_parameters() if id(p) not in trained}
    losses = fit(policy, batch_of(policy, family))
    assert losses[-1] < losses[0] - 0.01
    after = dict(policy.lm.named_parameters())
    assert all(torch.equal(v, after[n]) for n, v in frozen.items())


@pytest.mark.parametrize("family", NEW)
@pytest.mark.parametrize("kind", ["lora", *SEQUENCE])
def test_a_packed_or_padded_batch_equals_each_example_alone(kind, family):
    policy = attached(family, method_of(kind, **({"targets": ("all",)} if kind == "lora" else {"length": 5}))).eval()
    rows = tiny.rows_for(family)
    with torch.no_grad():
        for packed in {False, policy.base.packs}:
            batch = next_token_batch(rows, pad=policy.pad, packed=packed)
            hidden = policy.hidden(batch).flatten(0, 1)
            for s, row in enumerate(rows):
                alone = policy.hidden(next_token_batch([row], pad=policy.pad, packed=False))[0, : len(row)]
                first = int(batch.segments.first(batch.shape[1])[s])
                torch.testing.assert_close(hidden[first : first + len(row)], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", NEW)
def test_routed_examples_equal_each_alone(family):
    """One batch: a LoRA, a prefix, a prompt, a stack of the first two, and the bare base."""
    base = tiny.base(family)
    policy = Policy(base)
    for kind, choices in (("lora", {"targets": ("all",)}), ("prefix", {"length": 3}), ("prompt", {"length": 4})):
        delta = method_of(kind, **choices).attach(base, kind)
        tiny.randomise(delta.params, seed=len(kind))
        policy.add(kind, delta)
    rows, route = tiny.rows_for(family, 5), ("lora", None, "prefix", "prompt", "lora+prefix")
    different = set()
    with torch.no_grad():
        for packed in {False, base.packs}:
            batch = next_token_batch(rows, pad=policy.pad, packed=packed)
            batch.route = route
            hidden = policy.hidden(batch).flatten(0, 1)
            for s, (row, name) in enumerate(zip(rows, route, strict=True)):
                policy.use(name)
                alone = policy.hidden(next_token_batch([row], pad=policy.pad, packed=False))[0, : len(row)]
                policy.use(None)
                bare = policy.hidden(next_token_batch([row], pad=policy.pad, packed=False))[0, : len(row)]
                first = int(batch.segments.first(batch.shape[1])[s])
                torch.testing.assert_close(hidden[first : first + len(row)], alone, atol=2e-5, rtol=1e-4)
                different |= {name} if (alone - bare).abs().max() > 1e-3 else set()
    assert different == set(route) - {None}


@pytest.mark.parametrize("family", NEW)
def test_a_prefix_reaches_every_attention(family):
    policy = attached(family, method_of("prefix", length=3))
    _, found = grads(policy, batch_of(policy, family))
    at = 0
    for a in attentions(policy.lm):
        assert float(found["prefix:table"][:, at : at + a.columns].abs().max()) > 0, a.path
        at += a.columns
    assert at == found["prefix:table"].shape[1]


@pytest.mark.parametrize("family", ["llama", *NEW])
def test_a_prefix_is_what_a_written_out_attention_makes_of_it(family):
    """Scores of the prefix and of the text side by side in one softmax; the prefix has no relative position and stands outside windows and masks."""
    policy = attached(family, method_of("prefix", length=3)).eval()
    row = tiny.rows_for(family, 1, shortest=12, longest=16)[0]
    with torch.no_grad():
        hidden = policy.hidden(next_token_batch([row], pad=policy.pad, packed=False))[0, : len(row)]
        given = {a.path: policy.prefixes("default")["default"][a.module] for a in attentions(policy.lm)}
    model = tiny.model(family).eval()
    prefix = {a.module: given[a.path] for a in attentions(model)}

    def written_out(module, query, key, value, mask, scaling=None, position_bias=None, sliding_window=None, **others):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        pk, pv = (p.transpose(0, 1).repeat_interleave(query.shape[1] // p.shape[1], 0) for p in prefix[module])
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = torch.einsum("bhid,bhjd->bhij", query, key) * scale + (0 if position_bias is None else position_bias)
        i, j = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])[None]
        unseen = (j > i) & torch.tensor(bool(module.is_causal))
        unseen = unseen if sliding_window is None else unseen | ((i - j).abs() >= sliding_window)
        scores = scores.masked_fill(unseen, float("-inf"))
        weights = torch.cat([torch.einsum("bhid,hpd->bhip", query, pk) * scale, scores], -1).softmax(-1)
        out = torch.einsum("bhip,hpd->bhid", weights[..., :3], pv) + weights[..., 3:] @ value
        return out.transpose(1, 2), None

    AttentionInterface.register("written_out", written_out)
    AttentionMaskInterface.register("written_out", lambda *a, **k: None)
    for config in configs(model):
        config._attn_implementation = "written_out"
    ids = torch.from_numpy(row.ids).long()[None]
    with torch.no_grad():
        if family in tiny.SEQ2SEQ:
            encoded = model.get_encoder()(input_ids=torch.from_numpy(row.extras["source"]).long()[None]).last_hidden_state
            expected = model.get_decoder()(input_ids=ids, encoder_hidden_states=encoded, use_cache=False).last_hidden_state[0]
        else:
            positions = torch.arange(len(row))[None] + policy.base.anatomy.first_position + 3
            expected = model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(hidden, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", NEW)
def test_lora_folds_into_every_linear(family):
    policy = attached(family, Lora(targets=("all",)))
    batch = batch_of(policy, family)
    with torch.no_grad():
        before = policy.hidden(batch)
        base = Policy(tiny.base(family)).hidden(batch)
        policy.fold()
        torch.testing.assert_close(policy.hidden(batch), before, atol=2e-5, rtol=2e-5)
        assert (before - base).abs().max() > 1e-2


# --- generation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.SEQ2SEQ)
def test_greedy_answers_are_transformers_own(family):
    prompts = [[5, 9, 11], [7] * 9, [12, 30, 8, 3, 40]]
    made = Policy(tiny.base(family)).generate(prompts, max_new=9, stop=(2,))
    model = tiny.model(family).eval()
    for prompt, ids in zip(prompts, made.ids, strict=True):
        # Without a cache: transformers sizes T5's by the encoder's number of blocks.
        choices = {"do_sample": False, "num_beams": 1, "max_new_tokens": 9, "eos_token_id": 2, "forced_eos_token_id": None, "use_cache": False}
        own = model.generate(torch.tensor([prompt]), **choices)[0].tolist()
        assert [model.config.decoder_start_token_id, *ids] == own
    assert len({tuple(i) for i in made.ids}) > 1


@pytest.mark.parametrize("family", tiny.SEQ2SEQ)
@pytest.mark.parametrize("kind", ["lora", *SEQUENCE])
def test_answers_with_a_cache_equal_going_over_the_text_again(kind, family):
    policy = attached(family, method_of(kind, **({"targets": ("all",)} if kind == "lora" else {"length": 5}))).eval()
    prompts = [[5, 9, 11], [7] * 9, [12, 30]]
    made = policy.generate(prompts, max_new=6)
    start = policy.base.anatomy.decoder_start
    for prompt, ids, logps in zip(prompts, made.ids, made.logps, strict=True):
        row = tiny.Row(torch.tensor([start, *ids]).int().numpy(), torch.ones(len(ids) + 1).bool().numpy(), "", {"source": torch.tensor(prompt).int().numpy()})
        with torch.no_grad():
            hidden = policy.hidden(next_token_batch([row], pad=policy.pad, packed=False))[0, : len(ids)]
            again = policy.score(hidden, torch.tensor(ids))["logp"]
        torch.testing.assert_close(torch.tensor(logps), again, atol=1e-4, rtol=1e-4)


# --- opening --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", NEW)
def test_a_saved_model_is_opened_as_what_it_is(family, tmp_path):
    tiny.model(family).save_pretrained(tmp_path)
    base = build.load(str(tmp_path), precision=Precision())
    assert type(base.model) is type(tiny.model(family)) and base.probes["head"] is not None
    assert all(torch.equal(a, b) for a, b in zip(base.model.state_dict().values(), tiny.model(family).state_dict().values(), strict=True))
    light = build.load(str(tmp_path), precision=Precision(), weights=False)
    assert type(light.model) is type(base.model) and light.model.device.type == "meta"
    assert (light.packs, light.max_positions, light.anatomy) == (base.packs, base.max_positions, base.anatomy)
    delta = Lora(targets=("all",)).attach(light, "default")
    assert {k: p.shape for k, p in delta.params.items()} == {k: p.shape for k, p in Lora(targets=("all",)).attach(base, "default").params.items()}


@pytest.mark.parametrize("family", NEW)
def test_random_weights_are_those_of_the_right_class(family, tmp_path):
    tiny.model(family).config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in written.items() if k != "architectures"}))
    base = build.load(build.Model(id=str(tmp_path), random=True), precision=Precision())
    assert type(base.model) is type(tiny.model(family))


@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_an_encoder_without_its_head_opens_and_objectives_that_need_it_refuse(family, tmp_path):
    from luthier.settings.run import Run

    tiny.model(family).base_model.save_pretrained(tmp_path)
    base = build.load(str(tmp_path), precision=Precision())
    assert base.probes["head"] is None and base.packs
    full = build.adopt(tiny.model(family))
    batch = next_token_batch(tiny.rows(), pad=0, packed=True)
    with torch.no_grad():
        assert torch.equal(Policy(base).hidden(batch), Policy(full).hidden(batch))
    run = Run(model=str(tmp_path), data={"train": "none.jsonl"}, objective="masked_text", precision="float32")
    with pytest.raises(Incompatible, match="masked_text reads this model's own language-model head, which is missing"):
        build.assemble(run, base)


def test_missing_weights_of_a_trunk_are_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    for family, gone in (
        ("bert", "bert.encoder.layer.1.output.dense.weight"),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.q.weight"),
        ("llama", "lm_head.weight"),
    ):
        folder = tmp_path / family
        tiny.model(family).save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        del tensors[gone]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(LuthierError, match="missing from the files"):
            build.load(str(folder), precision=Precision())


@pytest.mark.parametrize(("model_type", "architecture"), [("vit", "ViTForImageClassification"), ("whisper", "WhisperForConditionalGeneration")])
def test_what_is_no_language_model_is_refused_in_a_sentence(model_type, architecture, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "architectures": [architecture]}))
    with pytest.raises(Incompatible, match=rf"{architecture} \({model_type}\) is no language model that this program trains: .*AutoModelForMaskedLM"):
        build.load(str(tmp_path), precision=Precision(), weights=False)


def test_dropout_of_a_frozen_base_is_zero_in_every_part(tmp_path):
    from transformers import BartConfig, BartForConditionalGeneration

    BartForConditionalGeneration(BartConfig(**tiny._BART | {"dropout": 0.2, "attention_dropout": 0.1, "encoder_layerdrop": 0.5})).save_pretrained(tmp_path)
    config = build.load(str(tmp_path), precision=Precision()).model.config
    assert (config.dropout, config.attention_dropout, config.encoder_layerdrop) == (0.0, 0.0, 0.0)
    config = build.load(build.Model(id=str(tmp_path), dropout=0.3), precision=Precision()).model.config
    assert (config.dropout, config.attention_dropout, config.encoder_layerdrop) == (0.3, 0.3, 0.0)


def test_relative_positions_have_no_end_and_roberta_counts_from_behind_its_padding():
    t5, roberta = tiny.model("t5"), tiny.model("roberta")
    t5.config.n_positions = 8  # what it was trained at, and no limit
    assert max_positions(t5, 0) == 2048
    ids = torch.arange(3, 3 + 62)[None] % tiny.V
    ids[ids == 1] = 5
    assert max_positions(roberta, 2) == 62 and roberta(input_ids=ids).logits.shape[1] == 62
    with pytest.raises((IndexError, RuntimeError)):
        roberta(input_ids=torch.cat([ids, ids[:, :1]], 1))


# --- counts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SEQUENCE)
def test_counts_of_deltas_that_are_no_edit_of_a_module(kind):
    policy = attached("llama", method_of(kind, length=5), moved=False)
    rows = counts.table(policy)
    assert sum(r.modules * r.trained for r in rows) == policy.delta.trainable
    assert all(r.whole == 0 and r.shape is None and counts.sentence(r) == f"{r.trained:,}" for r in rows)
    base = sum(p.numel() for p in tiny.model("llama").parameters())
    assert counts.total(policy) == (policy.delta.trainable, base)


def test_the_total_of_a_base_does_not_count_what_is_added_to_it():
    policy = attached("bert", Lora(targets=("all",)))
    assert counts.total(policy) == (policy.delta.trainable, sum(p.numel() for p in tiny.model("bert").parameters()))
