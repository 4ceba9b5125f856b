"""65 billion parameters on one GPU of 48 GB: the shape of LLaMA-65B with random weights in NF4, ten steps of LoRA (QLoRA: Dettmers et al., 2023).

The same function runs a tiny shape on the CPU, so that it is known to work before a GPU is rented."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from luthier import build
from luthier.core import Row
from luthier.data.feed import Batches
from luthier.modelling.packed import PackedLinear
from luthier.optim import Optimizer
from luthier.planning.memory import CUDA_CONTEXT, predict
from luthier.settings.run import Run
from luthier.train import train

LLAMA_65B = {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "intermediate_size": 22016,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
TINY = LLAMA_65B | {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 128, "vocab_size": 256}


def a_run(folder, shape, **more):
    """LoRA of rank 16 on all linears of a shape in NF4, by recomputation; the folder gets the only file there is."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False} | shape))
    return Run(
        model={"id": str(folder)},
        data={"max_tokens": 1024},
        method={"kind": "lora", "rank": 16, "targets": ["all"]},
        objective="text",
        precision={"kind": "nf4", "resident": "no"},
        recompute="blocks",
        optim={"batch_tokens": 2048, "micro_tokens": 2048},
        evaluate={"samples": 0},
        **more,
    )


def random_weights(lm, device):
    """Fill a model that lies on the meta device, one tensor at a time: linears of blocks are written in codes as they come."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(shape, mean=0.0, std=0.02):
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(mean, std, generator=generator)

    for module in lm.modules():
        if isinstance(module, PackedLinear):
            module.write(drawn((module.out_features, module.in_features)))
            continue
        for name, p in module._parameters.items():
            if p is not None:
                norm = p.dim() == 1
                setattr(module, name, nn.Parameter(drawn(p.shape, 1.0 if norm else 0.0, 0.0 if norm else 0.02), requires_grad=False))
    lm.model.rotary_emb = type(lm.model.rotary_emb)(lm.config).to(device)  # made from the configuration, so it is in no file


def ten_steps(run, device):
    """Build, train ten steps on random tokens; the losses, the policy, the optimizer, and on a GPU the peaks of building and of training."""
    base = build.load(run.model, precision=run.precision, weights=False)
    random_weights(base.model, device)
    built = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    policy, objective = build.assemble(run, base)
    optimizer = Optimizer(policy.trained(), lr=1e-3)
    rng = np.random.default_rng(0)
    n, vocabulary = run.data.max_tokens, base.model.config.vocab_size
    rows = [Row(rng.integers(0, vocabulary, n).astype(np.int32), np.arange(n) > 0, f"made:{i}") for i in range(4)]
    feed = Batches(rows, objective.collate, pad=0, packed=True, batch_tokens=run.optim.batch_tokens, micro_tokens=run.optim.micro_tokens, steps=10)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps = list(train(policy, objective, feed, optimizer, lr=lambda _: 1e-3, steps=10, place=run.place))
    trained = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return [s.loss for s in steps], policy, optimizer, (built, trained)


def test_the_same_on_a_tiny_shape_and_the_cpu_learns_and_takes_the_bytes_that_were_predicted(tmp_path):
    run = a_run(tmp_path / "tiny", TINY, place={"kind": "one", "on": "cpu"})
    losses, policy, optimizer, _ = ten_steps(run, torch.device("cpu"))
    assert len(losses) == 10 and all(map(math.isfinite, losses)) and losses[-1] < losses[0] - 0.01
    p = predict(run)
    codes = [t for m in policy.lm.modules() if isinstance(m, PackedLinear) for t in m.stored().values()]
    assert sum(t.nbytes for t in codes) == p.standing["frozen weights in codes"]
    floats = {id(t): t for t in policy.lm.parameters() if not t.requires_grad}
    assert sum(t.nbytes for t in floats.values()) == p.standing["frozen weights in bfloat16"]
    assert len(codes) and not any(".layers." in n and t.dim() == 2 for n, t in policy.lm.named_parameters() if id(t) in floats)  # no float copy stayed
    assert optimizer.state_bytes == p.standing["trained weights in float32"] + p.standing["moments of AdamW"]


def test_65_billion_parameters_train_in_48_gb_by_the_prediction(tmp_path, capsys):
    p = predict(a_run(tmp_path / "65b", LLAMA_65B), "cuda")
    with capsys.disabled():
        print(f"\nLLaMA-65B, NF4, {p.shape}: {p.total / 1e9:.1f} GB")
        for name, n in {**p.standing, **p.moments["training"].parts}.items():
            print(f"  {name:<30}{n / 1e9:8.2f} GB")
    linears = 80 * (4 * 8192**2 + 3 * 8192 * 22016)
    assert p.standing["frozen weights in codes"] / linears == pytest.approx(0.516, abs=0.0005)
    assert p.standing["frozen weights in bfloat16"] == 2 * (2 * 32000 * 8192 + (2 * 80 + 1) * 8192)
    assert p.total < 45e9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 48e9, reason="needs a CUDA device with 48 GB free")
def test_65_billion_parameters_train_in_48_gb(tmp_path, capsys):
    run = a_run(tmp_path / "65b", LLAMA_65B, place={"kind": "one", "on": "cuda"})
    losses, _, _, (built, trained) = ten_steps(run, torch.device("cuda"))
    p = predict(run, "cuda")
    predicted = p.total - CUDA_CONTEXT - p.standing["allocator"]  # what torch counts is tensors
    with capsys.disabled():
        print(f"\nbuilt in {built / 1e9:.1f} GB, trained in {trained / 1e9:.1f} GB, predicted {predicted / 1e9:.1f} GB")
        print(f"losses {losses[0]:.3f} to {losses[-1]:.3f}")
    assert max(built, trained) < 48e9
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    assert abs(predicted / trained - 1) < 0.1
