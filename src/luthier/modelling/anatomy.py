"""Where things are in one model: its blocks and their sublayers, its linears by role, its attentions, its head, and the vector a classifier reads.

Names of families are in `families`; everything here reads a model, and sees through the sites that deltas have put into it: a path is always the
one in the untouched base. A family that is not in the table is read from its structure. What cannot be told so can still be targeted by its own
name or by a regular expression.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from ..core import Incompatible, Segments
from .families import FAMILIES, FEED_FORWARDS, GROUPS, OUTPUTS, POST_NORMS, ROLES, USUAL, USUAL_FUSED, Roles
from .packed import PackedLinear
from .shards import gathered
from .site import Site

UNBOUNDED = 2048  # positions taken for a model that has no last one (T5's are relative)


def is_linear(module: nn.Module) -> bool:
    """A linear layer, GPT-2's transposed Conv1D and one whose weight is in codes included."""
    return isinstance(module, nn.Linear | PackedLinear) or type(module).__name__ == "Conv1D"


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer."""
    if type(module).__name__ == "Conv1D":
        return module.weight.shape[0], module.weight.shape[1]  # type: ignore[return-value, index]
    return module.in_features, module.out_features  # type: ignore[return-value]


def dense_weight(module: nn.Module) -> Tensor:
    """(out, in) fp32 weight of a linear, however it is kept."""
    with gathered(module):
        if isinstance(module, PackedLinear):
            return module.dense(torch.float32)
        weight = module.weight.detach().float()  # type: ignore[operator, union-attr]
    return weight.t() if type(module).__name__ == "Conv1D" else weight


def device_of(module: nn.Module) -> torch.device:
    """Where a module's numbers are."""
    return next(iter([*module.parameters(recurse=False), *module.buffers(recurse=False)])).device


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters in another dtype, in place. Buffers keep theirs: rotary frequencies are float32 in a model that is read from 16-bit files, too."""
    for p in model.parameters():
        p.data = p.data.to(dtype)


def numbers(module: nn.Module) -> int:
    """Parameters of a module and of all in it, those that codes stand for included."""
    linears = [m for m in module.modules() if isinstance(m, PackedLinear)]
    codes = {id(t) for m in linears for t in m.stored().values()}  # parameters themselves where a base is sharded
    return sum(p.numel() for p in module.parameters() if id(p) not in codes) + sum(m.count for m in linears)


def modules(module: nn.Module, path: str = "", seen: set[nn.Module] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the untouched base, in order: as ``named_modules`` would give them without any site."""
    seen = set() if seen is None else seen
    module = module.base if isinstance(module, Site) else module
    if module in seen:
        return
    seen.add(module)
    yield path, module
    for name, child in module.named_children():
        yield from modules(child, f"{path}.{name}" if path else name, seen)


