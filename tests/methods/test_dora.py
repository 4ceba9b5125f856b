"""DoRA's norm without the dense matrix, however the base stores its weight, and its start."""

import pytest
import torch
from torch import nn

import tiny
from luthier.core import Incompatible
from luthier.methods.dora import DoraEdit, Method, row_norms


def coded(n_in, n_out, bias):
    g = torch.Generator().manual_seed(0)
    out = tiny.ByRow(n_in, n_out, nn.Parameter(torch.randn(n_out, generator=g)) if bias else None)
    out.write(torch.randn(n_out, n_in, generator=g))
    return out


def random(edit):
    with torch.no_grad():
        for p in edit.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return edit


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [20, 700])
def test_norms_and_output_are_those_of_the_dense_formula_on_a_weight_in_codes(bias, width):
    module = coded(width, 9, bias)
    dense = module.values(torch.float32)
    torch.testing.assert_close(row_norms(module, torch.float32), dense.norm(dim=1), atol=1e-4, rtol=1e-5)
    edit = random(DoraEdit(module, 3, 0.7, 0.0, torch.float32))
    changed = dense + 0.7 * edit.lora_B @ edit.lora_A
    torch.testing.assert_close(edit.norms(), changed.norm(dim=1), atol=1e-4, rtol=1e-5)
    x = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(1))
    m = edit.magnitude / changed.norm(dim=1)
    want = torch.stack([torch.stack([m * (changed @ t) + (0 if module.bias is None else module.bias) for t in row]) for row in x])
    torch.testing.assert_close(edit.after(x, module(x)), want, atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(edit.fold(dense), m[:, None] * changed, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_magnitude_starts_at_the_norms_and_the_ratio_at_exactly_one(family):
    base = tiny.base(family)
    delta = Method(targets=("all",)).attach(base, "a")
    for key, p in delta.params.items():
        path, _, leaf = key.partition(":")
        if leaf == "magnitude":
            edit = base.model.get_submodule(path).edits["a"]
            dense = base.model.get_submodule(path).base.weight
            torch.testing.assert_close(p, dense.norm(dim=0 if family == "gpt2" else 1), atol=1e-6, rtol=1e-6)
            assert bool((edit.magnitude / edit.norms() == 1.0).all())


def test_norms_are_not_saved_and_take_no_gradient():
    base = tiny.base("llama")
    delta = Method(targets=("query",)).attach(base, "a")
    assert not delta.buffers and {k.partition(":")[2] for k in delta.params} == {"lora_A", "lora_B", "magnitude"}
    edit = random(base.model.model.layers[0].self_attn.q_proj.edits["a"])
    assert not edit.norms().requires_grad


def test_the_embedding_is_refused():
    with pytest.raises(Incompatible, match="dora takes linears, and model.embed_tokens is the embedding"):
        Method(targets=("embedding",)).attach(tiny.base("llama"), "a")
