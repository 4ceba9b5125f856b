"""What of an artefact is the method's own: the bytes that have to be kept and handed on."""

from __future__ import annotations

from pathlib import Path


def own_files(artefact: Path) -> list[Path]:
    """The weight files of an adapter or a model. delta.safetensors repeats in our layout what another file holds in the field's, where there is one."""
    found = sorted(artefact.glob("*.safetensors"))
    others = [f for f in found if f.name != "delta.safetensors"]
    return others or found


def own_bytes(artefact: Path) -> int:
    """Their size."""
    return sum(f.stat().st_size for f in own_files(artefact))
