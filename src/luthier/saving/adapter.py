"""What a run leaves behind: an adapter folder, or a whole model where every weight was trained.

An adapter folder holds luthier.json (our method, the objective, the base's fingerprint, the chat template) and the delta, in the field's layout where there
is one, so that other programs open it: PEFT's adapter_config.json and adapter_model.safetensors, or the files that a method names. Where that layout
loses something (PiSSA becomes a plain LoRA of twice the rank, a prompt's encoder is dropped) or there is none, delta.safetensors holds our own tensors,
so training can go on from it. A head is saved with its delta, and a delta without its head is refused.

A method names another layout than PEFT's by the class attributes ``config_file`` and ``weights_file`` and reads it in ``from_layout(config, tensors,
base)``; PEFT's it reads in ``from_peft(config, tensors)``. Both give (method, tensors by our names). ``whole = True``: a whole model is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import __version__, atomic
from ..core import Base, Delta, LuthierError, Method, Objective
from ..deltas import layout, lowrank
from ..modelling import vocabulary
from ..modelling.shards import here
from ..modelling.site import sites
from ..policy import Policy, leave_out_unread
from ..settings.config import plain, read
from ..settings.plugins import kind_of, plugin
from . import sharded_model

CONFIG, WEIGHTS, OURS, DELTA = "adapter_config.json", "adapter_model.safetensors", "luthier.json", "delta.safetensors"
HEADS = "heads.safetensors"  # beside a whole model
STAGES = "stages.json"  # in the folder of a run of several stages; see ledger.py


def writes(method: Method | None) -> str:
    """What is written for a method, which is also the name of its folder in a run's: "adapter" or "model"."""
    return "model" if getattr(method, "whole", False) else "adapter"


def by_all(policy: Policy) -> bool:
    """Whether all ranks have to call `save`: what is written lies over them."""
    return policy.sharded and writes(policy.method) == "model"


def tensors_of(policy: Policy) -> dict[str, Tensor]:
    """The delta in its saved form, and the heads, by name: everything that restores it."""
    assert policy.delta is not None
    return {k: v.detach() for k, v in (_saved(policy.delta) | _heads(policy)).items()}


def _saved(delta: Delta) -> dict[str, Tensor]:
    return delta.pack() if delta.pack is not None else dict(delta.params) | delta.buffers


def _heads(policy: Policy) -> dict[str, Tensor]:
    return {f"heads.{n}": t.detach() for n, t in policy.heads.state_dict().items()}


# --- writing --------------------------------------------------------------------------------------------------------


def save(policy: Policy, folder: Path, *, objective: Objective | None = None, extra: dict[str, Any] | None = None) -> None:
    """Write the delta and the heads, read them back and compare. ``objective``: what it was trained with, if the policy does not know; heads need one.

    Raises LuthierError rather than keep a delta that is not finite or not what was written.
    """
    assert policy.delta is not None
    if by_all(policy):
        return _save_over_ranks(policy, folder, objective=objective, extra=extra)
    tensors = {k: v.to("cpu").contiguous() for k, v in tensors_of(policy).items()}
    broken = [k for k, v in tensors.items() if not bool(torch.isfinite(v).all())]
    if broken:
        raise LuthierError(f"{folder}: not saved: {len(broken)} trained tensors are not finite, for example {broken[0]!r}; lower optim.lr")
    if writes(policy.method) == "model":
        return save_model(policy, folder, objective=objective, extra=extra)
    said = facts(policy, objective) | (extra or {})
    files = _files(policy)
    with atomic.folder(folder) as new:
        lossless = False
        if files is not None:
            config, exported = files
            config_file, weights_file = _names(policy.method)
            write(new, config, exported, config_file=config_file, weights_file=weights_file)
            _, back = _from_layout(type(policy.method), policy.base, config, exported, str(folder))
            lossless = set(back) == set(tensors) and all(torch.equal(back[k], tensors[k]) for k in tensors)
        if not lossless:
            save_file(tensors, new / DELTA, metadata={"format": "pt"})
            _verify(new / DELTA, tensors)
        (new / OURS).write_text(json.dumps(said, indent=2) + "\n")
        if policy.base.tokenizer is not None:
            policy.base.tokenizer.save_pretrained(new)
    return None


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, config_file: str = CONFIG, weights_file: str = WEIGHTS) -> None:
    """The two files of the field's layout, read back and compared."""
    (folder / config_file).write_text(json.dumps(config, indent=2) + "\n")
    save_file(dict(tensors), folder / weights_file, metadata={"format": "pt"})
    _verify(folder / weights_file, tensors)


