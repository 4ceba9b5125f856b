"""Folders of codes: a model's packed linears in their field's layout (`to_file`), beside ordinary tensors, and a ``quantization_config`` in config.json."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import atomic
from ..core import Base, LuthierError
from ..modelling.anatomy import is_linear, modules
from ..modelling.packed import PackedLinear, packed
from ..settings.plugins import kind_of

ORIGIN = "luthier.json"  # what the codes were made from
SHARD = 4 << 30  # bytes of one file


def stored_in(folder: Path) -> str | None:
    """The kind of precision whose codes a model folder holds; None: floats. Raises LuthierError for codes that no precision here reads."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None  # said where the configuration is opened
    found = config.get("quantization_config")
    if not found:
        return None
    method = str(found.get("quant_method", "bitsandbytes" if "load_in_4bit" in found or "load_in_8bit" in found else "?"))
    if method in ("gptq", "awq"):  # one arithmetic, two layouts
        return "gptq"
    if method == "bitsandbytes":
        return "nf4" if found.get("load_in_4bit") else "int8"
    raise LuthierError(
        f"{folder / 'config.json'}: this model is stored in {method}, which is not read here; gptq, awq and bitsandbytes' nf4 and int8 are, and floats"
    )


def as_stored(folder: Path, precision: Any, name: str) -> Any:
    """The precision for a folder: as its codes say, and computed with as asked; unchanged for a folder of floats. ``name``: what the user calls the model.

    Raises LuthierError where the folder holds codes of another kind, or floats that have to be calibrated first.
    """
    stored = stored_in(folder)
    if stored is None:
        if getattr(precision, "calibrated", False):
            raise LuthierError(
                f"{name}: this model is stored in floats, and precision {kind_of(precision)} reads codes that were fitted to data; "
                f"make them first: luthier quantize {name} --calibrate FILE --output FOLDER"
            )
        return precision
    if kind_of(precision) != stored:
        raise LuthierError(
            f"{name}: this model is stored in {stored}, and precision is {kind_of(precision)}; say precision={stored}, or write it out in floats first: "
            f"luthier export {name} --output FOLDER"
        )
    found = type(precision).from_file_config(json.loads((folder / "config.json").read_text())["quantization_config"])
    asked = {f: getattr(precision, f) for f in ("compute", "resident", "kernels") if hasattr(precision, f)}  # how it is computed with is no matter of the file
    for f in dataclasses.fields(precision):
        if f.name not in asked and getattr(precision, f.name) not in (f.default, getattr(found, f.name)):
            held = getattr(found, f.name)
            raise LuthierError(f"{name}: precision.{f.name}: found {getattr(precision, f.name)!r}, and the folder's codes have {held!r}; leave it out")
    return dataclasses.replace(found, **asked)


class Files:
    """The tensors of a folder, read one by one. Keys may have the prefix of the model's trunk or lack it."""

    def __init__(self, folder: Path):
        self.folder, self.open = folder, ExitStack()
        self.where: dict[str, Path] = {}
        try:
            for path in sorted(folder.glob("*.safetensors")):
                with safe_open(path, "pt") as f:
                    self.where |= dict.fromkeys(f.keys(), path)
        except SafetensorError as e:
            raise LuthierError(f"{path}: damaged: {e}; copy or download it again") from None
        self.handles: dict[Path, Any] = {}
        self.by_module: dict[str, dict[str, str]] = {}
        for key in self.where:
            parts = key.split(".")
            for i in range(1, len(parts)):
                self.by_module.setdefault(".".join(parts[:i]), {})[".".join(parts[i:])] = key

    def leaves(self, path: str) -> dict[str, str]:
        """Name inside the module -> key, of a linear's tensors but its bias."""
        found = self.by_module.get(path) or self.by_module.get(path.partition(".")[2]) or {}
        return {leaf: key for leaf, key in found.items() if leaf != "bias"}

    def codes(self, path: str) -> bool:
        """Whether there are codes for a linear: more than a weight, or no weight at all."""
        leaves = set(self.leaves(path))
        return bool(leaves) and leaves != {"weight"}

    def read(self, key: str) -> Tensor:
        """One tensor."""
        path = self.where[key]
        if path not in self.handles:
            self.handles[path] = self.open.enter_context(safe_open(path, "pt"))
        return self.handles[path].get_tensor(key)  # type: ignore[no-any-return]

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *exc: object) -> None:
        self.open.close()


# --- writing ----------------------------------------------------------------------------------------------------------


def write_folder(base: Base, precision: Any, folder: Path, *, origin: Mapping[str, Any] | None = None) -> None:
    """Write a base whose linears are packed: codes in the field's layout, other tensors as they are, config.json, tokenizer, and what it was made from."""
    lm: Any = base.model
    codes = {f"{path}.{leaf}": t for path, linear in packed(lm) for leaf, t in linear.to_file().items()}  # type: ignore[operator]
    tied = set(getattr(lm, "all_tied_weights_keys", None) or ())
    floats: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, t in lm.state_dict().items():
        leaf = name.rpartition(".")[2]
        holder = lm.get_submodule(name.rpartition(".")[0])
        if isinstance(holder, PackedLinear) and leaf != "bias":
            continue
        if name in tied or (t.device.type != "meta" and t.data_ptr() in seen and t.numel()):
            continue
        seen.add(t.data_ptr())
        floats[name] = t
    config = lm.config.to_dict()
    floating = [path for path, m in modules(lm) if is_linear(m) and not isinstance(m, PackedLinear)]
    config |= {"quantization_config": precision.file_config(skip=floating), "architectures": [type(lm).__name__]}
    config["dtype"] = str(precision.dtype).removeprefix("torch.")
    for key in [k for k in config if k.startswith("_attn") or k == "_name_or_path"]:
        del config[key]
    made_from = {"source": base.source, "revision": base.revision, "hash": base.hash}
    with atomic.folder(folder) as new:
        _save({k: v.detach().to("cpu").contiguous() for k, v in (floats | codes).items()}, new)
        (new / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
        if getattr(lm, "generation_config", None) is not None:
            lm.generation_config.save_pretrained(new)
        if base.tokenizer is not None:
            base.tokenizer.save_pretrained(new)
        (new / ORIGIN).write_text(json.dumps({"quantised_from": made_from | dict(origin or {})}, indent=2) + "\n")


def _save(tensors: dict[str, Tensor], folder: Path) -> None:
    """One file, or several with the index that transformers reads."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, t in tensors.items():
        if size and size + t.nbytes > SHARD:
            parts.append({})
            size = 0
        parts[-1][key] = t
        size += t.nbytes
    if len(parts) == 1:
        save_file(parts[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    index: dict[str, str] = {}
    for i, part in enumerate(parts, 1):
        name = f"model-{i:05}-of-{len(parts):05}.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    total = sum(t.nbytes for t in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1) + "\n")


# --- the cache --------------------------------------------------------------------------------------------------------


def cached(hash: str, precision: Any) -> Path:
    """Where the quantised copy of a base is kept: LUTHIER_CACHE, or the user's cache folder."""
    root = os.environ.get("LUTHIER_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "luthier"
    settings = json.dumps(precision.file_config(), sort_keys=True, default=str)
    return Path(root) / "quantised" / f"{hash}-{kind_of(precision)}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"


def original(folder: Path) -> dict[str, Any]:
    """What a folder of codes was made from ({} where it does not say)."""
    try:
        found = json.loads((folder / ORIGIN).read_text()).get("quantised_from")
    except (OSError, ValueError):
        return {}
    return dict(found or {})
