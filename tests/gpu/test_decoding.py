"""Decoding steps on a GPU: as on a CPU, and recorded as a CUDA graph as they are without one."""

import logging

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from luthier import build
from luthier.generating import graph
from luthier.generating.graph import GraphSteps
from luthier.policy import Policy

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 500,
    "max_position_embeddings": 512,
}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Tokenizer:
    pad_token_id = 0


def policy(device, **more):
    torch.manual_seed(0)
    lm = LlamaForCausalLM(LlamaConfig(**SHAPE | more))
    with torch.no_grad():
        for p in lm.parameters():
            p.mul_(4 if p.dim() > 1 else 1)  # random weights that say something
    return Policy(build.adopt(lm.to(device), Tokenizer())).eval()


def prompts():
    made = torch.Generator().manual_seed(0)
    return [torch.randint(3, 500, (n,), generator=made).tolist() for n in (5, 80, 33, 34, 200)]


def agreement(a, b):
    """Share of tokens up to the first that differs: rounding may decide between two."""
    same = [next((i for i, (x, y) in enumerate(zip(p, q, strict=False)) if x != y), min(len(p), len(q))) for p, q in zip(a, b, strict=True)]
    return sum(same) / sum(map(len, b))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3, "top_p": 0.9}])
def test_a_gpu_gives_the_answers_of_a_cpu(sampling):
    how = {"max_new": 40, "samples": 4 if sampling else 1, "stop": range(3, 8), **sampling}
    on_cpu, on_gpu = (policy(d).generate(prompts(), **how).ids for d in ("cpu", "cuda"))
    assert agreement(on_gpu, on_cpu) > 0.95


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("more", [{}, {"num_key_value_heads": 8}])
def test_recorded_steps_give_the_same_answers_and_are_recorded(more, monkeypatch, caplog):
    p, recorded = policy("cuda", **more), []
    own = GraphSteps._record

    def record(self, plans):
        own(self, plans)
        recorded.append(self.graph is not None)

    monkeypatch.setattr(GraphSteps, "_record", record)
    monkeypatch.setattr(graph, "_said", set())
    how = {"max_new": 60, "samples": 8, "temperature": 1.0, "stop": range(3, 12), "seed": 1}
    with caplog.at_level(logging.WARNING, "luthier"):
        got = p.generate(prompts(), cuda_graph=True, **how)
    assert recorded and all(recorded), caplog.text
    assert agreement(got.ids, p.generate(prompts(), **how).ids) > 0.95


@pytest.mark.gpu
@needs_cuda
def test_recorded_steps_are_faster(capsys):
    import time

    p, took = policy("cuda", num_hidden_layers=16), {}
    for name in (False, True, False, True):
        torch.cuda.synchronize()
        began = time.perf_counter()
        p.generate(prompts(), cuda_graph=name, samples=4, max_new=128, temperature=1.0)
        torch.cuda.synchronize()
        took[name] = time.perf_counter() - began
    with capsys.disabled():
        print(f"\n128 tokens, 16 layers: {took[False]:.2f} s as they are, {took[True]:.2f} s recorded")
    assert took[True] < took[False]
