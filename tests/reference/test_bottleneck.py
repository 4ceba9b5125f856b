"""Bottleneck adapters against slow references: whole forwards of a tiny Llama and a tiny BERT written out with plain tensors, one example and one token
at a time where the formula is, each adapter as its paper states it."""

import math

import pytest
import torch

import tiny
from luthier.core import next_token_batch
from luthier.methods.adapter import Method
from luthier.policy import Policy

ROWS = [tiny.row([5, 6, 7, 8, 9, 10, 11]), tiny.row([40, 3, 17, 22])]
PLACEMENTS = ["houlsby", "pfeiffer", "block", "parallel"]


def policy_of(family, **fields):
    base = tiny.base(family)
    method = Method(bottleneck=3, **fields)
    delta = method.attach(base, "default")
    tiny.randomise(delta.params, std=0.4)
    return Policy(base, delta, method=method)


class Plain:
    """A model's weights, and the deltas of a policy, by name."""

    def __init__(self, policy, family, activation):
        self.w = {k: v.double() for k, v in tiny.model(family).state_dict().items()}
        self.d = {k: v.detach().double() for k, v in policy.delta.params.items()}
        self.f = {
            "relu": lambda a: max(a, 0.0),
            "gelu": lambda a: a * 0.5 * (1.0 + math.erf(a / math.sqrt(2.0))),
            "silu": lambda a: a / (1.0 + math.exp(-a)),
        }[activation]

    def linear(self, name, x):
        y = x @ self.w[f"{name}.weight"].T
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def bottleneck(self, place, u_TD):
        """U f(D u + b) + c, a token, a unit at a time."""
        down, b, up, c = (self.d[f"{place}:{leaf}"] for leaf in ("down.weight", "down.bias", "up.weight", "up.bias"))
        out = []
        for u in u_TD:
            inner = [self.f(sum(float(w * x) for w, x in zip(row, u, strict=True)) + float(bias)) for row, bias in zip(down, b, strict=True)]
            out.append(torch.stack([sum(weight * a for weight, a in zip(row, inner, strict=True)) + bias for row, bias in zip(up, c, strict=True)]))
        return torch.stack(out)


