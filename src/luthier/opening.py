"""A base, an adapter or a run, by one name, as a policy that is ready to answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import build, remembered
from .core import LuthierError
from .hub import FIDDLE, locate
from .policy import Policy
from .quantising import codes
from .saving import adapter
from .settings.plugins import kind_of, plugin
from .settings.run import Model


def load(
    what: str | Path,
    *,
    model: Model | str | None = None,
    precision: str = "auto",
    place: Any = None,
    offline: bool = False,
    adapters: Mapping[str, str | Path] | None = None,
    use: str | None = None,
) -> Policy:
    """Open a policy for inference.

    ``what``: the embedded base (fiddle), a model folder, a Hub id, an adapter folder (ours or PEFT's) or a run's folder. ``model``: the base
    of an adapter, where it should not be looked for where the adapter says. ``precision``: a kind, or auto: the codes that the model is stored
    in or the adapter was trained on, else what this machine does fast.
    ``adapters``: more adapters or runs on the same base, by the names to use them under; that of ``what`` is "default".
    ``use``: what serves: a name, "a+b" for a stack, "none" for the base; default: the adapter of ``what``, or the only one. Raises LuthierError for
    what cannot be found or does not fit, and where several adapters leave open which is meant.
    """
    place = place or plugin("place", "one")()
    folder = adapter.artefact(Path(what).expanduser())
    if folder is None or not adapter.is_adapter(folder):
        opened = Model(id=str(folder or what), offline=offline)
        base = build.load(opened, precision=_precision(precision, opened, None, place), device=place.device)
        policy = Policy(base, heads=adapter.heads_of(base, folder) if folder is not None else None)
        policy.objective = adapter.objective_of(folder) if folder is not None else None
    else:
        config, ours = adapter.describe(folder)
        of = base_of(folder, config, ours, model, offline)
        base = build.load(of, precision=_precision(precision, of, adapter.packed_precision(folder), place), device=place.device)
        policy = adapter.load(base, folder)
    for name, where in (adapters or {}).items():
        found = adapter.artefact(Path(where).expanduser())
        if found is None:
            raise LuthierError(f"adapter {name}: there is no folder {str(where)!r}; name an adapter's or a run's folder")
        adapter.add(policy, found, name)
    if use is not None:
        policy.use(None if use == "none" else use)
    elif policy.active is None and policy.deltas:
        if len(policy.deltas) > 1:
            raise LuthierError(f"{len(policy.deltas)} adapters are here: {', '.join(policy.deltas)}; say which serves: one, several joined by +, or none")
        policy.use(next(iter(policy.deltas)))
    place.put(policy)
    if folder is not None:
        remembered.recall(policy, folder)
    return policy.eval()


def on_floats(trained: Policy, folder: Path, *, precision: str) -> Policy:
    """A delta that was trained on a base in codes, on the floats that these were made from: another model than the one that was trained.

    ``trained``: the policy on codes; ``folder``: its adapter; ``precision``: of the floats. Raises LuthierError where they are no longer the same.
    """
    base = trained.base
    made_from = codes.original(locate(Model(id=base.source, revision=base.revision)))
    source = Model(id=made_from.get("source") or base.source, revision=made_from.get("revision") or base.revision)
    floats = build.load(source, precision=plugin("precision", precision)())
    if made_from.get("hash") and made_from["hash"] != floats.hash:
        raise LuthierError(f"{source.id} is no longer the model that these codes were made from ({made_from['hash']}; it is {floats.hash})")
    floats.hash = base.hash  # the same model in floats: the delta is told that it fits
    return adapter.load(floats, folder)


def _precision(asked: str, model: Model, trained_on: Any, place: Any) -> Any:
    """The precision to open a base in."""
    if asked != "auto":
        return plugin("precision", asked)()
    stored = codes.stored_in(locate(model, weights=False))
    if trained_on is not None and stored in (None, kind_of(trained_on)):
        return trained_on
    return plugin("precision", stored or build.fast_precision(place.device)[0])()


def named(settings: Sequence[str], option: str = "--adapter") -> dict[str, str]:
    """name -> folder of "name=folder" settings. Raises LuthierError for one that has no name, or a name twice."""
    out: dict[str, str] = {}
    for setting in settings:
        name, equals, folder = setting.partition("=")
        if not equals or not name or not folder:
            raise LuthierError(f"{option} {setting}: say NAME=FOLDER, for example {option} formal=runs/formal")
        if name in out:
            raise LuthierError(f"{option}: two are called {name!r}; give each its own name")
        out[name] = folder
    return out


def base_of(folder: Path, config: dict[str, Any], ours: dict[str, Any], model: Model | str | None, offline: bool) -> Model:
    """The base that a saved delta belongs to: the one that is given, else the one it names. Raises LuthierError where it names none."""
    if model is not None:
        return Model(id=model, offline=offline) if isinstance(model, str) else model
    recorded = (ours.get("base") or {}).get("source") or config.get("base_model_name_or_path")
    if not recorded:
        raise LuthierError(f"{folder}: this adapter does not say which base it belongs to; name it: --model ID")
    if recorded in ("fiddle", str(FIDDLE)):
        return Model(id="fiddle")
    beside = folder.resolve().parents[1].joinpath(*Path(recorded).parts[-2:])  # runs/NAME/1-reading/model, of a run of stages that was moved
    if Path(recorded).is_absolute() and not Path(recorded).exists() and beside.is_dir():
        recorded = str(beside)
    return Model(id=recorded, revision=config.get("revision"), offline=offline)
