"""The contracts of a plug-in, run on tiny models with random weights: what `luthier kinds --check ./mine.py` does.

A method is tried on a decoder of each common build, an encoder and an encoder-decoder. Nothing here knows a kind: what holds for ours has to hold for yours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import build
from .core import Base, Batch, Incompatible, LuthierError, Row, join, next_token_batch, next_token_loss
from .modelling.site import restoring
from .optim import Optimizer
from .policy import Policy
from .settings.plugins import plugin
from .train import train

VOCABULARY = 40
_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Finding:
    """One contract on one model."""

    model: str
    contract: str
    wrong: str  # "" where it holds, else what was found
    skipped: bool = False


def models() -> dict[str, Callable[[], Any]]:
    """Tiny models of the common builds."""
    import transformers as t

    t5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0, "decoder_start_token_id": 0}
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0}
    return {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**_SMALL, **_IDS, num_key_value_heads=2, tie_word_embeddings=True)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **gpt2)),
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**_SMALL, **still)),
        "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(**t5, pad_token_id=0, eos_token_id=2)),
    }


def tiny(name: str) -> Base:
    """One of the models, always with the same weights."""
    torch.manual_seed(0)
    return build.adopt(models()[name]().float(), source=f"tiny {name}")


def rows(kind: str, n: int = 4) -> list[Row]:
    """Random examples of the form a kind of model trains on."""
    rng = np.random.default_rng(0)
    out = []
    for i in range(n):
        ids = rng.integers(3, VOCABULARY, rng.integers(6, 20)).astype(np.int32)
        extras = {"source": rng.integers(3, VOCABULARY, rng.integers(4, 12)).astype(np.int32)} if kind == "encoder_decoder" else {}
        out.append(Row(np.concatenate([[0], ids]).astype(np.int32) if extras else ids, np.arange(len(ids) + bool(extras)) > 0, f"made:{i + 1}", extras))
    return out


def rows_for(objective: Any, kind: str) -> list[Row]:
    """Random examples of the form an objective reads: for preferences two answers a row, the first the better one."""
    plain = rows(kind, 8)
    if objective.renders not in ("ranked", "pairs", "judged"):
        return plain[:4]
    judged = objective.renders == "judged"
    reference = np.array([-20.0, -25.0], dtype=np.float32)
    couples = zip(plain[::2], plain[1::2], strict=True)
    return [join(two, margin=0.0, ranks=() if judged else (0, 1), good=i % 2 == 0 if judged else None, reference=reference) for i, two in enumerate(couples)]


# --- methods --------------------------------------------------------------------------------------------------------


class Tried:
    """A method on one tiny model."""

    def __init__(self, method: Any, name: str):
        self.method, self.name = method, name
        self.rows = rows(tiny(name).anatomy.kind)
        self.attached()  # raises Incompatible where the method refuses the model

    def attached(self) -> Policy:
        """A fresh policy."""
        torch.manual_seed(1)
        base = tiny(self.name)
        return Policy(base, self.method.attach(base, "default"), method=self.method)

    def moved(self) -> Policy:
        """The same with its values off their start, so that it does something."""
        policy = self.attached()
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in policy.trained().values():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
        return policy

    def batch(self, policy: Policy, *, packed: bool = False, rows: Sequence[Row] | None = None) -> Batch:
        return next_token_batch(self.rows if rows is None else rows, pad=0, packed=packed and policy.base.packs)

    def gradients(self, policy: Policy, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Gradients of the mean loss, as if one batch."""
        policy.train()
        total = sum(b.units["tokens"] for b in batches)
        for p in policy.trained().values():
            p.grad = None
        for b in batches:
            (next_token_loss(policy, b).sums["tokens"] / total).backward()
        return {k: torch.zeros_like(p) if p.grad is None else p.grad.clone() for k, p in policy.trained().items()}

    # The contracts: each returns what is wrong, or "".

    def learns(self) -> str:
        """it learns, every trained tensor gets a gradient, and nothing else moves"""
        policy = self.attached()
        trained = policy.trained()
        if not trained:
            return "attach() gave a Delta without params: nothing would be trained"
        mine = {id(p) for p in trained.values()}
        before = {n: p.detach().clone() for n, p in policy.lm.named_parameters() if id(p) not in mine}
        batch = self.batch(policy)

        class Same:
            def __next__(self) -> list[Batch]:
                return [batch]

        assert policy.delta is not None
        best = first = float("inf")
        for lr in (3e-3, 3e-2, 3e-1):  # methods learn at very different rates
            fresh = self.attached()
            optimizer = Optimizer(fresh.trained(), lr=lr, patterns=fresh.delta.optim if fresh.delta else None)
            feed: Any = Same()
            place = plugin("place", "one")(on="cpu")
            steps = train(fresh, _next_token(), feed, optimizer, lr=lambda _, lr=lr: lr, steps=10, place=place)  # type: ignore[misc]
            losses = [s.loss for s in steps]
            first, best = losses[0], min(best, min(x for x in losses if np.isfinite(x)))
            silent = sorted(set(fresh.trained()) - optimizer.seen)
            if silent:
                return f"{len(silent)} trained tensors got no gradient, for example {silent[0]!r}"
            after = {id(p) for p in fresh.trained().values()}
            still = dict(fresh.lm.named_parameters())
            changed = [n for n, v in before.items() if id(still[n]) not in after and not torch.equal(v, still[n])]
            if changed:
                return f"{len(changed)} tensors outside the delta moved, for example {changed[0]!r}"
            if best < first:
                return ""
        return f"the loss never fell below its start, {first:.4f}"

    def off(self) -> str:
        """switched off it is the base, bit for bit"""
        if self.method.edits == "weights" and not getattr(self.method, "reversible", False):
            return SKIP
        policy, plain = self.moved(), Policy(tiny(self.name))
        with torch.no_grad(), policy.reference():
            same = torch.equal(policy.hidden(self.batch(policy)), plain.hidden(self.batch(plain)))
        return "" if same else "with the delta off the hidden states are not the base's"

    def packs(self) -> str:
        """packed and accumulated give the gradients of one padded batch"""
        policy = self.moved()
        whole = self.gradients(policy, [self.batch(policy)])
        for how, batches in (
            ("packed", [self.batch(policy, packed=True)]),
            ("one example at a time", [self.batch(policy, rows=[r]) for r in self.rows]),
        ):
            wrong = _apart(whole, self.gradients(policy, batches), 1e-3)
            if wrong:
                return f"{how}: {wrong}"
        return ""

    def recomputes(self) -> str:
        """recomputing blocks changes nothing"""
        policy = self.moved()
        kept = self.gradients(policy, [self.batch(policy)])
        policy.lm.activation_checkpointing_enable({"use_reentrant": False, "context_fn": restoring})  # type: ignore[operator]
        return _apart(kept, self.gradients(policy, [self.batch(policy)]), 1e-4)

    def restores(self) -> str:
        """its saved tensors alone restore it"""
        policy, again = self.moved(), self.attached()
        assert policy.delta is not None and again.delta is not None
        saved = policy.trained() | policy.delta.buffers
        own = again.trained() | again.delta.buffers
        if set(saved) != set(own):
            return f"attached again it has other tensors: {sorted(set(saved) ^ set(own))[:3]}"
        with torch.no_grad():
            for k, v in own.items():
                v.copy_(saved[k])
            same = torch.equal(policy.eval().hidden(self.batch(policy)), again.eval().hidden(self.batch(again)))
        return "" if same else "attached again with the saved values it gives other hidden states; save what they depend on as params or buffers"

    def folds(self) -> str:
        """folded into the weights it is the same function"""
        policy = self.moved().eval()
        if policy.delta is None or policy.delta.fold is None:
            return SKIP
        with torch.no_grad():
            before = policy.hidden(self.batch(policy))
            policy.fold()
            apart = float((policy.hidden(self.batch(policy)) - before).abs().max() / before.abs().max())
        return "" if apart < 1e-4 else f"largest relative difference {apart:.2g}"

    def generates(self) -> str:
        """generating with a cache equals reading the text again"""
        policy = self.moved().eval()
        if policy.base.anatomy.kind != "decoder":
            return SKIP
        prompts = [[5, 9, 11], [7] * 6]
        for prompt, new in zip(prompts, policy.generate(prompts, max_new=5).ids, strict=True):
            ids = list(prompt)
            for token in new:
                row = Row(np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=bool))
                with torch.no_grad():
                    h = policy.hidden(next_token_batch([row], pad=0, packed=False))[0, len(ids) - 1]
                if token != int(policy.base.anatomy.head(policy.lm, h).argmax()):
                    return f"after {len(ids)} tokens the cache gives another token"
                ids.append(token)
        return ""