def attend(q, k, v, heads, causal):
    """(T, heads * d) each, k and v perhaps with fewer heads."""
    T, d = len(q), q.shape[1] // heads
    q = q.view(T, heads, d)
    k, v = (x.view(T, -1, d).repeat_interleave(heads // (x.shape[1] // d), 1) for x in (k, v))
    out = torch.zeros(T, heads, d, dtype=q.dtype)
    for h in range(heads):
        for t in range(T):
            seen = range(t + 1) if causal else range(T)
            scores = torch.stack([q[t, h] @ k[s, h] / math.sqrt(d) for s in seen]).softmax(0)
            out[t, h] = sum(p * v[s, h] for p, s in zip(scores, seen, strict=True))
    return out.reshape(T, -1)


def rotate(x, heads):
    """Rotary positions, theta 10000, halves."""
    T = len(x)
    x = x.view(T, heads, -1)
    half = x.shape[2] // 2
    angle = torch.arange(T, dtype=torch.float64)[:, None] / 10000 ** (torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).reshape(T, -1)


def rms(x, weight):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def layer_norm(x, weight, bias):
    x = x - x.mean(-1, keepdim=True)
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt() + bias


def llama(plain, ids, placement, *, reads="mlp", norms=False):
    """Final hidden states (T, D). The sum is never normalised here, so what pfeiffer reads is the sum."""
    w = plain.w
    x = w["model.embed_tokens.weight"][ids]
    for i in range(2):
        p = f"model.layers.{i}"
        gain = lambda name, p=p: w[f"{p}.{name}.weight"] + (plain.d[f"{p}.{name}:weight"] if norms else 0)  # noqa: E731
        n = rms(x, gain("input_layernorm"))
        q, k, v = (plain.linear(f"{p}.self_attn.{r}_proj", n) for r in "qkv")
        h = plain.linear(f"{p}.self_attn.o_proj", attend(rotate(q, 4), rotate(k, 2), v, 4, causal=True))
        x = x + (h + plain.bottleneck(f"{p}.self_attn.o_proj", h) if placement == "houlsby" else h)
        n = rms(x, gain("post_attention_layernorm"))
        gate = plain.linear(f"{p}.mlp.gate_proj", n)
        h = plain.linear(f"{p}.mlp.down_proj", gate * gate.sigmoid() * plain.linear(f"{p}.mlp.up_proj", n))
        if placement == "houlsby":
            x = x + h + plain.bottleneck(f"{p}.mlp", h)
        elif placement == "parallel":
            x = x + h + 4.0 * plain.bottleneck(f"{p}.mlp", n if reads == "mlp" else x)
        else:
            x = x + h + plain.bottleneck(p, x + h)
    return rms(x, w["model.norm.weight"])


def bert(plain, ids, placement, *, norms=False):
    """Final hidden states (T, D). The sum of each sublayer is normalised."""
    w = plain.w
    e = "bert.embeddings"
    x = w[f"{e}.word_embeddings.weight"][ids] + w[f"{e}.position_embeddings.weight"][: len(ids)] + w[f"{e}.token_type_embeddings.weight"][0]
    x = layer_norm(x, w[f"{e}.LayerNorm.weight"], w[f"{e}.LayerNorm.bias"])
    for i in range(2):
        p = f"bert.encoder.layer.{i}"

        def norm(name, x, p=p):
            weight, bias = (w[f"{p}.{name}.{leaf}"] + (plain.d[f"{p}.{name}:{leaf}"] if norms else 0) for leaf in ("weight", "bias"))
            return layer_norm(x, weight, bias)

        q, k, v = (plain.linear(f"{p}.attention.self.{r}", x) for r in ("query", "key", "value"))
        h = plain.linear(f"{p}.attention.output.dense", attend(q, k, v, 4, causal=False))
        x = norm("attention.output.LayerNorm", x + (h + plain.bottleneck(f"{p}.attention.output.dense", h) if placement == "houlsby" else h))
        inner = plain.linear(f"{p}.intermediate.dense", x)
        r = plain.linear(f"{p}.output.dense", inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2))))
        place = f"{p}.output.dense"
        if placement == "houlsby":
            x = norm("output.LayerNorm", x + r + plain.bottleneck(place, r))
        elif placement == "pfeiffer":  # A(h, r) = U f(D h) + r, with h the normalised sum
            x = norm("output.LayerNorm", x + r + plain.bottleneck(place, norm("output.LayerNorm", x + r)))
        elif placement == "parallel":
            x = norm("output.LayerNorm", x + r + 4.0 * plain.bottleneck(place, x))
        else:
            z = norm("output.LayerNorm", x + r)
            x = z + plain.bottleneck(p, z)
    return x


WAYS = [
    *(("llama", {"placement": p, "activation": a}) for p, a in zip(PLACEMENTS, ("relu", "gelu", "silu", "relu"), strict=True)),
    ("llama", {"placement": "parallel", "activation": "gelu", "reads": "stream"}),
    ("llama", {"placement": "houlsby", "activation": "gelu", "norms": True}),
    *(("bert", {"placement": p, "activation": a}) for p, a in zip(PLACEMENTS, ("gelu", "relu", "relu", "silu"), strict=True)),
    ("bert", {"placement": "pfeiffer", "activation": "relu", "norms": True}),
]


@pytest.mark.parametrize(("family", "fields"), WAYS, ids=["-".join([f, *map(str, w.values())]) for f, w in WAYS])
def test_every_placement_is_its_formula(family, fields):
    policy = policy_of(family, **fields)
    plain = Plain(policy, family, fields["activation"])
    rest = {k: v for k, v in fields.items() if k not in ("placement", "activation")}
    for packed in {False, policy.base.packs}:
        batch = next_token_batch(ROWS, pad=0, packed=packed)
        with torch.no_grad():
            ours = policy.hidden(batch)
        example = batch.segments.example(batch.shape)
        for s, row in enumerate(ROWS):
            slow = (llama if family == "llama" else bert)(plain, torch.tensor(row.ids, dtype=torch.long), fields["placement"], **rest)
            torch.testing.assert_close(ours[example == s].double(), slow, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_without_an_adapter_the_reference_is_the_model(family):
    policy = policy_of(family, placement="block")
    plain = Plain(policy, family, "relu")
    plain.d = {k: torch.zeros_like(v) for k, v in plain.d.items()}
    with torch.no_grad(), policy.reference():
        ours = policy.hidden(next_token_batch(ROWS[:1], pad=0, packed=False))[0, : len(ROWS[0])]
    slow = (llama if family == "llama" else bert)(plain, torch.tensor(ROWS[0].ids, dtype=torch.long), "block")
    torch.testing.assert_close(ours.double(), slow, atol=1e-5, rtol=1e-5)
