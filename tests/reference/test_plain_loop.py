"""Twenty steps of ours against a plain PyTorch loop over the same model, data and order, and against PEFT."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

import tiny
from luthier import build
from luthier.methods.full import Method as Full
from luthier.methods.lora import Method as Lora
from luthier.nn.schedule import factor
from luthier.objectives.sft import Objective
from luthier.optim import Optimizer
from luthier.place.one import Place
from luthier.policy import Policy
from luthier.train import train

STEPS, LR = 20, 3e-3


def rate(step):
    return LR * factor(step, STEPS, kind="cosine", warmup=3)


class Feed:
    """Eight rows a step, in micro-batches."""

    def __init__(self, micro, packed):
        self.step, self.micro, self.packed = 0, micro, packed

    def __next__(self):
        rows = tiny.rows(8, seed=self.step)
        self.step += 1
        return [Objective().collate(rows[i : i + self.micro], pad=0, packed=self.packed) for i in range(0, 8, self.micro)]


def ours(model, method, micro=8, packed=True, values=None):
    base = build.adopt(model)
    delta = method.attach(base, "default")
    if values is not None:
        with torch.no_grad():
            for k, p in delta.params.items():
                p.copy_(values[k])
    policy = Policy(base, delta, method=method)
    optimizer = Optimizer(policy.trained(), lr=LR, weight_decay=0.01)
    return [s.loss for s in train(policy, Objective(), Feed(micro, packed), optimizer, lr=rate, steps=STEPS, clip=1.0, place=Place(on="cpu"))]


def plain(model, params):
    """transformers' own forward, all logits, torch's cross-entropy, AdamW and clipping."""
    decayed = [p for p in params if p.ndim >= 2]
    rest = [p for p in params if p.ndim < 2]
    adam = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}], lr=LR)
    losses = []
    model.train()
    for step in range(STEPS):
        for group in adam.param_groups:
            group["lr"] = rate(step)
        rows = tiny.rows(8, seed=step)
        ids = torch.zeros(8, max(map(len, rows)), dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for i, r in enumerate(rows):
            ids[i, : len(r)] = torch.from_numpy(r.ids).long()
            labels[i, : len(r)] = torch.where(torch.from_numpy(r.train), ids[i, : len(r)], -100)
        mask = torch.arange(ids.shape[1])[None] < torch.tensor([[len(r)] for r in rows])
        logits = model(input_ids=ids, attention_mask=mask.long()).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("micro", "packed"), [(8, True), (8, False), (1, False)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_full_fine_tuning_equals_a_plain_loop_for_20_steps(family, micro, packed):
    model = tiny.model(family)
    twin = copy.deepcopy(model)
    reference = plain(twin, list(twin.parameters()))
    assert ours(model, Full(), micro, packed) == pytest.approx(reference, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_equals_peft_for_20_steps_from_the_same_adapter(family):
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "v_proj"] if family == "llama" else ["c_attn"]
    model = tiny.model(family)
    theirs = peft.get_peft_model(
        copy.deepcopy(model),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, lora_dropout=0.0, fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM"),
    )
    values = {}
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            path, _, leaf = name.removeprefix("base_model.model.").partition(".lora_")
            values[f"{path}:lora_{leaf[0]}"] = p.detach().clone()
    reference = plain(theirs, [p for p in theirs.parameters() if p.requires_grad])
    assert ours(model, Lora(rank=4, alpha=8, targets=tuple(targets)), values=values) == pytest.approx(reference, rel=1e-5)
