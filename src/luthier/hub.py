"""Where a model's files are: the embedded base, a folder, or a Hub id; and what they are, as a fingerprint."""

from __future__ import annotations

import difflib
import hashlib
import os
from pathlib import Path

from .errors import LuthierError
from .settings.run import Model

FIDDLE = Path(__file__).parent / "assets" / "fiddle"
_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
_BLOCK = 1 << 20


def locate(model: Model, *, weights: bool = True) -> Path:
    """The folder that holds a model's files, fetched from the Hub where the name is an id.

    ``weights=False``: configuration and tokenizer are enough. Raises LuthierError in one sentence for what is missing, gated or unreachable.
    """
    if model.id == "fiddle":
        folder = FIDDLE
    elif Path(model.id).expanduser().is_dir():
        folder = Path(model.id).expanduser()
    elif _looks_like_path(model.id):
        raise LuthierError(
            f"model.id: there is no folder {model.id!r}{_nearest(model.id)}; accepted are fiddle, a folder with config.json, or a Hub id (owner/name)"
        )
    else:
        folder = _fetch(model, weights)
    if not (folder / "config.json").is_file():
        raise LuthierError(f"model.id: {folder} holds no config.json, so it is no model folder{_hint(folder)}")
    if weights and not list(folder.glob("*.safetensors")):
        bins = sorted(p.name for p in folder.glob("*.bin"))
        why = f"only {bins[0]}, a pickle, which is never opened; convert it to safetensors first" if bins else "no *.safetensors"
        raise LuthierError(f"model.id: {folder} has no weights: {why}")
    return folder


def fingerprint(folder: Path, *, random: bool = False) -> str:
    """Hash of a model's configuration and weights: whole files up to 64 MB, beyond that their size and sixteen 1 MB blocks."""
    h = hashlib.sha256()
    weights = [] if random else sorted(folder.glob("*.safetensors"))
    for path in [folder / "config.json", *weights]:
        size = path.stat().st_size
        h.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as f:
            if size <= 64 * _BLOCK:
                while piece := f.read(_BLOCK):
                    h.update(piece)
            else:
                for i in range(16):
                    f.seek((size - _BLOCK) * i // 15)
                    h.update(f.read(_BLOCK))
    return h.hexdigest()[:16]


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "/" not in name or (os.sep != "/" and os.sep in name)


def _nearest(name: str) -> str:
    parent = Path(name).expanduser().parent
    there = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(Path(name).name, [*there, "fiddle"], 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _hint(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "; it is an adapter: name it as the run or adapter, and its base as the model"
    return ""


def _fetch(model: Model, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    name = model.id + (f" at revision {model.revision}" if model.revision else "")
    patterns = _FILES if weights else [p for p in _FILES if "safetensors" not in p]
    if model.trust_remote_code:
        patterns = [*patterns, "*.py"]
    try:
        return Path(snapshot_download(model.id, revision=model.revision, allow_patterns=patterns, local_files_only=model.offline))
    except GatedRepoError:
        raise LuthierError(f"model.id: {name} is gated: accept its terms on its Hub page, then log in with `hf auth login`") from None
    except RevisionNotFoundError:
        raise LuthierError(f"model.revision: {model.id} has no revision {model.revision!r}") from None
    except RepositoryNotFoundError:
        raise LuthierError(f"model.id: the Hub has no model {model.id!r}, or it is private and you are not logged in (`hf auth login`)") from None
    except LocalEntryNotFoundError:
        why = "model.offline is on and it is not in the local cache" if model.offline else "the Hub cannot be reached and it is not in the local cache"
        raise LuthierError(f"model.id: {name} cannot be had: {why}; name a folder, or fiddle, which needs no network") from None
    except (HfHubHTTPError, OSError, ValueError) as e:
        raise LuthierError(f"model.id: {name} cannot be had from the Hub: {str(e).strip().splitlines()[0][:200]}; name a folder, or fiddle") from None
