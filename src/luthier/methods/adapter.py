"""Bottleneck adapters: h + s U f(D u + b) + s c, with D (m, d) and U (d, m) trained, beside or behind the sublayers of every block.

Placements differ in what is read (u) and where the result is added:
- houlsby: behind attention and behind the feed-forward, each inside its residual branch; u = h = the sublayer's output.
  Houlsby et al., 2019, arXiv 1902.00751, section 2.1 and figure 2.
- pfeiffer: behind the feed-forward only; h = its output, u = what the block would have given: the sum with the residual stream, normalised where
  the model normalises that sum (BERT, BART). Pfeiffer et al., 2020, arXiv 2005.00052, the language adapter: U ReLU(D h) + r, where r is the output
  of the feed-forward and h that of the normalisation behind it. AdapterHub's seq_bn.
- block: on the residual stream; u = h = the block's output, behind its last normalisation; as most texts draw an adapter.
- parallel: h = the feed-forward's output, u = its input, s = 4. He et al., 2022, arXiv 2110.04366, table 1 (scaled parallel adapter).

How it differs from the papers:
1. U, b and c start at exactly 0, and D Kaiming-uniform with a = sqrt(5), as in He et al.'s code; so the model starts as the base, bit for bit.
   Houlsby et al. draw D and U from a Gaussian of standard deviation 0.01 cut at two of them: near the identity, not at it.
2. Where nothing normalises the sum (Llama, GPT-2, T5), pfeiffer reads the sum itself, as AdapterHub does; there it is the same as block.
3. Decoders and encoder-decoders are served too; houlsby stands behind cross-attention only where ``cross`` asks for it.
4. In a model whose sublayers end in a normalisation of their own (Gemma 2), the branch ends behind that, and houlsby, pfeiffer and parallel act there.
5. The base's dropout, if it is on, follows the adapter instead of preceding it.
6. ``norms`` trains differences to the base's weights and biases, not copies of them, so that two such deltas can be stacked. Only the blocks' own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import dropout, gelu, linear, relu, silu

from ..core import Base, Delta, Incompatible
from ..deltas import adapterhub
from ..errors import ConfigError
from ..modelling.anatomy import Block, blocks, modules
from ..modelling.site import Edit, current, site_at
from ..modelling.wiring import wirings
from ..settings.plugins import Range, within_ranges

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": relu, "gelu": gelu, "silu": silu}


class Bottleneck(Edit):
    """The adapter of one sublayer, reading what it is added to. down (m, d), up (d, m), fp32; computed in the activations' dtype."""

    def __init__(self, width: int, size: int, activation: str, scale: float, p: float, device: Any):
        super().__init__()
        self.f, self.scale, self.p = FUNCTIONS[activation], scale, p
        self.down, self.up = nn.Linear(width, size, device=device), nn.Linear(size, width, device=device)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def added_to(self, y: Tensor, u: Tensor) -> Tensor:
        """y + s U f(D u + b) + s c."""
        inner = self.f(linear(u, self.down.weight.to(u.dtype), self.down.bias.to(u.dtype)))
        change = linear(inner, self.up.weight.to(u.dtype), self.up.bias.to(u.dtype))
        return torch.add(y, dropout(change, self.p, self.training) if self.p else change, alpha=self.scale)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return self.added_to(y, y)


class Held(Edit):
    """Keeps a module's input until another module of the same forward has been reached: in the frame, so that recomputation and concurrent forwards
    never see one another's; outside frames, here."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: dict[Any, Tensor] = {}

    def _store(self) -> dict[Any, Any]:
        frame = current()
        return self.outside if frame is None else frame.plans

    def before(self, x: Tensor) -> Tensor:
        self._store()["held", self] = x
        return x

    def take(self) -> Tensor:
        """What was kept; it is forgotten here."""
        return self._store().pop(("held", self))


class Parallel(Bottleneck):
    """Reads what the feed-forward read: what is held, or the input of the edited module where that one is the whole feed-forward."""

    def __init__(self, held: Held | None, *made: Any):
        super().__init__(*made)
        self.held = held

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return self.added_to(y, x if self.held is None else self.held.take())


class BehindNorm(Bottleneck):
    """Reads the normalised sum of the residual stream (held) and the feed-forward's output, and adds to that output."""

    def __init__(self, held: Held, norm: Callable[[Tensor], Tensor], *made: Any):
        super().__init__(*made)
        self.held, self.norm = held, norm

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return self.added_to(y, self.norm(y + self.held.take()))