@dataclass(frozen=True)
class Anatomy:
    """Where things are in one model.

    A role is every linear of that kind: in an encoder-decoder, of both stacks, and ``query`` ... ``output`` of self-attention and cross-attention alike.
    """

    family: str
    stacks: dict[str, str]  # stack -> path of the ModuleList of its blocks
    linears: Roles  # canonical role -> paths inside a block
    experts: bool  # its feed-forward is a mixture of experts
    head_scale: float  # logits = cap(scale * head(hidden))
    head_cap: float | None
    kind: str = "decoder"  # or "encoder", "encoder_decoder"
    first_position: int = 0  # the position id of an example's first token
    decoder_start: int = 0  # the token an encoder-decoder's answer begins with

    @classmethod
    def of(cls, model: Any) -> Anatomy:
        """Read a transformers model. Raises Incompatible where no trunk of repeated blocks or no output head is found."""
        config = model.config.get_text_config()
        family = config.model_type
        if model.get_output_embeddings() is None:
            raise Incompatible(
                f"{type(model).__name__} has no language-model head; this program opens AutoModelForCausalLM, AutoModelForMaskedLM and AutoModelForSeq2SeqLM"
            )
        kind, stacks = kind_of(model), _stacks(model)
        everything = dict(modules(model))
        linears = FAMILIES.get(family) or _guess(everything[f"{next(iter(stacks.values()))}.0"])
        return cls(
            family,
            stacks,
            linears,
            any("expert" in n for n in everything),
            *_head_rule(config),
            kind=kind,
            first_position=_first_position(everything),
            decoder_start=_decoder_start(model) if kind == "encoder_decoder" else 0,
        )

    def targets(self, model: nn.Module, names: Sequence[str]) -> list[str]:
        """Module paths that the user's names mean, in model order.

        A name is canonical (query, q, ..., attention, mlp, all), a module's own last name (q_proj), or a regular expression that
        matches a whole path. Raises Incompatible naming what there is where a name matches nothing.
        """
        everything = [n for n, m in modules(model) if is_linear(m)]
        inside = dict.fromkeys(everything, "")  # path inside its block, for the linears of blocks
        for stack in self.stacks.values():
            inside |= {p: p[len(stack) + 1 :].partition(".")[2] for p in everything if p.startswith(stack + ".")}
        paths = [p for p in everything if inside[p]]
        found: set[str] = set()
        for name in names:
            roles = GROUPS.get(name) or tuple(r for r, spellings in ROLES.items() if name in spellings)
            if roles:
                wanted = {suffix for r in roles for suffix in self.linears.get(r, ())}
                if not wanted and self.experts:
                    raise Incompatible(
                        f"targets: {name!r} are the experts of this mixture ({self.family}), which are not trained; "
                        "its attention is: query, key, value, output or attention"
                    )
                hits = [p for p in paths if inside[p] in wanted]
            elif re.fullmatch(r"\w+", name):
                hits = [p for p in paths if p.rsplit(".", 1)[-1] == name]
            else:
                try:
                    hits = [p for p in everything if re.fullmatch(name, p)]
                except re.error as e:
                    raise Incompatible(f"targets: {name!r} is no valid regular expression: {e}") from None
            if not hits:
                own = sorted({p.rsplit(".", 1)[-1] for p in paths})
                raise Incompatible(
                    f"targets: nothing in this model ({self.family}) is called {name!r}; there are {', '.join(sorted(set(self.linears)))}, "
                    f"attention, mlp, all; by their own names {', '.join(own)}; or a regular expression over whole paths such as {paths[0]!r}"
                )
            found.update(hits)
        return [p for p in everything if p in found]

    def before_head(self, model: Any, hidden: Tensor) -> Tensor:
        """What the output matrix is applied to: the hidden states, or an encoder's transform of them (BERT, RoBERTa and ModernBERT, each in its own place)."""
        if self.kind != "encoder":
            return hidden
        if hasattr(model, "cls"):
            return model.cls.predictions.transform(hidden)
        if hasattr(getattr(model, "lm_head", None), "dense"):
            return model.lm_head.layer_norm(gelu(model.lm_head.dense(hidden)))
        return model.head(hidden) if hasattr(model, "head") else hidden

    def head(self, model: Any, hidden: Tensor) -> Tensor:
        """fp32 logits of hidden states (..., D), as the model itself makes them."""
        logits = model.get_output_embeddings()(self.before_head(model, hidden)).float() * self.head_scale
        return logits if self.head_cap is None else self.head_cap * torch.tanh(logits / self.head_cap)

    def pool(self, hidden_BTD: Tensor, segments: Segments) -> Tensor:
        """(S, D): the vector of each example that a classification head reads. An encoder's is its first token's, which sees all the others; a decoder's,
        and the decoder's of an encoder-decoder, its last token's."""
        return segments.pick(hidden_BTD, "first" if self.kind == "encoder" else "last")


