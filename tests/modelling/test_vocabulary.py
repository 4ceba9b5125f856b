"""Tokens added to the vocabulary: only their rows train, tied heads stay tied, and folding writes them in."""

import json

import pytest
import torch

import tiny
from luthier import build
from luthier.core import LuthierError, next_token_batch
from luthier.modelling import vocabulary
from luthier.objectives.sft import Objective
from luthier.policy import Policy
from luthier.settings.plugins import plugin

NEW = ["<tool>", "glockenspiel"]


def made(family, method="lora"):
    torch.manual_seed(0)
    model = tiny.MODELS[family]()
    tokenizer = tiny.tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    base = build.adopt(model, tokenizer)
    vocabulary.extend(base, NEW)
    chosen = plugin("methods", method)()
    delta = chosen.attach(base, "default")
    vocabulary.attach(base, delta, "default")
    return Policy(base, delta, method=chosen), base


def batch(base):
    ids = base.tokenizer("a <tool> b glockenspiel c", add_special_tokens=False)["input_ids"]
    return next_token_batch([tiny.row(ids), tiny.row([9, 10, 11, 12])], pad=0, packed=False)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "gemma2"])
def test_new_tokens_are_one_id_and_start_as_the_mean_of_their_pieces(family):
    _, base = made(family)
    plain = tiny.tokenizer()
    for token in NEW:
        (i,) = base.tokenizer(token, add_special_tokens=False)["input_ids"]
        pieces = plain(token, add_special_tokens=False)["input_ids"]
        weight = base.model.get_input_embeddings().weight
        torch.testing.assert_close(weight[i], weight[pieces].mean(0))


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2"])
def test_only_the_new_rows_move_and_a_tied_head_sees_the_same_rows(family):
    policy, base = made(family)
    rows = {k: p for k, p in policy.trained().items() if k.startswith("tokens:")}
    tied = family != "llama"
    assert set(rows) == ({"tokens:embedding"} if tied else {"tokens:embedding", "tokens:head"})
    tiny.randomise(rows, std=0.3)
    frozen = {n: p for n, p in base.model.named_parameters() if id(p) not in {id(q) for q in policy.trained().values()}}
    # A slow reference: the same model with the rows written into its weights.
    reference = tiny.MODELS[family]()
    torch.manual_seed(0)
    reference = tiny.MODELS[family]()
    reference.resize_token_embeddings(len(tiny.tokenizer()))
    reference = build.adopt(reference, tiny.tokenizer())
    vocabulary.extend(reference, NEW)
    ids = base.tokenizer.convert_tokens_to_ids(NEW)
    with torch.no_grad():
        lm = reference.model
        lm.get_input_embeddings().weight[ids] += rows["tokens:embedding"]
        if not tied:
            lm.get_output_embeddings().weight[ids] += rows["tokens:head"]
    b = batch(base)
    plain = Policy(reference)
    torch.testing.assert_close(policy.hidden(b), plain.hidden(b))
    ours, theirs = (Objective().loss(p, b).sums["tokens"] for p in (policy, plain))
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    assert all(p.grad is None for p in frozen.values())
    assert all(float(p.grad.abs().sum()) > 0 for p in rows.values())


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2"])
def test_folded_equals_attached(family):
    policy, base = made(family)
    tiny.randomise(policy.delta.params, std=0.2)
    b = batch(base)
    with torch.no_grad():
        before = policy.hidden(b), Objective().loss(policy, b).sums["tokens"]
        policy.fold()
        torch.testing.assert_close(policy.hidden(b), before[0], atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(Objective().loss(policy, b).sums["tokens"], before[1], atol=1e-4, rtol=1e-5)


def test_a_token_that_is_there_or_twice_or_empty_is_refused():
    base = build.adopt(tiny.model("llama"), tiny.tokenizer())
    for tokens, said in ((["a"], "already"), (["<x>", "<x>"], "twice"), ([" "], "empty")):
        with pytest.raises(LuthierError, match=said):
            vocabulary.extend(base, tokens)


@pytest.mark.parametrize("method", ["lora", "prefix", "full"])
def test_a_run_adds_tokens_saves_them_and_reloads(tmp_path, method):
    from luthier import opening
    from luthier.running.starting import execute
    from luthier.settings.run import Checkpoint, Data, Evaluate, Model, Optim, Run

    folder = tiny.folder(tmp_path / "base")
    data = tmp_path / "own.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"call {i}", "completion": f"<tool> {i} glockenspiel"}) + "\n" for i in range(30)))
    settings = Evaluate(samples=0, every_steps=8)
    run = Run(
        model=Model(id=str(folder)),
        data=Data(train=(str(data),)),
        method=method,
        tokens=("<tool>", "glockenspiel"),
        precision="float32",
        optim=Optim(steps=8, lr=1e-2),
        evaluate=settings,
        checkpoint=Checkpoint(every_steps=8),
        out=str(tmp_path / "runs"),
    )
    result = execute(run)
    assert result.after.loss.value < result.before.loss.value
    again = opening.load(result.artefact, precision="float32")
    ids = again.base.tokenizer("<tool> glockenspiel", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3  # two tokens and the space between them
    prepared = next_token_batch([tiny.row([9, 10, *ids, 11])], pad=0, packed=False)
    with torch.no_grad():
        assert torch.isfinite(Objective().loss(again, prepared).sums["tokens"])
        if method == "full":
            return
        trained = again.deltas["default"].params["tokens:embedding"]
        assert float(trained.abs().max()) > 1e-3
        rows = again.base.model.get_input_embeddings().weight.shape[0]
        again.use(None)
        assert rows == len(again.base.tokenizer)


@pytest.mark.parametrize("family", ["t5", "t5_gated", "bart", "bert"])
def test_every_module_that_reads_the_embedding_reads_the_new_rows(family):
    """T5 and BART hold one weight in several modules: what the encoder and the decoder read is as if the rows stood in the weight."""
    policy, base = made(family)
    tiny.randomise({k: p for k, p in policy.trained().items() if k == "tokens:embedding"}, std=0.3)
    ids = torch.tensor([base.tokenizer("a <tool> b glockenspiel c", add_special_tokens=False)["input_ids"]])
    lm = base.model
    sides = {"input_ids": ids} | ({"decoder_input_ids": ids} if family != "bert" else {})
    with torch.no_grad():
        attached = lm(**sides).logits
        weight, rows = lm.get_input_embeddings().weight, policy.trained()["tokens:embedding"]
        new = base.tokenizer.convert_tokens_to_ids(NEW)
        assert not torch.allclose(attached, bare(policy, sides), atol=1e-4)
        policy.use(None)
        weight[new] += rows
        if family != "t5_gated":  # whose head is a weight of its own
            torch.testing.assert_close(lm(**sides).logits, attached, atol=2e-5, rtol=1e-4)
        else:
            a, b = (m[..., : min(new)] for m in (lm(**sides).logits, attached))
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def bare(policy, sides):
    policy.use(None)
    logits = policy.lm(**sides).logits
    policy.use("default")
    return logits