class NormShift(Edit):
    """Differences to the parameters of one normalisation, starting at 0; the base's own never move.

    A normalisation is affine in its parameters, so the change of its output is what it gives with the differences alone in their place; Gemma's, which
    multiplies by 1 + w, with w = difference - 1.
    """

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.unregistered = (norm,)  # in a tuple, or its parameters would be listed as this edit's
        self.names = [n for n, _ in norm.named_parameters(recurse=False)]
        for n, p in norm.named_parameters(recurse=False):
            self.register_parameter(n, nn.Parameter(torch.zeros(p.shape, device=p.device)))
        self.offset = self._adds_one(norm)

    def _adds_one(self, norm: nn.Module) -> bool:
        p = next(norm.parameters(recurse=False))
        if p.device.type == "meta":
            return False
        zeros = {n: torch.zeros_like(q) for n, q in norm.named_parameters(recurse=False)}
        with torch.no_grad():
            return bool(functional_call(norm, zeros, (torch.linspace(-1, 1, p.numel(), device=p.device, dtype=p.dtype).view(1, -1),)).any())

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        (norm,) = self.unregistered
        values = {n: p.to(x.dtype) for n, p in self.named_parameters()}
        if self.offset:
            values["weight"] = self.get_parameter("weight") - 1  # stays fp32, as Gemma's norm computes: 1 + (difference - 1) is exact enough only there
        return y + functional_call(norm, values, (x,)).to(y.dtype)


class Chain(Edit):
    """Several edits of one delta at one place, in order."""

    def __init__(self, edits: Sequence[Edit]):
        super().__init__()
        self.edits = nn.ModuleList(edits)

    def before(self, x: Tensor) -> Tensor:
        for edit in self.edits:
            x = edit.before(x)  # type: ignore[operator]
        return x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        for edit in self.edits:
            y = edit.after(x, y)  # type: ignore[operator]
        return y


@dataclass(frozen=True)
class Place:
    """Where one bottleneck stands."""

    block: Block
    role: str  # "attention", "cross" or "mlp": behind which sublayer
    path: str  # the module whose output it is added to
    holds: str | None = None  # the module whose input it reads, if it does not read what it is added to
    norm: str | None = None  # the normalisation of that input and the output, which it reads then
    normalised: bool = False  # of parallel: a normalisation stands before the feed-forward