# --- blocks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """One block's sublayers, by the paths of their modules. A dropout may stand between a module named ``_out`` and the sum.

    Granite multiplies what a sublayer gives by ``config.residual_multiplier`` before the sum: an edit of its ``_out`` adds that much of itself.
    Norms of queries and keys inside an attention are not among ``norms``.
    """

    path: str  # "model.layers.0"
    stack: str  # "decoder" or "encoder" (the only stack of a decoder-only / encoder-only model is named after its kind)
    attention: str  # the self-attention that calls attention.attend
    cross: str | None  # the cross-attention
    attention_out: str  # its OUTPUT is what self-attention adds to the residual stream, before the sum and before a norm of the sum (BERT's)
    cross_out: str | None
    mlp_in: str  # its INPUT is the feed-forward sublayer's input
    mlp_out: str  # its OUTPUT is what the feed-forward adds to the residual stream; mlp_in == mlp_out where one module is the whole sublayer
    norms: tuple[str, ...]


def blocks(model: Any) -> list[Block]:
    """All blocks in model order, an encoder-decoder's encoder first.

    Raises Incompatible where a block's sublayers are not found by the names the field uses.
    """
    everything = dict(modules(model))
    own = [a.path for a in attentions(model)]
    return [
        _block(everything, f"{stack}.{i}", name, own)
        for name, stack in _stacks(model).items()
        for i in range(len(everything[stack]))  # type: ignore[arg-type]
    ]


def _block(everything: dict[str, nn.Module], path: str, stack: str, own: list[str]) -> Block:
    here = {n[len(path) + 1 :] for n in everything if n.startswith(path + ".")}
    found = [a for a in own if a.startswith(path + ".")]
    feed = next((pair for pair in FEED_FORWARDS if here.issuperset(pair)), None)
    after = next((pair for pair in POST_NORMS if here.issuperset(pair)), None)
    if not found or feed is None:
        raise Incompatible(f"{path}: {'the feed-forward' if found else 'the attention'} of this block is not called by a name this program knows")
    outs = [f"{path}.{after[0]}" if after and i == 0 else _output(everything, a) for i, a in enumerate(found)]
    norms = tuple(
        n for n, m in everything.items() if n.startswith(path + ".") and "Norm" in type(m).__name__ and not n.startswith(tuple(a + "." for a in found))
    )
    return Block(
        path,
        stack,
        found[0],
        found[1] if len(found) > 1 else None,
        outs[0],
        outs[1] if len(outs) > 1 else None,
        f"{path}.{feed[0]}",
        f"{path}.{after[1] if after else feed[1]}",
        norms,
    )


def _output(everything: dict[str, nn.Module], attention: str) -> str:
    """The last linear of an attention: inside it, or beside it."""
    beside = attention.rpartition(".")[0]
    for name in (*(f"{attention}.{o}" for o in OUTPUTS), f"{beside}.output.dense"):
        if name in everything:
            return name
    raise Incompatible(f"{attention}: the output projection of this attention is not called by a name this program knows")


@dataclass(frozen=True)
class Attention:
    """One attention module: what `attention.attend` gets as its module."""

    path: str
    module: nn.Module
    heads: int  # of keys and values
    dim: int  # of each

    @property
    def columns(self) -> int:
        """Numbers that one virtual token takes here: its key and its value."""
        return 2 * self.heads * self.dim


def attentions(model: Any) -> list[Attention]:
    """All attentions in model order: an encoder-decoder's encoder first, in its decoder self before cross."""
    out = []
    for path, module in modules(model):
        children = (m.base if isinstance(m, Site) else m for m in module.children())
        if not (hasattr(module, "layer_idx") and hasattr(module, "is_causal") and any(is_linear(m) for m in children)):
            continue
        config: Any = getattr(module, "config", None) or model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or getattr(module, "num_heads", None) or config.num_attention_heads
        dim = next((d for k in ("head_dim", "key_value_proj_dim", "attention_head_size") if (d := getattr(module, k, None))), None)
        out.append(Attention(path, module, heads, dim or config.hidden_size // config.num_attention_heads))  # type: ignore[arg-type]
    return out


# --- the whole model ------------------------------------------------------------------------------------------------


def trunk(model: Any) -> nn.Module:
    """The part that makes hidden states: everything but the head."""
    return model.base_model


def configs(model: Any) -> list[Any]:
    """Every configuration that a part of the model reads, its own first: T5's stacks each have a copy."""
    found = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return list(found.values())


def kind_of(model: Any) -> str:
    """ "decoder", "encoder" or "encoder_decoder": an encoder's attention sees both ways."""
    if model.config.is_encoder_decoder:
        return "encoder_decoder"
    causal = [bool(a.module.is_causal) for a in attentions(model)]
    return "encoder" if (not any(causal) if causal else "MaskedLM" in type(model).__name__) else "decoder"


def max_positions(model: Any, first_position: int) -> int:
    """Tokens that fit into one example. A model of relative positions has no limit of its own (what T5's configuration calls n_positions is the
    length it was trained at): `UNBOUNDED` is taken."""
    config = model.config.get_text_config()
    if hasattr(config, "relative_attention_num_buckets"):
        return UNBOUNDED
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or UNBOUNDED
    return int(positions) - first_position


def _stacks(model: Any) -> dict[str, str]:
    """Stack -> path of the list of its blocks, the encoder first."""
    if kind_of(model) != "encoder_decoder":
        return {kind_of(model): _longest(model)}
    where = {id(m): n for n, m in modules(model)}
    parts = {"encoder": model.get_encoder(), "decoder": model.get_decoder()}
    return {name: f"{where[id(part)]}.{_longest(part)}" for name, part in parts.items()}


def _longest(model: nn.Module) -> str:
    lists = [(n, m) for n, m in modules(model) if isinstance(m, nn.ModuleList) and len(m) and "expert" not in n]
    # The list of blocks is the outermost one with the most parameters.
    best = max(lists, key=lambda nm: (numbers(nm[1]), -nm[0].count(".")), default=None)
    if best is None:
        raise Incompatible(f"{type(model).__name__} has no list of repeated blocks; this program knows transformer models")
    return best[0]


def _guess(block: nn.Module) -> Roles:
    """Roles of an unknown family, from the names its linears have."""
    out: Roles = {}
    for path, module in modules(block):
        leaf = path.rsplit(".", 1)[-1]
        if is_linear(module) and "expert" not in path:
            for role, names in USUAL.items():
                if leaf in names:
                    out.setdefault(role, (path,))
            if leaf in USUAL_FUSED:
                out |= dict.fromkeys(("query", "key", "value"), (path,))
    return out


def _head_rule(config: Any) -> tuple[float, float | None]:
    """How a family changes its logits: a multiplier and a soft cap. The probe at load checks it against the model itself."""
    cap = getattr(config, "final_logit_softcapping", None)
    if getattr(config, "logits_scaling", None):  # Granite divides
        return 1.0 / config.logits_scaling, cap
    if getattr(config, "scale_decoder_outputs", False):  # T5 with a tied head scales what the head reads
        return config.d_model**-0.5, cap
    return float(getattr(config, "logit_scale", None) or 1.0), cap  # Cohere multiplies


def _first_position(everything: dict[str, nn.Module]) -> int:
    """RoBERTa counts positions from the one behind its padding id."""
    made = [m for m in everything.values() if hasattr(m, "create_position_ids_from_input_ids")]
    return int(made[0].padding_idx) + 1 if made else 0  # type: ignore[arg-type]


def _decoder_start(model: Any) -> int:
    """The token that begins every answer, as the model's own generation has it."""
    for config in (getattr(model, "generation_config", None), model.config):
        for key in ("decoder_start_token_id", "bos_token_id"):
            if (token := getattr(config, key, None)) is not None:
                return int(token)
    raise Incompatible(f"{type(model).__name__}: config.json names no decoder_start_token_id, the token that begins every answer; add it there")
