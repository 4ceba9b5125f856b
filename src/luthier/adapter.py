"""What a run leaves behind: an adapter folder, or a whole model where every weight was trained.

An adapter folder is PEFT's where PEFT has one (adapter_config.json, adapter_model.safetensors), so that every other program opens it, plus
luthier.json with what that layout cannot say: our method, the base's fingerprint, the chat template. Where the layout loses something
(PiSSA becomes a plain LoRA of twice the rank), delta.safetensors holds our own tensors too, so training can go on from it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import __version__, atomic
from .config import plain, read
from .core import Base, LuthierError, Method
from .plugins import kind_of, plugin
from .policy import Policy
from .site import sites

CONFIG, WEIGHTS, OURS, DELTA = "adapter_config.json", "adapter_model.safetensors", "luthier.json", "delta.safetensors"


def tensors_of(policy: Policy) -> dict[str, Tensor]:
    """The delta's parameters and buffers and the heads, by name: everything that restores it."""
    assert policy.delta is not None
    return {k: v.detach() for k, v in (policy.trained() | policy.delta.buffers).items()}


def save(policy: Policy, folder: Path, *, extra: dict[str, Any] | None = None) -> None:
    """Write the delta, read it back and compare. Raises LuthierError rather than keep a delta that is not finite or not what was written."""
    assert policy.delta is not None
    tensors = {k: v.to("cpu").contiguous() for k, v in tensors_of(policy).items()}
    broken = [k for k, v in tensors.items() if not bool(torch.isfinite(v).all())]
    if broken:
        raise LuthierError(f"{folder}: not saved: {len(broken)} trained tensors are not finite, for example {broken[0]!r}; lower optim.lr")
    if policy.delta.export is None:
        return save_model(policy, folder, extra=extra)
    config, exported = policy.delta.export()
    exported = {k: v.to("cpu").float().contiguous() for k, v in exported.items()}
    with atomic.folder(folder) as new:
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_file(exported, new / WEIGHTS, metadata={"format": "pt"})
        if _lossy(policy.method, config, exported, tensors):
            save_file(tensors, new / DELTA, metadata={"format": "pt"})
        (new / OURS).write_text(json.dumps(facts(policy) | (extra or {}), indent=2) + "\n")
        if policy.base.tokenizer is not None:
            policy.base.tokenizer.save_pretrained(new)
        _verify(new / WEIGHTS, exported)
    return None


def save_model(policy: Policy, folder: Path, *, extra: dict[str, Any] | None = None) -> None:
    """Write the whole model as transformers opens it, with its tokenizer."""
    assert not sites(policy.lm), "fold the delta first"
    lm = policy.lm
    implementation, lm.config._attn_implementation = lm.config._attn_implementation, None
    try:
        with atomic.folder(folder) as new:
            lm.save_pretrained(new)
            if policy.base.tokenizer is not None:
                policy.base.tokenizer.save_pretrained(new)
            (new / OURS).write_text(json.dumps(facts(policy) | (extra or {}), indent=2) + "\n")
    finally:
        lm.config._attn_implementation = implementation


def facts(policy: Policy) -> dict[str, Any]:
    """What luthier.json says."""
    base = policy.base
    template = getattr(base.tokenizer, "chat_template", None)
    return {
        "luthier": __version__,
        "method": {"kind": kind_of(policy.method)} | plain(policy.method) if policy.method is not None else None,
        "base": {"source": base.source, "revision": base.revision, "hash": base.hash, "family": base.anatomy.family},
        "template_hash": hashlib.sha256(template.encode()).hexdigest()[:16] if isinstance(template, str) else None,
    }


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, ours or PEFT's."""
    return (folder / CONFIG).is_file()


