"""8-bit integers with one scale a row (LLM.int8() storage): frozen linears take half the memory; what trains, and activations, stay in floats.

Dettmers et al., 2022, arXiv 2208.07339. The codes and files are bitsandbytes' (nn/int8.py, bnb.py); products are those of the decoded weight, so that training
sees the gradient of what it computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core import LuthierError
from ..modelling.packed import PackedLinear
from ..nn import int8
from ..quantising import bnb


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Linears of the blocks in 8 bits a weight; the rest, and activations, in floats."""

    packed: ClassVar[bool] = True

    compute: Literal["bfloat16", "float32"] = "bfloat16"
    """Floats of activations, of decoded weights and of what is not packed."""
    resident: Literal["auto", "yes", "no"] = "auto"
    """Keep the decoded values in memory beside the codes: the same numbers, faster. auto: where there is room."""

    @property
    def dtype(self) -> torch.dtype:
        """Of what is not packed, and of activations."""
        return torch.float32 if self.compute == "float32" else torch.bfloat16

    def linear(self, in_features: int, out_features: int, bias: nn.Parameter | None = None, *, transposed: bool = False) -> Linear:
        """An empty linear, to be written."""
        return Linear(in_features, out_features, bias, transposed=transposed)

    def file_config(self, skip: Sequence[str] | None = None) -> dict[str, Any]:
        """What config.json says of a folder of these codes. ``skip``: linears that stay in floats; None: only the head."""
        return bnb.config(bits=8, skip=skip)

    @classmethod
    def from_file_config(cls, config: Mapping[str, Any]) -> Precision:
        """How a folder is stored. Raises LuthierError for other codes than bitsandbytes' 8 bits."""
        bnb.check_config(config, bits=8)
        return cls()


class Linear(PackedLinear):
    """A linear in int8. Buffers: codes (out, in) int8; largest (out,) float32, the largest absolute value of each row."""

    codes: Tensor
    largest: Tensor

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None = None, *, transposed: bool = False):
        super().__init__(in_features, out_features, bias, transposed=transposed)
        self.register_buffer("codes", None)
        self.register_buffer("largest", None)

    def write(self, weight: Tensor) -> None:
        """Encode a weight (out, in). Raises LuthierError for a shape or dtype that does not fit, and for values that are not finite."""
        shape = (self.out_features, self.in_features)
        if tuple(weight.shape) != shape or weight.dtype not in int8.DTYPES:
            raise LuthierError(f"int8: a weight {shape} in {_NAMES} is wanted, found {tuple(weight.shape)} in {_name(weight.dtype)}")
        try:
            self.codes, self.largest = int8.encode(weight)
        except ValueError as e:
            raise LuthierError(f"int8: the weight cannot be stored: {e}; is the file damaged?") from None

    def values(self, dtype: torch.dtype) -> Tensor:
        """The decoded weight (out, in)."""
        if dtype not in int8.DTYPES:
            raise LuthierError(f"int8: a weight is decoded to {_NAMES}, and {_name(dtype)} was asked for; compute in one of these (precision.compute)")
        return int8.decode(self.codes, self.largest, dtype)

    def to_file(self) -> dict[str, Tensor]:
        """The tensors that bitsandbytes writes, by the name inside the linear; without the bias."""
        return bnb.int8_to_file(self.codes, self.largest)

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        """Take such tensors. Raises LuthierError where they do not fit or are damaged."""
        self.codes, self.largest = bnb.int8_from_file(tensors, (self.out_features, self.in_features))


_name = lambda dtype: str(dtype).removeprefix("torch.")  # noqa: E731
_NAMES = ", ".join(map(_name, int8.DTYPES))
