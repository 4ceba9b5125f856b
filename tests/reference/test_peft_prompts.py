"""Prompt tuning, P-tuning and prefix tuning against PEFT: the same vectors give the same logits, and folders go both ways.

A known difference: PEFT gives an encoder-decoder a prefix through its decoder's cache alone; ours enters every attention, its encoder's too, so T5 and
BART's prefixes are saved in our own layout and not in PEFT's.
"""

import pytest
import torch

import tiny
from luthier.core import Batch, Segments, Stream
from luthier.saving import adapter

pytest.importorskip("peft")
from reference import peft_peer as peer

T = peer.IDS.shape[1]


SEGMENTS = Segments(torch.tensor([0]), torch.tensor([0]), torch.tensor([T]))


def ours(policy):
    """What is computed of the text behind what is put before it: an encoder's hidden states, else logits."""
    kind = policy.base.anatomy.kind
    source = Stream(ids=peer.IDS, segments=SEGMENTS) if kind == "encoder_decoder" else None
    batch = Batch(ids=peer.IDS.flip(1) if source else peer.IDS, segments=SEGMENTS, source=source)
    with torch.no_grad():
        hidden = policy.hidden(batch)
        return hidden if kind == "encoder" else policy.base.anatomy.head(policy.lm, hidden)


def theirs(model):
    lm = model.base_model
    with torch.no_grad():
        out = model(**peer.inputs(lm, mask=True), **({} if lm.config.is_encoder_decoder else {"output_hidden_states": True}))
    encoder = lm.config.model_type in ("bert", "roberta")
    return (out.hidden_states[-1] if encoder else out.logits)[:, -T:]


KINDS = [
    ("prompt", {}),
    ("p_tuning", {"encoder": "mlp"}),
    ("p_tuning", {"encoder": "lstm"}),
    ("prefix", {}),
    ("prefix", {"hidden": 16}),
    ("p_tuning_v2", {}),
]
FAMILIES = [(f, *k) for f in ("llama", "gpt2", "bert") for k in KINDS] + [(f, "prefix", {}) for f in ("qwen3", "phi3", "gpt_neox", "roberta")]


@pytest.mark.parametrize(("family", "kind", "how"), [*FAMILIES, ("t5", "prompt", {}), ("bart", "p_tuning", {})])
def test_folders_go_both_ways(kind, how, family, tmp_path):
    policy = peer.tuned(family, kind, length=5, **how)
    mine = ours(policy)
    policy.use(None)
    assert float((mine - ours(policy)).abs().max()) > 1e-3
    policy.use("default")
    adapter.save(policy, tmp_path / "ours")
    model = peer.theirs(family, tmp_path / "ours")
    peer.same(theirs(model), mine)
    model.save_pretrained(tmp_path / "theirs")
    back = adapter.load(tiny.base(family), tmp_path / "theirs").eval()
    peer.same(ours(back), mine)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_prefix_that_peft_would_compute_otherwise_is_not_written_for_it(family, tmp_path):
    policy = peer.tuned(family, "prefix", length=5)
    adapter.save(policy, tmp_path / "a")
    assert not (tmp_path / "a" / "adapter_config.json").exists()
    peer.same(ours(adapter.load(tiny.base(family), tmp_path / "a").eval()), ours(policy), atol=0.0)


def test_a_prefix_of_peft_opens_here(tmp_path):
    """Made there, with random values and grouped queries; nothing of ours had a hand in it."""
    import peft

    config = peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny.model("llama").eval(), config).eval()
    with torch.no_grad():
        for p in model.prompt_encoder.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) * 0.5)
    model.save_pretrained(tmp_path / "a")
    policy = adapter.load(tiny.base("llama"), tmp_path / "a").eval()
    assert policy.deltas["default"].shift == 4
    peer.same(ours(policy), theirs(model))
