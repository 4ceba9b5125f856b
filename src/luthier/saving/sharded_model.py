"""A model that lies over ranks as plain files: safetensors with an index, as transformers and everybody else opens them.

Tensors are made whole one after the other, and the first rank writes a file as soon as it is full: it never holds more of the model than one file, and no
other rank more than one tensor. The numbers are rounded to the precision the model computes with, as one process would have saved them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..core import LuthierError
from ..devices.sharding import sharding_of
from ..modelling.shards import whole

FILE_BYTES = 4_000_000_000
INDEX = "model.safetensors.index.json"


def write(lm: Any, folder: Path, *, leads: bool, file_bytes: int = FILE_BYTES) -> None:
    """Weights and configuration into a folder that is there; called by all ranks. ``leads``: this rank writes.

    A family whose files hold other tensors than its modules (experts, which are stacked when they are read) is made whole on the first rank: its conversions
    need all of them. Raises LuthierError for a model with code of its own, whose files this program does not know.
    """
    sharding = sharding_of(lm)
    assert sharding is not None
    if lm.is_remote_code():
        raise LuthierError(f"{type(lm).__name__} has code of its own, which is not saved from several ranks; use place.shard=none")
    tensors, dtype = _tensors(lm), sharding.compute
    rounded = lambda t: whole(t).to("cpu", dtype if t.is_floating_point() and t.dtype == torch.float32 else t.dtype).contiguous()  # noqa: E731
    if leads:
        _configuration(lm, folder, dtype)
    if getattr(lm, "_weight_conversions", None):
        from transformers.core_model_loading import revert_weight_conversion

        made = {name: t for name, t in ((n, rounded(t)) for n, t in tensors.items()) if leads}
        tensors = revert_weight_conversion(lm, made) if leads else {}
        rounded = lambda t: t  # noqa: E731
        if not leads:
            return
    files = list(_files(tensors, dtype, file_bytes))
    index: dict[str, Any] = {"metadata": {"total_size": 0}, "weight_map": {}}
    for i, names in enumerate(files):
        file = "model.safetensors" if len(files) == 1 else f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        held: dict[str, Tensor] = {}
        for name in names:
            t = rounded(tensors[name])
            if leads:
                held[name] = t.clone() if t.data_ptr() == tensors[name].data_ptr() else t
                index["metadata"]["total_size"] += t.nbytes
                index["weight_map"][name] = file
            del t
        if leads:
            save_file(held, folder / file, metadata={"format": "pt"})
    if leads and len(files) > 1:
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _tensors(lm: Any) -> dict[str, Tensor]:
    """What the files of a model hold, by name: a tied tensor once, under the name that transformers keeps."""
    ignored = set(getattr(lm, "_keys_to_ignore_on_save", None) or ()) | set(getattr(lm, "all_tied_weights_keys", None) or ())
    return {k: v for k, v in lm.state_dict().items() if k not in ignored}


def _files(tensors: dict[str, Tensor], dtype: torch.dtype, most: int) -> Iterator[list[str]]:
    """Names by file."""
    some: list[str] = []
    size = 0
    for name, t in tensors.items():
        n = t.numel() * (dtype.itemsize if t.dtype == torch.float32 else t.element_size())
        if some and size + n > most:
            yield some
            some, size = [], 0
        some.append(name)
        size += n
    yield some


def _configuration(lm: Any, folder: Path, dtype: torch.dtype) -> None:
    config = copy.deepcopy(lm.config)
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part._attn_implementation = None
    config.dtype, config.architectures = str(dtype).removeprefix("torch."), [type(lm).__name__]
    config.save_pretrained(folder)
    if lm.can_generate():
        lm.generation_config.save_pretrained(folder)