@dataclass(frozen=True, kw_only=True)
class Method:
    """A small two-layer network at every sublayer of every block."""

    edits: ClassVar[Literal["outputs"]] = "outputs"
    lr_factor: ClassVar[float] = 30.0  # three times LoRA's: what each does best at on E2E (docs/results.md)
    config_file: ClassVar[str] = adapterhub.CONFIG
    weights_file: ClassVar[str] = adapterhub.WEIGHTS

    placement: Literal["houlsby", "pfeiffer", "block", "parallel"] = "houlsby"
    """houlsby: behind attention and feed-forward. pfeiffer: behind the feed-forward. block: behind the block. parallel: beside the feed-forward."""
    bottleneck: Annotated[int | None, Range(1)] = None
    """Inner width. Default: 1/16 of the model's width (64 at 1024), at least 8: a share of 1-3 % of a model of any size, and AdapterHub's choice."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    """Between the two projections."""
    scale: Annotated[float | None, Range(0, low_open=True)] = None
    """Multiplies what is added. Default: 4 for parallel, else 1."""
    dropout: Annotated[float, Range(0, 0.99)] = 0.0
    """Dropout on what is added."""
    norms: bool = False
    """Also train the weights and biases of the blocks' normalisations, as Houlsby et al. do."""
    reads: Literal["mlp", "stream"] = "mlp"
    """Of parallel: what the feed-forward reads, or the residual stream in front of a normalisation that stands before it (AdapterHub's par_bn)."""
    cross: bool = False
    """Of houlsby: also behind the cross-attention of an encoder-decoder."""
    from_: str | None = None
    """Start from the delta saved in this adapter's or run's folder, instead of as the base."""

    def __post_init__(self) -> None:
        within_ranges(self)
        if self.scale is None:
            object.__setattr__(self, "scale", 4.0 if self.placement == "parallel" else 1.0)
        if self.reads == "stream" and self.placement != "parallel":
            raise ConfigError(f"reads: stream is a choice of placement parallel, and the placement is {self.placement}; leave it out")
        if self.cross and self.placement != "houlsby":
            raise ConfigError(f"cross: is a choice of placement houlsby, and the placement is {self.placement}; leave it out")

    def size(self, width: int) -> int:
        """The inner width in a model of this width."""
        return self.bottleneck or max(8, width // 16)

    def attach(self, base: Base, name: str) -> Delta:
        """Put the adapters in. Raises Incompatible where a block's sublayers are not found, or ``cross`` finds no cross-attention."""
        places = self._places(base)
        if self.cross and not any(p.role == "cross" for p in places):
            raise Incompatible(f"method.cross: this model ({base.anatomy.family}) has no cross-attention; leave it out")
        # In the order in which edits of one place apply.
        edits: list[tuple[str, Edit]] = [(path, NormShift(norm)) for path, norm in self._normalisations(base)]
        for place in places:
            edits += self._edits(base, place)
        by_path: dict[str, list[Edit]] = {}
        for path, edit in edits:
            by_path.setdefault(path, []).append(edit)
        for path, here in by_path.items():
            site_at(base.model, path).edits[name] = here[0] if len(here) == 1 else Chain(here)
        params = {f"{path}:{leaf}": p for path, edit in edits for leaf, p in edit.named_parameters()}
        return Delta(params, export=lambda: self._export(base, name, params))

    def _places(self, base: Base) -> list[Place]:
        """Where bottlenecks stand, in model order."""
        own = blocks(base.model)
        if self.placement == "houlsby":
            outs = [(b, r, p) for b in own for r, p in (("attention", b.attention_out), ("cross", b.cross_out if self.cross else None), ("mlp", b.mlp_out))]
            return [Place(b, role, path) for b, role, path in outs if path is not None]
        if self.placement == "block":
            return [Place(b, "mlp", b.path) for b in own]
        ways = wirings(base, own)
        if self.placement == "pfeiffer":
            return [
                Place(b, "mlp", b.path) if (norm := ways[b.path].closing) is None else Place(b, "mlp", b.mlp_out, holds=ways[b.path].stream, norm=norm)
                for b in own
            ]
        return [
            Place(b, "mlp", b.mlp_out, holds=ways[b.path].stream if self.reads == "stream" else b.mlp_in, normalised=ways[b.path].stream != b.mlp_in)
            for b in own
        ]

    def _edits(self, base: Base, place: Place) -> list[tuple[str, Edit]]:
        """The bottleneck of a place, and what holds the input it needs."""
        assert self.scale is not None
        device = next(base.model.get_submodule(place.block.path).parameters()).device
        made = (base.width, self.size(base.width), self.activation, self.scale, self.dropout, device)
        if place.holds is None:
            return [(place.path, Bottleneck(*made))]
        if place.holds == place.path:
            return [(place.path, Parallel(None, *made))]
        held = Held()
        if place.norm is None:
            return [(place.holds, held), (place.path, Parallel(held, *made))]
        path = place.norm  # looked up when it is used: a site may stand there by then
        return [(place.holds, held), (place.path, BehindNorm(held, lambda z: base.model.get_submodule(path)(z), *made))]

    def _normalisations(self, base: Base) -> list[tuple[str, nn.Module]]:
        """The blocks' normalisations that have something to train."""
        if not self.norms:
            return []
        everything = dict(modules(base.model))
        return [(n, everything[n]) for b in blocks(base.model) for n in b.norms if next(everything[n].parameters(recurse=False), None) is not None]

    # --- AdapterHub's directory ---------------------------------------------------------------------------------------

    def _export(self, base: Base, name: str, params: dict[str, nn.Parameter]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """adapter_config.json and the tensors of adapter.safetensors."""
        behind = self.reads == "mlp" and any(p.normalised for p in self._places(base))
        beyond = ({"reads": "mlp"} if behind else {}) | ({"norms": True} if self.norms else {})
        fields = {k: getattr(self, k) for k in ("placement", "activation", "scale", "dropout", "cross")} | {"bottleneck": self.size(base.width)}
        names = self._names(base, name)
        return adapterhub.write_config(base, name, fields, beyond=beyond), {names[k]: p.detach() for k, p in params.items()}

    def _names(self, base: Base, name: str) -> dict[str, str]:
        """Our key -> the name in the file, of everything this method trains in a base."""
        out = {
            f"{p.path}:{leaf}": adapterhub.tensor_name(adapterhub.home(p.block, p.role), name, leaf) for p in self._places(base) for leaf in adapterhub.LEAVES
        }
        norms = {f"{path}:{n}": f"{path}.adapters.{name}.{n}" for path, norm in self._normalisations(base) for n, _ in norm.named_parameters(recurse=False)}
        return out | norms

    @classmethod
    def from_layout(cls, config: dict[str, Any], tensors: dict[str, Tensor], base: Base) -> tuple[Method, dict[str, Tensor]]:
        """A directory of AdapterHub's as this method and its params. Raises Incompatible, naming the key or tensor, for what does not fit."""
        fields, beyond = adapterhub.read_config(config)
        sizes = {len(t) for n, t in tensors.items() if n.endswith(adapterhub.LEAVES["down.bias"])}
        if len(sizes) != 1:
            raise Incompatible(f"{adapterhub.WEIGHTS}: holds bottlenecks of widths {sorted(sizes)}; one width in all layers is read")
        method = cls(**fields, bottleneck=sizes.pop(), norms=bool(beyond.get("norms")))
        if method.placement == "parallel" and "reads" not in beyond and any(p.normalised for p in method._places(base)):
            method = replace(method, reads="stream")
        return method, adapterhub.match(method._names(base, str(config.get("name"))), tensors, base.model.base_model_prefix)  # type: ignore[arg-type]
