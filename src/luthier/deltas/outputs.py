"""A delta made of edits at modules: what the methods that edit outputs share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..core import Base, Delta
from ..modelling.site import Edit, site_at


def at_sites(base: Base, name: str, edits: Mapping[str, Edit], export: Callable[[], tuple[dict[str, Any], dict[str, Tensor]]] | None = None) -> Delta:
    """Put edits at the modules of these paths, under a delta's name. Their parameters train; their persistent buffers are saved.

    A parameter that several edits share counts once, under the first path. Folding writes each into its module's weight.
    """
    params: dict[str, nn.Parameter] = {}
    buffers: dict[str, Tensor] = {}
    seen = set()
    for path, edit in edits.items():
        site_at(base.model, path).edits[name] = edit
        kept = edit.state_dict(keep_vars=True)
        for leaf, value in edit.named_parameters():
            if id(value) not in seen:
                seen.add(id(value))
                params[f"{path}:{leaf}"] = value
        buffers |= {f"{path}:{leaf}": b for leaf, b in edit.named_buffers() if leaf in kept}

    def fold() -> None:
        for path in edits:
            site_at(base.model, path).fold(name)

    return Delta(params, buffers=buffers, fold=fold, export=export)
