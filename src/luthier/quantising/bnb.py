"""bitsandbytes' layout of model files, both ways: what transformers writes beside each linear that is stored in NF4 or int8, and in config.json.

In 4 bits the codes are ``weight``, (n / 2, 1); its scales ``weight.absmax``; the levels ``weight.quant_map``; with double quantisation also
``weight.nested_absmax`` and ``weight.nested_quant_map``; and a JSON object, as bytes, ``weight.quant_state.bitsandbytes__nf4``. In 8 bits they are ``weight``,
(out, in), ``SCB``, the largest absolute value of each row, and ``weight_format``, 0 for rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import LuthierError
from ..nn import nf4

_STATE = "weight.quant_state.bitsandbytes__"
_AGAIN = "; copy or download the folder again"
_DTYPES = {str(d).removeprefix("torch."): d for d in nf4.DTYPES}


# --- four bits ------------------------------------------------------------------------------------------------------


def nf4_to_file(packed: nf4.Packed, shape: tuple[int, int], source: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a linear (out, in) whose weight was encoded from the dtype ``source``."""
    device = packed.codes.device
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": nf4.BLOCK, "dtype": str(source).removeprefix("torch."), "shape": list(shape)}
    tensors = {"weight": packed.codes.view(-1, 1), "weight.absmax": packed.absmax, "weight.quant_map": torch.tensor(nf4.LEVELS, device=device)}
    if packed.nested_absmax is not None and packed.nested_offset is not None:
        levels = packed.nested_map if packed.nested_map is not None else nf4.dynamic_map(device)
        tensors |= {"weight.nested_absmax": packed.nested_absmax, "weight.nested_quant_map": levels.clone()}  # safetensors takes no tensor twice
        state |= {"nested_blocksize": nf4.NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": packed.nested_offset.item()}
    tensors[f"{_STATE}nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8, device=device)
    return tensors


def nf4_from_file(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[nf4.Packed, torch.dtype]:
    """The codes of a linear (out, in), and the dtype they were encoded from. Raises LuthierError for other codes than NF4 by 64, and for damage."""
    state = _state(tensors)
    expect = {"quant_type": "nf4", "blocksize": nf4.BLOCK, "shape": list(shape)}
    if "nested_offset" in state:
        expect["nested_blocksize"] = nf4.NESTED_BLOCK
    for key, want in expect.items():
        if state.get(key) != want:
            raise LuthierError(f"its codes have {key} {state.get(key)}, and {want} is read here; quantise the float model again (precision: nf4)")
    source = _DTYPES.get(str(state.get("dtype")))
    if source is None:
        raise LuthierError(f"its codes were made from {state.get('dtype')}, and {', '.join(_DTYPES)} are read here; quantise the float model again")
    levels = _tensor(tensors, "weight.quant_map", (len(nf4.LEVELS),), torch.float32)
    if not torch.allclose(levels.cpu(), torch.tensor(nf4.LEVELS), rtol=0, atol=1e-6):
        raise LuthierError("its weight.quant_map holds other levels than NF4's; quantise the float model again (precision: nf4)")
    count = shape[0] * shape[1]
    like = nf4.empty(count, double="nested_offset" in state)
    codes = _bytes(tensors, len(like.codes))
    absmax = _tensor(tensors, "weight.absmax", like.absmax.shape, like.absmax.dtype)
    if like.nested_absmax is None:
        return nf4.Packed(codes, absmax), source
    offset = torch.tensor(float(state["nested_offset"]), dtype=torch.float32, device=codes.device)
    nested = _tensor(tensors, "weight.nested_absmax", like.nested_absmax.shape, torch.float32)
    levels = _tensor(tensors, "weight.nested_quant_map", (256,), torch.float32)
    return nf4.Packed(codes, absmax, nested, offset, None if torch.equal(levels.cpu(), nf4.dynamic_map()) else levels), source


def _state(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The JSON object beside the codes."""
    found = [k for k in tensors if k.startswith(_STATE)]
    if not found:
        raise LuthierError(f"{_STATE}nf4 is missing beside its codes{_AGAIN}")
    if found != [f"{_STATE}nf4"]:
        raise LuthierError(f"its codes are {found[0].removeprefix(_STATE)}, and of bitsandbytes' 4-bit kinds only nf4 is read; quantise the float model again")
    try:
        state = json.loads(bytes(tensors[found[0]].cpu().tolist()))
        fine = math.isfinite(state.get("nested_offset", 0))
    except (ValueError, TypeError, AttributeError):
        fine = False
    if not fine:
        raise LuthierError(f"{found[0]} is damaged: it holds no JSON object with a finite nested_offset{_AGAIN}")
    return state  # type: ignore[no-any-return]


def _bytes(tensors: Mapping[str, Tensor], count: int) -> Tensor:
    """The codes, whatever dtype they were written as (sharding wants floats)."""
    weight = tensors.get("weight")
    if weight is None or weight.nbytes != count:
        found = "missing" if weight is None else f"{weight.nbytes:,} bytes long where {count:,} are wanted"
        raise LuthierError(f"its codes (weight) are {found}{_AGAIN}")
    return weight.contiguous().view(-1).view(torch.uint8)


# --- eight bits -----------------------------------------------------------------------------------------------------


def int8_to_file(codes: Tensor, largest: Tensor) -> dict[str, Tensor]:
    """The tensors of a linear."""
    return {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8, device=codes.device)}


def int8_from_file(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(codes, largest) of a linear (out, in). Raises LuthierError for another order than rows, and for damage."""
    order = tensors.get("weight_format")
    if order is not None and int(order) != 0:
        raise LuthierError(f"its codes have weight_format {int(order)}, and only 0 (rows) is read; save the model again with bitsandbytes 0.45 or later")
    return _tensor(tensors, "weight", shape, torch.int8), _tensor(tensors, "SCB", shape[:1], torch.float32)


def _tensor(tensors: Mapping[str, Tensor], name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """One tensor, of this shape and dtype and finite."""
    found = tensors.get(name)
    if found is None:
        raise LuthierError(f"{name} is missing beside its codes{_AGAIN}")
    if tuple(found.shape) != tuple(shape) or found.dtype != dtype:
        said, want = (f"{tuple(s)} {str(d).removeprefix('torch.')}" for s, d in ((found.shape, found.dtype), (shape, dtype)))
        raise LuthierError(f"{name} is {said} where {want} is wanted{_AGAIN}")
    if dtype.is_floating_point and not bool(found.isfinite().all()):
        raise LuthierError(f"{name} is damaged: it holds values that are not finite{_AGAIN}")
    return found


# --- config.json ----------------------------------------------------------------------------------------------------


def config(*, bits: int, double: bool = False, compute: torch.dtype = torch.bfloat16, skip: Sequence[str] | None = None) -> dict[str, Any]:
    """The ``quantization_config`` that transformers reads. ``skip``: linears that stay in floats; None: the head, as it takes for granted."""
    four = {
        "bnb_4bit_compute_dtype": str(compute).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
    }
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": bits == 4,
        "load_in_8bit": bits == 8,
        "llm_int8_skip_modules": None if skip is None else list(skip),
        "llm_int8_threshold": 6.0,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        **(four if bits == 4 else {}),
    }


def check_config(found: Mapping[str, Any], *, bits: int) -> None:
    """Raises LuthierError where a ``quantization_config`` speaks of other codes than NF4 (``bits`` 4) or int8 (8)."""
    method = found.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes" or not found.get(f"load_in_{bits}bit"):
        said = next((f"{b} bits" for b in (4, 8) if found.get(f"load_in_{b}bit")), "no bits") if method == "bitsandbytes" else method
        raise LuthierError(f"quantization_config in config.json speaks of {said}, and bitsandbytes' {bits} bits are wanted here")
    kind = found.get("bnb_4bit_quant_type", "fp4")  # what bitsandbytes takes for granted
    if bits == 4 and kind != "nf4":
        raise LuthierError(f"the model is stored in {kind}, and of bitsandbytes' 4-bit kinds only nf4 is read; quantise the float model again (precision: nf4)")