def describe(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(PEFT's configuration, ours or {}) of an adapter folder. Raises LuthierError where they cannot be read."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        ours = json.loads((folder / OURS).read_text()) if (folder / OURS).is_file() else {}
    except FileNotFoundError:
        raise LuthierError(f"{folder}: no {CONFIG} here, so it is no adapter; name a run's adapter/ folder or a PEFT adapter") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise LuthierError(f"{folder}: damaged: {CONFIG} or {OURS} is not JSON ({e})") from None
    return config, ours


def artefact(path: Path) -> Path | None:
    """The adapter or model folder that a path stands for; a run's folder stands for what it made. None: no folder."""
    if not path.is_dir():
        return None
    for name in ("adapter", "model"):
        if (path / "run.yaml").is_file() and (path / name).is_dir():
            return path / name
    if (path / "run.yaml").is_file():
        raise LuthierError(f"{path}: this run has not finished, so it has no adapter yet; go on with it: luthier train --resume {path}")
    return path


def start_from(policy: Policy, where: str) -> None:
    """Set a freshly attached delta to a saved one (method.from). Raises LuthierError where they are not of one kind and size."""
    folder = artefact(Path(where).expanduser())
    if folder is None:
        raise LuthierError(f"method.from: there is no folder {where!r}; name an adapter's or a run's folder")
    method, values = read_delta(policy.base, folder)
    if kind_of(method) != kind_of(policy.method):
        raise LuthierError(f"method.from: {folder} holds a delta of {kind_of(method)}, and this run's method is {kind_of(policy.method)}")
    scales = [getattr(m, "scale", None) for m in (method, policy.method)]
    if scales[0] != scales[1]:
        raise LuthierError(f"method.from: the saved delta is scaled by {scales[0]:g} and this run's by {scales[1]:g}; set the same rank, alpha and scaling")
    restore(policy, values, f"method.from: {folder}")


def load(base: Base, folder: Path, *, name: str = "default") -> Policy:
    """Attach a saved delta to a base. Raises LuthierError where it is damaged or belongs to another base."""
    method, values = read_delta(base, folder)
    policy = Policy(base, method.attach(base, name), method=method, name=name)
    restore(policy, values, str(folder))
    return policy


def read_delta(base: Base, folder: Path) -> tuple[Method, dict[str, Tensor]]:
    """The method of a saved delta, and its tensors. Raises LuthierError where it is damaged or belongs to another base."""
    config, ours = describe(folder)
    theirs = (ours.get("base") or {}).get("hash")
    if theirs and base.hash and theirs != base.hash:
        raise LuthierError(
            f"{folder}: this adapter was trained on {ours['base']['source']!r} ({ours['base']['family']}, {theirs}); the model here is "
            f"{base.source!r} ({base.anatomy.family}, {base.hash}). An adapter only fits its own base"
        )
    tensors = read_tensors(folder / (DELTA if (folder / DELTA).is_file() else WEIGHTS))
    if ours.get("method") and (folder / DELTA).is_file():
        method, values = read_method(ours["method"]), tensors
    else:
        kind = str(config.get("peft_type", "")).lower()
        reader = getattr(plugin("methods", kind), "from_peft", None) if kind in ("lora",) else None
        if reader is None:
            raise LuthierError(f"{folder / CONFIG}: peft_type {config.get('peft_type')!r} is not read; LORA is")
        method, values = reader(config, tensors)
        if ours.get("method"):
            method = read_method(ours["method"])
    return method, values


def read_method(tree: dict[str, Any]) -> Method:
    """A method from its saved fields."""
    tree = {k: v for k, v in tree.items() if k != "from"}  # where it came from is history, not how to attach it
    return read(plugin("methods", tree.pop("kind")), tree, "luthier.json: method")


def restore(policy: Policy, values: dict[str, Tensor], where: str) -> None:
    """Copy saved tensors into a freshly attached delta. Raises LuthierError where names or shapes differ."""
    own = tensors_of(policy)
    if set(own) != set(values):
        odd = sorted(set(own) ^ set(values))
        raise LuthierError(f"{where}: does not fit this base: {len(odd)} tensors have no counterpart, for example {odd[0]!r}")
    for key, tensor in own.items():
        if tensor.shape != values[key].shape:
            raise LuthierError(f"{where}: does not fit this base: {key} is {tuple(values[key].shape)} in the file and {tuple(tensor.shape)} here")
        tensor.copy_(values[key])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file. Raises LuthierError where it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise LuthierError(f"{path}: missing; weights are only read as safetensors, never as pickle") from None
    except SafetensorError as e:
        raise LuthierError(f"{path}: damaged, or not a safetensors file: {e}; copy or train it again") from None


def _lossy(method: Method | None, config: dict[str, Any], exported: dict[str, Tensor], tensors: dict[str, Tensor]) -> bool:
    """Whether reading the exported layout back gives other tensors than ours."""
    _, back = type(method).from_peft(config, exported)  # type: ignore[union-attr]
    return set(back) != set(tensors) or any(not torch.equal(back[k], tensors[k]) for k in tensors)


def _verify(path: Path, written: dict[str, Tensor]) -> None:
    back = read_tensors(path)
    wrong = [k for k, v in written.items() if k not in back or not torch.equal(back[k], v)]
    if wrong or len(back) != len(written):
        raise LuthierError(
            f"{path}: what was read back is not what was written ({len(wrong)} tensors differ, for example {wrong[:1]}); the disk may be failing"
        )