SKIP = "skip"
CONTRACTS = (Tried.learns, Tried.off, Tried.packs, Tried.recomputes, Tried.restores, Tried.folds, Tried.generates)


def check_method(method: Any) -> Iterator[Finding]:
    """Every contract on every tiny model. A model the method refuses in a sentence is skipped, with that sentence."""
    for name in models():
        try:
            tried = Tried(method, name)
        except Incompatible as e:
            yield Finding(name, f"refused: {e}", "", skipped=True)
            continue
        except Exception as e:
            yield Finding(name, "it attaches", f"{type(e).__name__}: {e}")
            continue
        for contract in CONTRACTS:
            try:
                wrong = contract(tried)
            except LuthierError as e:
                wrong = str(e)
            except Exception as e:
                wrong = f"{type(e).__name__}: {e}"
            yield Finding(name, str(contract.__doc__), "" if wrong == SKIP else wrong, skipped=wrong == SKIP)


# --- objectives and tasks -------------------------------------------------------------------------------------------


def check_objective(objective: Any) -> Iterator[Finding]:
    """On rows of random tokens: sums by the terms it names, gradients, and that a batch is the sum of its examples."""
    for name in ("llama", "bert", "t5"):
        base = tiny(name)
        try:
            heads = objective.heads(base)
        except LuthierError as e:
            yield Finding(name, f"refused: {e}", "", skipped=True)
            continue
        method = plugin("methods", "lora")(targets=("query", "value"))
        policy = Policy(base, method.attach(base, "default"), method=method, heads=heads).eval()
        yield Finding(name, "a batch is the sum of its examples, in the terms and units it names", _guarded(lambda: _sums(objective, policy)))  # noqa: B023


