"""PEFT beside ours on one tiny model: the same tensors in both, and the largest difference of what they compute."""

import warnings

import torch

import tiny
from luthier.policy import Policy
from luthier.saving import adapter
from luthier.settings.plugins import plugin

IDS = torch.tensor([[5, 9, 11, 20, 33, 7, 41, 12]])
ATOL = 1e-5


def tuned(family, kind, *, std=0.2, **how):
    """Ours with random values in every trained tensor."""
    base = tiny.base(family)
    method = plugin("methods", kind)(**how)
    delta = method.attach(base, "default")
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in delta.params.values():
            p.add_(torch.randn(p.shape, generator=g) * std)
    return Policy(base, delta, method=method).eval()


def inputs(lm, mask=False):
    given = {"input_ids": IDS} | ({"attention_mask": torch.ones_like(IDS)} if mask else {})
    return given | ({"decoder_input_ids": IDS.flip(1)} if lm.config.is_encoder_decoder else {})


def ours(policy):
    with torch.no_grad():
        return policy.lm(**inputs(policy.lm)).logits


def theirs(family, folder):
    """The model that PEFT makes of a folder."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(tiny.model(family).eval(), folder).eval()


def logits(model):
    with torch.no_grad():
        return model(**inputs(model)).logits


def same(a, b, atol=ATOL):
    """Assert equality and say how large the difference is; that there is something to compare is the caller's to see to."""
    a, b = a.detach(), b.detach()
    largest = float((a - b).abs().max())
    assert largest <= atol * max(1.0, float(b.abs().max())), f"largest difference {largest:.2e}, values up to {float(b.abs().max()):.2e}"
    return largest


def both_ways(family, folder, policy):
    """PEFT computes the same from our folder; its own folder made of that opens here and computes the same again."""
    plain = logits(tiny.model(family).eval())
    mine = ours(policy)
    assert float((mine - plain).abs().max()) > 1e-3, "the delta does nothing, so nothing would be compared"
    adapter.save(policy, folder / "ours")
    peer = theirs(family, folder / "ours")
    same(logits(peer), mine)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer.save_pretrained(folder / "theirs")
    back = adapter.load(tiny.base(family), folder / "theirs").eval()
    same(ours(back), mine)
    return peer, back
