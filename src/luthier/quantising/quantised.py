"""Bases stored in codes: quantised while they are read, or read from a folder that holds codes.

A float folder is read through transformers' own loader, so every rename and conversion it knows holds here too: the model is built on the meta device,
and each linear of a block waits for its weight, which is quantised as it comes and freed. Never more than the codes and a weight or two are in memory.
Embeddings, norms, heads, the routers of a mixture and what is no linear (the experts, which transformers keep as one tensor) stay in the precision's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import heap
from ..core import LuthierError, Precision
from ..modelling.anatomy import Anatomy, features, is_linear, modules
from ..modelling.packed import PackedLinear, packed, replace
from .codes import Files, stored_in

NAME = "luthier"  # of our quantiser among those of transformers
LARGE = 500_000_000  # weights from which a quantised base is worth keeping on disk
GIVEN_BACK = 1 << 21  # bytes of weights whose encoding is worth asking for its memory


# --- which linears, and how they are replaced -------------------------------------------------------------------------


def linears(model: nn.Module, anatomy: Anatomy) -> dict[str, nn.Module]:
    """The linears of the model's blocks by path, without the routers of a mixture of experts."""
    stacks = tuple(f"{path}." for path in anatomy.stacks.values())
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) if anatomy.experts else None
    return {p: m for p, m in modules(model) if is_linear(m) and p.startswith(stacks) and (experts is None or features(m)[1] != experts)}


def empty(linear: nn.Module, precision: Any) -> PackedLinear:
    """The packed linear of this shape and bias, without a weight yet."""
    n_in, n_out = features(linear)
    made: PackedLinear = precision.linear(n_in, n_out, linear.bias, transposed=type(linear).__name__ == "Conv1D")
    return made


def pack(model: nn.Module, precision: Precision) -> None:
    """Quantise the linears of a model that is in memory (or on meta) one by one, each float weight freed as it goes."""
    for path, linear in linears(model, Anatomy.of(model)).items():
        made = empty(linear, precision)
        weight: Any = linear.weight
        made.write(weight.detach().t() if made.transposed else weight.detach())
        replace(model, {path: made})


class _Waiting(nn.Module):
    """Stands for a linear while the model is read. ``coded``: its codes are read afterwards, so the weight it shows (families initialise it) is empty."""

    def __init__(self, linear: Any, precision: Any, *, coded: bool):
        super().__init__()
        self.coded, self.bias = coded, linear.bias
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False) if coded else linear.weight
        if coded:
            self.weight._is_hf_initialized = True
        self.made = empty(linear, precision)
        self.made.bias = None

    def done(self) -> PackedLinear:
        """What was made, with the bias that was read."""
        self.made.bias = self.bias
        return self.made


@register_quantization_config(NAME)
class _Settings(QuantizationConfigMixin):  # type: ignore[misc]
    """Carries a precision, or how the weights are laid out over ranks, through transformers' loader."""

    def __init__(self, precision: Any = None, files: Any = None, sharding: Any = None, **_: Any):
        self.quant_method = NAME
        self.precision, self.files, self.sharding = precision, files, sharding
        self.trouble: list[str] = []  # transformers keeps the message of an error in a conversion to itself
        self.encoded = 0  # bytes of weights, since what they left behind was given back

    def give_back(self, encoded: int) -> None:
        """A weight of so many bytes was encoded and is freed: ask for the memory.

        Nothing is read ahead (transformers read a weight at a time where a quantiser waits), but glibc keeps what is freed, more or less of it as the blocks
        happen to lie: of a base of 30 MB of codes it still held 2 to 45 MB after the last weight. Asking takes some milliseconds in a large process, so small
        weights are gathered.
        """
        self.encoded += encoded
        if self.encoded >= GIVEN_BACK:
            heap.give_back()
            self.encoded = 0

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": NAME}


class _Quantise(ConversionOps):  # type: ignore[misc]
    """One weight on its way from the file: written into its packed linear; an empty tensor takes its place."""

    def __init__(self, settings: _Settings):
        self.settings = settings

    def convert(self, input_dict: dict[str, Any], model: Any = None, **_: Any) -> dict[str, Tensor]:
        out = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            waiting = model.get_submodule(name.rpartition(".")[0])
            if not waiting.coded:
                try:
                    if weight.shape != waiting.weight.shape:
                        raise LuthierError(f"the file holds shape {tuple(weight.shape)}, and config.json says {tuple(waiting.weight.shape)}")
                    waiting.made.write(weight.t() if waiting.made.transposed else weight)
                    if self.settings.sharding is not None:
                        waiting.made.cut(*self.settings.sharding.part)
                    self.settings.give_back(weight.nbytes)
                except LuthierError as e:
                    self.settings.trouble.append(f"{name}: {e}")
                    raise
            out[name] = torch.empty(0)
        return out