def _sums(objective: Any, policy: Policy) -> str:
    examples = rows_for(objective, policy.base.anatomy.kind)
    whole = objective.collate(examples, pad=0, packed=False)
    loss = objective.loss(policy, whole)
    if set(loss.sums) - set(objective.terms):
        return f"loss() returns {sorted(loss.sums)} and terms names {sorted(objective.terms)}"
    if not any(whole.units.get(k) for k in objective.terms):
        return f"collate() counted no units of {sorted(objective.terms)}; it gave {whole.units}"
    torch.stack(list(loss.sums.values())).sum().backward()
    if all(p.grad is None or not bool(p.grad.any()) for p in policy.trained().values()):
        return "the loss reaches no trained tensor"
    if getattr(objective, "couples", False):
        return ""
    parts = [objective.collate([r], pad=0, packed=False) for r in examples]
    for k in loss.sums:
        alone = sum(float(objective.loss(policy, b).sums[k].detach()) for b in parts)
        if abs(alone - float(loss.sums[k].detach())) > 1e-3 * max(1.0, abs(alone)):
            return f"term {k}: {float(loss.sums[k].detach()):.5g} for the batch, {alone:.5g} for its examples one by one; return sums, not means"
        if sum(b.units.get(k, 0) for b in parts) != whole.units.get(k, 0):
            return f"term {k}: {whole.units.get(k)} units in the batch, {sum(b.units.get(k, 0) for b in parts)} in its examples"
    return ""


def check_task(task: Any) -> Iterator[Finding]:
    """Its rows have prompts, and it scores an answer with numbers."""
    found = task.rows("validation")
    if found:
        without = [i for i, r in enumerate(found) if "prompt" not in r]
        yield Finding("", "every row has a prompt", f"row {without[0] + 1} has none" if without else "")
    row = found[0] if found else {"prompt": "What is two and two?", "refs": ["Four."]}

    def scored() -> str:
        scores = task.score(row, "Four.")
        odd = [k for k, v in scores.items() if not isinstance(v, int | float)]
        return "score() gives nothing" if not scores else f"score()[{odd[0]!r}] is no number" if odd else ""

    yield Finding("", "it scores an answer with numbers", _guarded(scored))


def _guarded(contract: Callable[[], str]) -> str:
    try:
        return contract()
    except Exception as e:
        return f"{type(e).__name__}: {e}"


def _next_token() -> Any:
    return plugin("objectives", "sft")()


def _apart(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> str:
    """What differs most, relative to the largest gradient, or ""."""
    largest = max(float(g.abs().max()) for g in a.values())
    worst = max(a, key=lambda k: float((a[k] - b[k]).abs().max()))
    found = float((a[worst] - b[worst]).abs().max()) / max(largest, 1e-8)
    return "" if found <= tolerance else f"the gradient of {worst!r} differs by {found:.2g} of the largest"