def _files(policy: Policy) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """(configuration, tensors) in the field's layout, heads included where it has a place for them; None where there is no such layout."""
    assert policy.delta is not None
    if policy.delta.export is None:
        return None
    config, tensors = policy.delta.export()
    if _names(policy.method)[1] == WEIGHTS:
        config, heads = layout.with_heads(policy.base, config, {k.removeprefix("heads."): v for k, v in _heads(policy).items()})
        tensors = tensors | heads
    return config, {k: v.detach().to("cpu").float().contiguous() for k, v in tensors.items()}


def _names(method: Method | type | None) -> tuple[str, str]:
    return getattr(method, "config_file", CONFIG), getattr(method, "weights_file", WEIGHTS)


def save_model(policy: Policy, folder: Path, *, objective: Objective | None = None, extra: dict[str, Any] | None = None) -> None:
    """Write the whole model as transformers opens it, with its tokenizer, and the heads in a file of their own."""
    assert not sites(policy.lm), "fold the delta first"
    said = facts(policy, objective) | (extra or {})
    heads = {k.removeprefix("heads."): v.to("cpu").contiguous() for k, v in _heads(policy).items()}
    lm = policy.lm
    implementation, lm.config._attn_implementation = lm.config._attn_implementation, None
    try:
        with atomic.folder(folder) as new:
            lm.save_pretrained(new)
            _beside_model(policy, new, said, heads)
    finally:
        lm.config._attn_implementation = implementation


def _beside_model(policy: Policy, folder: Path, said: dict[str, Any], heads: dict[str, Tensor]) -> None:
    if policy.base.tokenizer is not None:
        policy.base.tokenizer.save_pretrained(folder)
    if heads:
        save_file(heads, folder / HEADS, metadata={"format": "pt"})
    (folder / OURS).write_text(json.dumps(said, indent=2) + "\n")


def _save_over_ranks(policy: Policy, folder: Path, *, objective: Objective | None, extra: dict[str, Any] | None) -> None:
    """`save` for a whole model that lies over ranks, all of which call it: the same files, by the first of them. Raises LuthierError on all, or on none."""
    place: Any = policy.place
    policy.rest()
    said = facts(policy, objective) | (extra or {})
    broken = [k for k, v in tensors_of(policy).items() if not bool(torch.isfinite(here(v)).all())]
    found = [name for some in place.launch.gather(broken, "tensors that are not finite") for name in some]
    if found:
        raise LuthierError(f"{folder}: not saved: {len(set(found))} trained tensors are not finite, for example {found[0]!r}; lower optim.lr")
    new = atomic.begin(folder) if place.leads else atomic.temporary(folder)
    place.wait("the folder of the model")
    sharded_model.write(policy.lm, new, leads=place.leads)
    if place.leads:
        _beside_model(policy, new, said, {k.removeprefix("heads."): v.to("cpu").contiguous() for k, v in _heads(policy).items()})
        atomic.finish(folder)
    place.wait("the model")


