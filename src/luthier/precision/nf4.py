"""4-bit NormalFloat (QLoRA): frozen linears take a quarter of the memory; what trains, and activations, stay in floats.

Dettmers et al., 2023, arXiv 2305.14314. The codes are bitsandbytes' (nn/nf4.py), and so are the files (bnb.py). Its kernel decodes where it is installed and
was found to give the same numbers; its modules are never used: on a CPU they lose the gradient of everything below them once they were evaluated.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core import LuthierError
from ..modelling.packed import PackedLinear
from ..nn import nf4
from ..quantising import bnb

Kernels = Literal["auto", "torch", "bitsandbytes"]


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Linears of the blocks in 4.1 bits a weight; the rest, and activations, in floats."""

    packed: ClassVar[bool] = True

    double: bool = True
    """Store the scales of the codes in 8 bits too (double quantisation): 4.13 bits a weight instead of 4.5."""
    compute: Literal["bfloat16", "float32"] = "bfloat16"
    """Floats of activations, of decoded weights and of what is not packed."""
    resident: Literal["auto", "yes", "no"] = "auto"
    """Keep the decoded values in memory beside the codes: the same numbers, faster. auto: where there is room."""
    kernels: Kernels = "auto"
    """What decodes. auto: bitsandbytes where it is installed and gives the same numbers, else PyTorch."""

    @property
    def dtype(self) -> torch.dtype:
        """Of what is not packed, and of activations."""
        return torch.float32 if self.compute == "float32" else torch.bfloat16

    def linear(self, in_features: int, out_features: int, bias: nn.Parameter | None = None, *, transposed: bool = False) -> Linear:
        """An empty linear, to be written."""
        return Linear(in_features, out_features, bias, transposed=transposed, double=self.double, kernels=self.kernels)

    def file_config(self, skip: Sequence[str] | None = None) -> dict[str, Any]:
        """What config.json says of a folder of these codes. ``skip``: linears that stay in floats; None: only the head."""
        return bnb.config(bits=4, double=self.double, compute=self.dtype, skip=skip)

    @classmethod
    def from_file_config(cls, config: Mapping[str, Any]) -> Precision:
        """How a folder is stored. What it was computed with is the matter of who computes. Raises LuthierError for codes that are not NF4."""
        bnb.check_config(config, bits=4)
        return cls(double=bool(config.get("bnb_4bit_use_double_quant", False)))

    def notes(self, device: torch.device) -> list[str]:
        """What to say of a run: what decodes."""
        if self.kernels == "torch":
            return ["nf4: decoded in PyTorch, as asked"]
        version, trouble = _bitsandbytes(device.type)
        return [f"nf4: decoded in PyTorch: {trouble}" if trouble else f"nf4: decoded by bitsandbytes {version}, which gives the same numbers"]


class Linear(PackedLinear):
    """A linear in NF4. Buffers: the fields of `nf4.Packed`."""

    codes: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None = None,
        *,
        transposed: bool = False,
        double: bool = True,
        kernels: Kernels = "auto",
    ):
        super().__init__(in_features, out_features, bias, transposed=transposed)
        self.nested, self.kernels = double, kernels  # nested: scales in codes too
        self.source = torch.bfloat16  # the dtype that was encoded: files say it
        for name in nf4.Packed._fields:
            self.register_buffer(name, None)

    def write(self, weight: Tensor) -> None:
        """Encode a weight (out, in). Raises LuthierError for a shape or dtype that does not fit, and for values that are not finite."""
        if tuple(weight.shape) != self.shape or weight.dtype not in nf4.DTYPES:
            raise LuthierError(f"nf4: a weight {self.shape} in {_NAMES} is wanted, found {tuple(weight.shape)} in {_name(weight.dtype)}")
        try:
            self._take(nf4.encode(weight, double=self.nested), weight.dtype)
        except ValueError as e:
            raise LuthierError(f"nf4: the weight cannot be stored: {e}; is the file damaged?") from None

    def values(self, dtype: torch.dtype) -> Tensor:
        """The decoded weight (out, in)."""
        if dtype not in nf4.DTYPES:
            raise LuthierError(f"nf4: a weight is decoded to {_NAMES}, and {_name(dtype)} was asked for; compute in one of these (precision.compute)")
        return decoder(self.kernels, self.codes.device.type)(self.packed, self.count, dtype).view(self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

    @property
    def packed(self) -> nf4.Packed:
        """The codes and constants."""
        return nf4.Packed(*(getattr(self, name) for name in nf4.Packed._fields))

    def to_file(self) -> dict[str, Tensor]:
        """The tensors that bitsandbytes writes, by the name inside the linear; without the bias."""
        return bnb.nf4_to_file(self.packed, self.shape, self.source)

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        """Take such tensors, with double quantisation or without. Raises LuthierError where they do not fit or are damaged."""
        self._take(*bnb.nf4_from_file(tensors, self.shape))

    def _take(self, packed: nf4.Packed, source: torch.dtype) -> None:
        self.source, self.nested = source, packed.nested_absmax is not None
        for name, t in zip(packed._fields, packed, strict=True):
            self._buffers[name] = t


_name = lambda dtype: str(dtype).removeprefix("torch.")  # noqa: E731
_NAMES = ", ".join(map(_name, nf4.DTYPES))


# --- what decodes ---------------------------------------------------------------------------------------------------


def decoder(kernels: Kernels, device: str) -> Callable[[nf4.Packed, int, torch.dtype], Tensor]:
    """What decodes on this kind of device. Raises LuthierError where bitsandbytes is asked for and does not serve."""
    if kernels == "torch" or device == "meta":
        return nf4.decode
    _, trouble = _bitsandbytes(device)
    if trouble and kernels == "bitsandbytes":
        raise LuthierError(f"precision.kernels: bitsandbytes cannot decode here: {trouble}; use kernels=auto, or pip install 'luthier[quant]'")
    return nf4.decode if trouble else _by_kernel


def _by_kernel(packed: nf4.Packed, count: int, dtype: torch.dtype) -> Tensor:
    """The kernel alone, as a function, on an even count. It gets the weight as one row: of rows of 32, 96, ... it mixes up the scales (0.50.2, CPU)."""
    if count % 2:
        return nf4.decode(packed, count, dtype)
    row = torch.ops.bitsandbytes.dequantize_4bit.default(packed.codes, nf4.scales(packed), nf4.BLOCK, "nf4", (count,), dtype)
    return row.view(count)  # type: ignore[no-any-return]


@cache
def _bitsandbytes(device: str) -> tuple[str, str]:
    """(its version, why its kernel does not serve on this kind of device; "": it does). Tried once, on a small weight."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional package on import
    try:
        import bitsandbytes
    except Exception as e:  # whatever a broken installation raises
        return "", "bitsandbytes is not installed" if isinstance(e, ModuleNotFoundError) else f"bitsandbytes does not import ({type(e).__name__}: {e})"
    version = str(bitsandbytes.__version__)
    weight = torch.randn(70, 102, generator=torch.Generator().manual_seed(0)).to(device)  # 111 blocks and a part of one
    packed = nf4.encode(weight, double=True)
    trouble = f"bitsandbytes {version} gives other numbers on {device}"
    try:
        if all(torch.equal(_by_kernel(packed, weight.numel(), d), nf4.decode(packed, weight.numel(), d)) for d in nf4.DTYPES):
            return version, ""
    except Exception as e:
        trouble = f"the kernel of bitsandbytes {version} fails on {device} ({type(e).__name__}: {e})"
    logging.getLogger(__name__).warning("nf4: %s; PyTorch decodes instead", trouble)
    return version, trouble