@register_quantizer(NAME)
class _Quantizer(HfQuantizer):  # type: ignore[misc]
    """How transformers' loader meets a packed precision."""

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        settings: Any = self.quantization_config
        if settings.precision is None:
            settings.sharding.lay_out(model)
            return model
        coded = settings.files is not None
        found = _held(model, settings.files) if coded else linears(model, Anatomy.of(model)).items()
        replace(model, {path: _Waiting(linear, settings.precision, coded=coded) for path, linear in list(found)})
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        if self.quantization_config.precision is None:
            return False
        path, dot, leaf = param_name.rpartition(".")
        return leaf == "weight" and bool(dot) and isinstance(model.get_submodule(path), _Waiting)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantise(self.quantization_config)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


def open_model(kind: Any, folder: Path, config: Any, precision: Any, *, sharding: Any = None, **how: Any) -> tuple[Any, dict[str, Any]]:
    """(model with packed linears, transformers' loading info) from a folder of floats, or of codes of this precision (see `as_stored`).

    ``sharding``: of each weight that is quantised, keep this rank's part of the codes.
    """
    files = Files(folder) if stored_in(folder) is not None else None
    lm, info = _through(_Settings(precision, files, sharding), kind, folder, config, precision.dtype, how)
    waiting = {p: m for p, m in lm.named_modules() if isinstance(m, _Waiting)}
    replace(lm, {p: m.done() for p, m in waiting.items()})
    if files is not None:
        info["missing_keys"] = set(info["missing_keys"]) - {f"{p}.weight" for p in waiting}
    if files is not None:
        with files:
            stacks = tuple(f"{path}." for path in Anatomy.of(lm).stacks.values())
            for path, linear in packed(lm):
                _fill(linear, path, files)
                if sharding is not None and path.startswith(stacks):
                    linear.cut(*sharding.part)
    return lm, info


def open_sharded(kind: Any, folder: Path, config: Any, dtype: torch.dtype, sharding: Any, **how: Any) -> tuple[Any, dict[str, Any]]:
    """(model of which this rank holds its parts, transformers' loading info) from a folder of floats: laid out on meta, so only its parts are read."""
    return _through(_Settings(sharding=sharding), kind, folder, config, dtype, how)


def _through(settings: _Settings, kind: Any, folder: Path, config: Any, dtype: torch.dtype, how: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A model read by transformers' loader, which asks our quantiser before and while it reads."""
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    try:
        lm, info = kind.from_pretrained(folder, config=config, dtype=dtype, quantization_config=settings, use_safetensors=True, output_loading_info=True, **how)
    except Exception:
        if settings.trouble:
            raise LuthierError(f"{folder}: {settings.trouble[0]}") from None
        raise
    for part in {id(c): c for c in (lm.config, lm.config.get_text_config())}.values():
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    lm.hf_quantizer, lm.is_quantized = None, False  # it is ours from here on
    return lm, info


def _fill(linear: PackedLinear, path: str, files: Files) -> None:
    try:
        linear.from_file({leaf: files.read(key) for leaf, key in files.leaves(path).items()})  # type: ignore[operator]
    except LuthierError as e:
        raise LuthierError(f"{files.folder}: {path}: {e}") from None


def _held(model: nn.Module, files: Files) -> Iterator[tuple[str, nn.Module]]:
    """The linears that a folder holds in codes, wherever they stand."""
    return ((p, m) for p, m in modules(model) if is_linear(m) and files.codes(p))


# --- memory -----------------------------------------------------------------------------------------------------------


def settle(lm: nn.Module, precision: Any) -> str:
    """Decide whether decoded weights stay in memory beside the codes, do so, and say it in a sentence.

    "auto" keeps them where they take less than a third of the memory that is free: the numbers are the same and no step decodes.
    """
    parts = list(packed(lm))
    count = sum(p.count for _, p in parts)
    codes = sum(t.nbytes for _, p in parts for t in p.stored().values())
    size = count * precision.dtype.itemsize
    free = _free_memory(next(lm.parameters()).device)
    keep = precision.resident == "yes" or (precision.resident == "auto" and size < free / 3)
    for _, p in parts:
        p.keep(precision.dtype if keep else None)
    said = f"{count:,} weights of {len(parts)} linears in {codes / 1e6:,.1f} MB of codes ({codes * 8 / max(1, count):.2f} bits a weight)"
    if keep:
        return f"{said}; decoded values stay in memory too ({size / 1e6:,.0f} MB; precision.resident=no decodes at every use, with the same numbers)"
    return f"{said}; decoded at every use" + (
        f" (decoded values would take {size / 1e9:.1f} GB of {free / 1e9:.1f} GB free)" if precision.resident == "auto" else ""
    )


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return int(psutil.virtual_memory().available)