def facts(policy: Policy, objective: Objective | None = None) -> dict[str, Any]:
    """What luthier.json says. Raises LuthierError for heads without the objective that says what they are."""
    objective = objective or policy.objective
    if policy.heads and objective is None:
        raise LuthierError(f"the heads {', '.join(policy.heads)} cannot be saved without the objective that made them; give save() the objective")
    base = policy.base
    template = getattr(base.tokenizer, "chat_template", None)
    return {
        "luthier": __version__,
        "method": {"kind": kind_of(policy.method)} | plain(policy.method) if policy.method is not None else None,
        "objective": {"kind": kind_of(objective)} | plain(objective) if objective is not None else None,
        "base": {"source": base.source, "revision": base.revision, "hash": base.hash, "family": base.anatomy.family},
        "precision": {"kind": kind_of(base.precision)} | plain(base.precision) if base.precision is not None else None,
        "tokens": list(base.tokens),
        "template_hash": hashlib.sha256(template.encode()).hexdigest()[:16] if isinstance(template, str) else None,
    }


# --- what a path is -------------------------------------------------------------------------------------------------


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, ours or another program's."""
    return (folder / CONFIG).is_file() or (folder / DELTA).is_file()


def describe(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the field's configuration or {}, ours or {}) of an adapter folder. Raises LuthierError where they cannot be read."""
    if not is_adapter(folder):
        raise LuthierError(f"{folder}: no {CONFIG} here, so it is no adapter; name a run's adapter/ folder or a PEFT adapter")
    try:
        config, ours = (json.loads((folder / f).read_text()) if (folder / f).is_file() else {} for f in (CONFIG, OURS))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise LuthierError(f"{folder}: damaged: {CONFIG} or {OURS} is not JSON ({e})") from None
    if not config and not ours:
        raise LuthierError(f"{folder}: {DELTA} is here without {OURS}, which says what it is; copy the whole folder")
    return config, ours


def artefact(path: Path) -> Path | None:
    """The adapter or model folder that a path stands for; a run's folder stands for what it made. None: no folder."""
    if not path.is_dir():
        return None
    if (path / STAGES).is_file():  # a run of stages stands for what its last one left
        left = json.loads((path / STAGES).read_text()).get("artefact")
        if left is None or not (path / left).is_dir():
            raise LuthierError(f"{path}: its last stage has not finished; go on with it: luthier train --resume {path}, or name the folder of one stage in it")
        return path / left
    for name in ("adapter", "model"):
        if (path / "run.yaml").is_file() and (path / name).is_dir():
            return path / name
    if (path / "run.yaml").is_file():
        raise LuthierError(f"{path}: this run has not finished, so it has no adapter yet; go on with it: luthier train --resume {path}")
    return path


# --- reading --------------------------------------------------------------------------------------------------------


def load(base: Base, folder: Path, *, name: str = "default") -> Policy:
    """Attach a saved delta to a base, with its heads. Raises LuthierError where it is damaged, belongs to another base, or lacks its head."""
    method, values, objective = read_delta(base, folder)
    heads = restored_heads(base, objective, values, folder)
    delta = method.attach(base, name)
    _attach_tokens(base, delta, name, values)
    if heads and method.edits == "weights" and not getattr(objective, "reads_head", False):
        leave_out_unread(base, delta)
    _fill(delta, values, str(folder))
    policy = Policy(base, delta, method=method, name=name, heads=heads)
    policy.objective = objective
    return policy


def add(policy: Policy, folder: Path, name: str, *, heads: bool = False) -> None:
    """Attach one more saved delta to a policy's base, under a name to use, stack or route to.

    ``heads``: its heads are the caller's to restore. Raises LuthierError for a name that is taken, a delta that is damaged or belongs to another base, and
    one with a head of its own.
    """
    method, values, objective = read_delta(policy.base, folder)
    if not heads and (any(k.startswith("heads.") for k in values) or (objective is not None and objective.heads(policy.base))):
        raise LuthierError(f"{folder}: this delta has a head of its own, which only the first delta of a base brings; open it by itself")
    policy.add(name, Delta({}))  # says what is wrong with the name before anything is attached
    try:
        delta = method.attach(policy.base, name)
        _attach_tokens(policy.base, delta, name, values)
        _fill(delta, values, str(folder))
    except BaseException:
        del policy.deltas[name]
        for site in sites(policy.lm).values():
            if name in site.edits:
                del site.edits[name]
        raise
    policy.deltas[name] = delta
    policy.use(policy.active)


def _attach_tokens(base: Base, delta: Delta, name: str, values: Mapping[str, Tensor]) -> None:
    if any(k.startswith(f"{vocabulary.KEY}:") for k in values):
        vocabulary.attach(base, delta, name)


def start_from(policy: Policy, where: str) -> None:
    """Set a freshly attached delta to a saved one (method.from). Raises LuthierError where they are not of one kind and size."""
    folder = artefact(Path(where).expanduser())
    if folder is None:
        raise LuthierError(f"method.from: there is no folder {where!r}; name an adapter's or a run's folder")
    method, values, _ = read_delta(policy.base, folder)
    if kind_of(method) != kind_of(policy.method):
        raise LuthierError(f"method.from: {folder} holds a delta of {kind_of(method)}, and this run's method is {kind_of(policy.method)}")
    saved, own = (m.scales(policy.base) if hasattr(m, "scales") else {} for m in (method, policy.method))
    if odd := [path for path, scale in saved.items() if own.get(path, scale) != scale]:
        raise LuthierError(
            f"method.from: the saved delta is scaled by {saved[odd[0]]:g} and this run's by {own[odd[0]]:g}; set the same rank, alpha and scaling"
        )
    heads = {k: v for k, v in values.items() if k.startswith("heads.")}
    if heads and policy.heads:
        _copy(_heads(policy), heads, f"method.from: {folder}")
    assert policy.delta is not None
    _fill(policy.delta, values, f"method.from: {folder}")


def heads_of(base: Base, folder: Path) -> dict[str, nn.Module]:
    """The heads that lie beside a whole model; {} where its objective has none. Raises LuthierError where they are missing."""
    if not (folder / OURS).is_file() or not (tree := json.loads((folder / OURS).read_text()).get("objective")):
        return {}
    saved = {f"heads.{k}": v for k, v in read_tensors(folder / HEADS).items()} if (folder / HEADS).is_file() else {}
    return restored_heads(base, read_objective(tree), saved, folder)


def objective_of(folder: Path) -> Objective | None:
    """The objective that a saved delta or model was trained with, its labels included; None where the folder does not say."""
    if not (folder / OURS).is_file():
        return None
    tree = json.loads((folder / OURS).read_text()).get("objective")
    return read_objective(tree) if tree else None


def read_delta(base: Base, folder: Path) -> tuple[Method, dict[str, Tensor], Objective | None]:
    """The method of a saved delta, its tensors ("heads.*" among them) and its objective. Raises LuthierError where it is damaged or belongs to another base."""
    config, ours = describe(folder)
    theirs = (ours.get("base") or {}).get("hash")
    if theirs and base.hash and theirs != base.hash:
        raise LuthierError(
            f"{folder}: this adapter was trained on {ours['base']['source']!r} ({ours['base']['family']}, {theirs}); the model here is "
            f"{base.source!r} ({base.anatomy.family}, {base.hash}). An adapter only fits its own base"
        )
    if ours.get("tokens"):
        vocabulary.extend(base, ours["tokens"])
    method = read_method(ours["method"]) if ours.get("method") else None
    objective = read_objective(ours["objective"]) if ours.get("objective") else None
    if method is not None and (folder / DELTA).is_file():
        return method, read_tensors(folder / DELTA), objective
    cls = plugin("methods", layout.recognise(config, str(folder / CONFIG))) if method is None else type(method)
    found, values = _from_layout(cls, base, config, read_tensors(_weights(folder, cls)), str(folder))
    if objective is None and "heads.label.out.weight" in values:  # another program's classifier does not name its labels
        number = len(values["heads.label.out.weight"])
        labels = tuple(f"LABEL_{i}" for i in range(number)) if number > 1 else ()
        objective = plugin("objectives", "classify")(problem="single" if number > 1 else "regression", labels=labels)
    return method or found, values, objective


def _weights(folder: Path, cls: type) -> Path:
    path = folder / _names(cls)[1]
    pickled = next((p for p in (folder / "adapter_model.bin", folder / "pytorch_adapter.bin") if p.is_file()), None)
    if pickled is not None and not path.is_file():
        how = ": save_adapter(..., use_safetensors=True, with_head=False)" if pickled.name == "pytorch_adapter.bin" else ""
        raise LuthierError(f"{pickled}: a pickle can run any code, so it is never read; save it again as safetensors with the program that made it{how}")
    return path


def _from_layout(cls: Any, base: Base, config: dict[str, Any], tensors: dict[str, Tensor], where: str) -> tuple[Method, dict[str, Tensor]]:
    """A method and its tensors, heads included, from the field's files."""
    if hasattr(cls, "from_layout"):
        return cls.from_layout(config, tensors, base)
    if not hasattr(cls, "from_peft"):
        raise LuthierError(f"{where}: {DELTA} is missing, and nothing else holds this delta; copy the whole folder")
    delta, heads = layout.split(base, config, tensors, where)
    if config.get("peft_type") == "LORA":
        delta = lowrank.single_use(base, config, delta, where)
    method, values = cls.from_peft(config, delta)
    return method, values | {f"heads.{k}": v for k, v in heads.items()}


def read_method(tree: dict[str, Any]) -> Method:
    """A method from its saved fields."""
    tree = {k: v for k, v in tree.items() if k != "from"}  # where it came from is history, not how to attach it
    return read(plugin("methods", tree.pop("kind")), tree, "luthier.json: method")


def read_objective(tree: dict[str, Any]) -> Objective:
    """An objective from its saved fields."""
    tree = dict(tree)
    return read(plugin("objectives", tree.pop("kind")), tree, "luthier.json: objective")


def packed_precision(folder: Path) -> Any:
    """The packed precision of the base that a saved delta was trained on; None for floats, and where the folder does not say."""
    try:
        tree = json.loads((folder / OURS).read_text()).get("precision")
    except (OSError, ValueError):
        return None
    if not tree:
        return None
    cls: Any = plugin("precision", tree.pop("kind"))
    return read(cls, tree, "luthier.json: precision") if cls.packed else None


def restored_heads(base: Base, objective: Objective | None, values: Mapping[str, Tensor], folder: Path) -> dict[str, nn.Module]:
    """Heads as they were saved; never one that is new, which would answer at random."""
    saved = {k: v for k, v in values.items() if k.startswith("heads.")}
    heads = nn.ModuleDict(objective.heads(base)) if objective is not None else nn.ModuleDict()
    own = {f"heads.{n}": t for n, t in heads.state_dict().items()}
    if missing := sorted(set(own) - set(saved)):
        raise LuthierError(f"{folder}: its head is missing ({len(missing)} tensors, for example {missing[0]!r}), and a new one would answer at random")
    _copy(own, saved, str(folder))
    return dict(heads)


def restore(policy: Policy, values: Mapping[str, Tensor], where: str) -> None:
    """Copy saved tensors into a freshly attached delta and its heads. Raises LuthierError where names or shapes differ."""
    assert policy.delta is not None
    _fill(policy.delta, values, where)
    _copy(_heads(policy), {k: v for k, v in values.items() if k.startswith("heads.")}, where)


def _fill(delta: Delta, values: Mapping[str, Tensor], where: str) -> None:
    values = {k: v for k, v in values.items() if not k.startswith("heads.")}
    if delta.unpack is not None:
        delta.unpack(values)
    _copy({k: v.detach() for k, v in _saved(delta).items()}, values, where)


def _copy(own: Mapping[str, Tensor], values: Mapping[str, Tensor], where: str) -> None:
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


def _verify(path: Path, written: Mapping[str, Tensor]) -> None:
    back = read_tensors(path)
    wrong = [k for k, v in written.items() if k not in back or not torch.equal(back[k], v)]
    if wrong or len(back) != len(written):
        raise LuthierError(
            f"{path}: what was read back is not what was written ({len(wrong)} tensors differ, for example {wrong[:1]}); the disk may be failing"
        )
