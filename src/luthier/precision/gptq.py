"""Weights in a few bits that were fitted to data (GPTQ; AWQ's files are read too): `luthier quantize` makes such a folder, or the Hub has it.

A weight is scale (q - zero), with a scale and a zero for each group of inputs; see nn/affine.py for the layout and nn/gptq.py for how codes are found. The
buffers are the tensors of the file: qweight, qzeros, scales, g_idx.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core import Incompatible, LuthierError
from ..modelling.packed import PackedLinear
from ..nn import affine
from ..nn.gptq import Grid, Solved, nearest

LEAVES = ("qweight", "qzeros", "scales", "g_idx")
FORMATS = ("gptq", "gptq_v2")


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Frozen weights in codes of a few bits, fitted to data; activations and the rest in floats."""

    packed: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True  # a folder of floats is not rounded on the way in: luthier quantize fits the codes

    bits: Literal[2, 3, 4, 8] = 4
    """Bits a code."""
    group: int = 128
    """Neighbouring inputs that share a scale and a zero; -1: all inputs of an output."""
    symmetric: bool = True
    """One zero for all groups, in the middle of the codes; no: each group has its own."""
    act_order: bool = False
    """The inputs of a group are not neighbours; the file says which they are."""
    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq"
    """How files hold zeros: less one (gptq, the common one), or as they are (gptq_v2)."""
    compute: Literal["bfloat16", "float32"] = "bfloat16"
    """What weights are decoded to, and everything else is held in."""
    resident: Literal["auto", "yes", "no"] = "auto"
    """Keep the decoded weights in memory beside the codes: same numbers, faster. auto: where there is room."""

    def __post_init__(self) -> None:
        if self.group == 0 or self.group < -1:
            raise Incompatible(f"group: must be at least 1, or -1 (all inputs of an output), found {self.group}")

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and of what is not packed."""
        return torch.bfloat16 if self.compute == "bfloat16" else torch.float32

    @property
    def minus_one(self) -> bool:
        """Whether stored zeros are one less than they mean."""
        return self.checkpoint_format == "gptq"

    @property
    def grid(self) -> Grid:
        """What codes may stand for."""
        return Grid(self.bits, self.symmetric, lowest=int(self.minus_one))

    def linear(self, in_features: int, out_features: int, bias: nn.Parameter | None = None, *, transposed: bool = False) -> Linear:
        """An empty linear. Raises Incompatible for a shape that the layout has no room for."""
        return Linear(in_features, out_features, bias, self, transposed=transposed)

    def file_config(self, skip: Sequence[str] | None = None) -> dict[str, Any]:
        """``quantization_config`` of config.json, as other programs read it. ``skip``: linears that stay in floats."""
        floating = [path for path in skip or () if "." in path]
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group,
            "desc_act": self.act_order,
            "sym": self.symmetric,
            "checkpoint_format": self.checkpoint_format,
            "pack_dtype": "int32",
            "lm_head": False,
        } | ({"dynamic": {f"-:^{re.escape(path)}$": {} for path in floating}} if floating else {})

    @classmethod
    def from_file_config(cls, config: Mapping[str, Any]) -> Precision:
        """The precision that a ``quantization_config`` describes: ours, AutoGPTQ's, GPTQModel's, optimum's, or AutoAWQ's.

        Raises Incompatible for what is not read here.
        """
        where = "quantization_config"
        awq = config.get("quant_method") == "awq"
        bits = config.get("bits", config.get("w_bit"))
        if bits not in ((4,) if awq else (2, 3, 4, 8)):
            raise Incompatible(f"{where}.bits: found {bits!r}, accepted are {'4 (awq)' if awq else '2, 3, 4 and 8'}")
        layout = str(config.get("version", "gemm") if awq else config.get("checkpoint_format") or config.get("format") or "gptq").lower()
        if config.get("is_marlin_format"):
            layout = "marlin"
        if layout not in (("gemm",) if awq else FORMATS):
            accepted = "gemm" if awq else " and ".join(FORMATS)
            raise Incompatible(f"{where}: these codes are laid out as {layout!r}; read here is {accepted}, so look for the model in that layout")
        if str(config.get("pack_dtype", "int32")).removeprefix("torch.") != "int32":
            raise Incompatible(f"{where}.pack_dtype: found {config['pack_dtype']!r}, accepted is int32")
        for pattern, other in (config.get("dynamic") or {}).items():
            if not str(pattern).startswith("-") and {"bits", "group_size"} & set(other or ()):
                raise Incompatible(f"{where}.dynamic: {pattern!r} has bits or groups of its own; only folders with the same for all linears are read here")
        return cls(
            bits=bits,
            group=int(config.get("group_size", config.get("q_group_size", 128))),
            symmetric=not config.get("zero_point", True) if awq else bool(config.get("sym", True)),
            act_order=bool(config.get("desc_act", False)),
            checkpoint_format="gptq_v2" if awq or layout == "gptq_v2" else "gptq",
        )


class Linear(PackedLinear):
    """A linear whose weight is scale (q - zero) in groups of inputs."""

    qweight: Tensor  # (in bits / 32, out) int32
    qzeros: Tensor  # (groups, out bits / 32) int32
    scales: Tensor  # (groups, out)
    g_idx: Tensor  # (in,) int32: the group of each input

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None, precision: Precision, *, transposed: bool = False):
        super().__init__(in_features, out_features, bias, transposed=transposed)
        self.bits, self.group, self.minus_one, self.grid = precision.bits, precision.group, precision.minus_one, precision.grid
        size = in_features if self.group == -1 else self.group
        if in_features % size:
            part = math.gcd(in_features, size)
            raise Incompatible(f"group: {size} does not divide the {in_features:,} inputs of a linear; {part} does, and -1 is one group for all of them")
        multiple, _ = affine.per_words(self.bits)
        for side, n in (("inputs", in_features), ("outputs", out_features)):
            if n % multiple:
                raise Incompatible(f"a linear of {n:,} {side}: codes of {self.bits} bits are stored {multiple} at a time, which does not divide that")
        rows, words = in_features // size, self.bits
        self.shapes = {
            "qweight": (in_features * words // 32, out_features),
            "qzeros": (rows, out_features * words // 32),
            "scales": (rows, out_features),
            "g_idx": (in_features,),
        }
        for leaf in LEAVES:
            self.register_buffer(leaf, None)
        self._sorted(None)

    def _sorted(self, g_idx: Tensor | None) -> None:
        """Remember whether the groups are in order, and (see `affine.short`) how exact the scales are."""
        self.in_order = g_idx is None or g_idx.is_meta or bool((g_idx == self._in_order(g_idx.device)).all())
        self.exact = g_idx is not None and not g_idx.is_meta and not affine.short(self.scales)

    def _in_order(self, device: torch.device | str) -> Tensor:
        return torch.arange(self.in_features, dtype=torch.int32, device=device) // (self.in_features // self.shapes["scales"][0])

    def write(self, weight: Tensor) -> None:
        """Round a weight (out, in) to the nearest codes, without any data; on the meta device, only the shapes."""
        if weight.is_meta:
            dtypes = (torch.int32, torch.int32, torch.float16, torch.int32)
            self._hold({leaf: torch.empty(shape, dtype=d, device="meta") for (leaf, shape), d in zip(self.shapes.items(), dtypes, strict=True)})
        else:
            try:
                solved = nearest(weight.float(), self.grid, self.group)
            except ValueError as e:
                raise LuthierError(f"{e}; is the file damaged?") from None
            self.take(solved)

    def take(self, solved: Solved) -> None:
        """Store codes that were found."""
        self._hold(
            {
                "qweight": affine.pack(solved.codes, self.bits),
                "qzeros": affine.pack_zeros(solved.zeros, self.bits, minus_one=self.minus_one),
                "scales": solved.scales.to(torch.float16),
                "g_idx": self._in_order(solved.codes.device),
            }
        )

    def _hold(self, tensors: Mapping[str, Tensor]) -> None:
        for leaf in LEAVES:
            setattr(self, leaf, tensors[leaf])
        self._sorted(self.g_idx)

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        """Hold the tensors of a file, by their leaf names. Raises Incompatible for missing ones, other shapes and groups that do not exist."""
        found = dict(tensors)
        awq = (self.in_features, self.out_features * self.bits // 32)
        if {"qweight", "qzeros"} <= set(found) and tuple(found["qweight"].shape) == awq:
            found["qweight"], found["qzeros"] = affine.from_awq(found["qweight"], found["qzeros"], self.bits)
        found.setdefault("g_idx", self._in_order("cpu"))  # some files leave it out where it says nothing
        if missing := [leaf for leaf in LEAVES if leaf not in found]:
            has = ", ".join(sorted(tensors)) or "nothing"
            raise Incompatible(f"the file has no {' and no '.join(missing)} for this linear (it has {has}); a linear in gptq has {', '.join(LEAVES)}")
        for leaf, shape in self.shapes.items():
            if tuple(found[leaf].shape) != shape:
                said = f"has the shape {tuple(found[leaf].shape)}, and {self.bits} bits in groups of {self.group} need {shape}"
                raise Incompatible(f"{leaf} {said}; the tensors and quantization_config do not belong together")
        if found["qweight"].dtype != torch.int32 or found["qzeros"].dtype != torch.int32 or not found["scales"].is_floating_point():
            raise Incompatible(f"codes are {found['qweight'].dtype} and scales {found['scales'].dtype}; int32 and a float type are accepted")
        if not 0 <= int(found["g_idx"].min()) <= int(found["g_idx"].max()) < len(found["scales"]):
            named = f"groups {int(found['g_idx'].min())} to {int(found['g_idx'].max())}"
            raise Incompatible(f"g_idx names {named}, and there are {len(found['scales'])}, counted from 0; the file is damaged")
        self._hold({leaf: found[leaf] for leaf in LEAVES})

    def to_file(self) -> dict[str, Tensor]:
        """The tensors of the file, by their leaf names."""
        return {leaf: getattr(self, leaf) for leaf in LEAVES}

    def values(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in), rounded once to ``dtype``: the transpose of what lies together in memory."""
        zeros = affine.unpack_zeros(self.qzeros, self.bits, minus_one=self.minus_one)
        groups = None if self.in_order else self.g_idx
        return affine.decode(self.qweight, zeros, self.scales, self.bits, dtype, groups=groups, exact=self.exact).t()
