"""A base, an adapter or a run, by one name, as a policy that is ready to answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import adapter, build
from .core import LuthierError
from .hub import FIDDLE
from .plugins import plugin
from .policy import Policy
from .run import Model


def load(what: str | Path, *, model: Model | str | None = None, precision: str = "auto", place: Any = None, offline: bool = False) -> Policy:
    """Open a policy for inference.

    ``what``: the embedded base (fiddle), a model folder, a Hub id, an adapter folder (ours or PEFT's) or a run's folder. ``model``: the base
    of an adapter, where it should not be looked for where the adapter says. ``precision``: float32, bfloat16, or auto: what this machine
    does fast. Raises LuthierError for what cannot be found or does not fit.
    """
    place = place or plugin("place", "one")()
    kind = build.fast_precision(place.device)[0] if precision == "auto" else precision
    stored = plugin("precision", kind)()
    folder = adapter.artefact(Path(what).expanduser())
    if folder is None or not adapter.is_adapter(folder):
        opened = Model(id=str(folder or what), offline=offline)
        base = build.load(opened, precision=stored, device=place.device)
        policy = Policy(base)
    else:
        config, ours = adapter.describe(folder)
        base = build.load(_base_of(folder, config, ours, model, offline), precision=stored, device=place.device)
        policy = adapter.load(base, folder)
    place.put(policy)
    return policy.eval()


def _base_of(folder: Path, config: dict[str, Any], ours: dict[str, Any], model: Model | str | None, offline: bool) -> Model:
    if model is not None:
        return Model(id=model, offline=offline) if isinstance(model, str) else model
    recorded = (ours.get("base") or {}).get("source") or config.get("base_model_name_or_path")
    if not recorded:
        raise LuthierError(f"{folder}: this adapter does not say which base it belongs to; name it: --model ID")
    if recorded in ("fiddle", str(FIDDLE)):
        return Model(id="fiddle")
    return Model(id=recorded, revision=config.get("revision"), offline=offline)
