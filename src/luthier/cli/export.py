"""luthier export: a whole model for other programs: transformers' layout, or GGUF for llama.cpp."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

CONVERTER = "convert_hf_to_gguf.py"


def command(
    what: Annotated[Path, typer.Argument(help="An adapter's, a model's or a run's folder.")],
    output: Annotated[Path, typer.Option(help="A folder (hf) or a file (gguf).")],
    to: Annotated[Literal["hf", "gguf"], typer.Option(help="hf: a folder that AutoModelForCausalLM opens. gguf: a file for llama.cpp.")] = "hf",
    model: Annotated[str | None, typer.Option(help="The adapter's base, where it is not where the adapter says.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16: what the weights are rounded to.")] = "float32",
    llama_cpp: Annotated[Path | None, typer.Option(help="llama.cpp's folder; also read from LLAMA_CPP.")] = None,
) -> None:
    """Export: `luthier export runs/NAME --output model/`, or `--to gguf --output model.gguf` through llama.cpp's own converter."""
    from .merge import merged

    if to == "hf":
        merged(what, output, model, dtype)
        return
    folder = output.with_suffix("")
    folder = folder.with_name(folder.name + "-hf") if folder.exists() and not folder.is_dir() else folder
    merged(what, folder, model, dtype)
    converter = _converter(llama_cpp)
    call = [sys.executable, str(converter or CONVERTER), str(folder), "--outfile", str(output)]
    if converter is None:
        typer.echo(f"llama.cpp's {CONVERTER} was not found (looked in --llama-cpp, LLAMA_CPP and PATH). With it, this makes the file:")
        typer.echo("  " + shlex.join(call))
        raise typer.Exit(3)
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode or not output.is_file():
        from ..errors import LuthierError

        raise LuthierError(
            f"{converter} failed ({done.returncode}): {(done.stderr or done.stdout).strip().splitlines()[-1:]}; the merged model stays in {folder}"
        )
    typer.echo(f"wrote {output} ({output.stat().st_size:,} bytes) with {converter}")


def _converter(folder: Path | None) -> Path | None:
    places = [folder, Path(os.environ["LLAMA_CPP"]) if os.environ.get("LLAMA_CPP") else None]
    for place in places:
        if place is not None and (place / CONVERTER).is_file():
            return place / CONVERTER
    found = shutil.which(CONVERTER)
    return Path(found) if found else None
