"""The command line: one verb a file, imported only when it runs.

A verb's file defines ``command(...)``, annotated for typer, or ``app``, a typer application with verbs of its own. This file finds the verb and
turns whatever goes wrong into one sentence: 2 where the user can put it right, 1 where it is our fault, 130 on Ctrl-C.
"""

from __future__ import annotations

import gc
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..errors import Interrupted
from ..heap import loading

VERBS = {  # written here, so that --help imports nothing
    "demo": "Fine-tune the embedded model on a small task, and say what was gained: the whole program in three minutes.",
    "train": "Fine-tune a model, from a run file or straight from data.",
    "plan": "Predict what a run trains, how much memory it takes and how long, without weights.",
    "advise": "Say which method to use, why, what it would take, and write the run file for it.",
    "compare": "Compare methods on the same data, seeds and budget: one table with plots, and advice.",
    "eval": "Score a model or an adapter on tasks, beside its base.",
    "generate": "Answer prompts from the command line or a file.",
    "predict": "Label texts with a classifier, as JSON lines.",
    "chat": "Talk to a model in the terminal.",
    "merge": "Write an adapter into its base's weights, as a plain model folder.",
    "combine": "Combine several LoRA adapters of one base into one, by weights.",
    "quantize": "Store a model in codes of a few bits: GPTQ, fitted to a text, or NF4 or int8.",
    "export": "Write an adapter in the layout of other programs.",
    "data": "Look at data before it is trained on: what the model sees, what is wrong, what it knows already; collect preferences.",
    "runs": "List the runs there are, show one, compare two, write a run's report again.",
    "import-config": "Translate a configuration of LLaMA-Factory, Axolotl or TRL into a run file.",
    "kinds": "List the methods, objectives, precisions, places and tasks there are.",
    "doctor": "Say whether this machine and its packages are fit, and how fast they are.",
}
WITH_SETTINGS = ("train", "plan", "advise", "compare")  # verbs that take key=value


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    if argv is None:  # the program, whose verbs are short or say when they are `heavy`: the garbage of a start is not worth looking for
        gc.disable()
    args = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("LUTHIER_DEBUG", "0") not in ("", "0") or "--debug" in args
    args = [a for a in args if a != "--debug"]
    try:
        return _dispatch(args)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except Interrupted as e:
        return _say(str(e), 130)
    except BrokenPipeError:  # luthier kinds | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as e:
        if debug:
            raise
        sentence = _explain(e)
        if sentence is not None:
            return _say(sentence, 2)
        return _say(f"unexpected {type(e).__name__}: {_first_line(e)}; the trace is in {_trace(args)}, please report it (--debug prints it)", 1)
    finally:
        if argv is None:
            gc.freeze()  # a process that ends looks once more through all there is, for a second


def verbs() -> dict[str, str]:
    """The verbs whose files stand here, with their sentences."""
    here = Path(__file__).parent
    return {v: s for v, s in VERBS.items() if (here / f"{_module(v)}.py").is_file() or (here / v).is_dir()}


def _module(verb: str) -> str:
    return verb.replace("-", "_")


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if args[0] in ("-V", "--version"):
        print(f"luthier {__version__}")
        return 0
    verb, *rest = args
    if verb not in verbs():
        _unknown(verb)
    return _run(verb, rest)


def _run(verb: str, args: list[str]) -> int:
    with loading():
        import typer
    module = import_module(f".{_module(verb)}", __name__)
    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer(add_completion=False)
        app.command(verb, context_settings={"help_option_names": ["-h", "--help"]})(module.command)
    try:
        # Not standalone: what goes wrong is explained by main, the same for all verbs. An integer is the exit code.
        code = typer.main.get_command(app).main(args=args, prog_name=f"luthier {verb}", standalone_mode=False)
    except typer.Abort:
        return _say("interrupted", 130)
    except Exception as e:
        if not isinstance(e, typer.BadParameter.__mro__[1]):  # typer's UsageError, which it exports by no name of its own
            raise
        return _say(_usage(verb, e), 2)
    if code == 130:
        return _say("interrupted", 130)
    return code if isinstance(code, int) else 0


def heavy(*modules: str) -> None:
    """Import these modules of ours, which bring torch and transformers; what a verb imports of them is there then.

    Python looks for garbage from here on, and not among what was loaded: every look through that takes a tenth of a second or more.
    """
    with loading():
        for module in modules:
            import_module(f"..{module}", __name__)
    if not gc.isenabled():  # the program
        gc.freeze()
        gc.enable()


def _help() -> str:
    table = "\n".join(f"  {verb:<15}{sentence}" for verb, sentence in verbs().items())
    return f"""luthier {__version__}: fine-tunes language models.

Usage: luthier VERB [ARGUMENTS]        luthier VERB --help says what a verb takes

{table}

  --version   Print the version.
  --debug     Show the whole trace of an error (or set LUTHIER_DEBUG=1).

  luthier demo                                            no data, no network: see it work
  luthier train my.jsonl --model Qwen/Qwen3-0.6B          from data to an adapter
  luthier train run.yaml method.rank=16 optim.lr=1e-4     a run file, with settings changed
  luthier train assistant.yaml                            a file with stages: several runs in order"""


# --- sentences ------------------------------------------------------------------------------------------------------


def _say(sentence: str, code: int) -> int:
    if _speaks(sentence, code):
        print(f"error: {sentence}" if code != 130 else sentence, file=sys.stderr, flush=True)
    return code


def _speaks(sentence: str, code: int) -> bool:
    """Whether it is this process that says it: of several that torchrun started the first to fail; that they were stopped, which all know, rank 0."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        return True
    if code == 130:
        return os.environ.get("RANK") == "0"
    from ..devices.ranks import first_to_say

    return first_to_say(sentence)


def _unknown(verb: str) -> NoReturn:
    from ..errors import ConfigError
    from ..settings.names import nearest

    guess = nearest(verb, verbs())
    if guess is None and ("=" in verb or Path(verb).exists() or Path(verb).suffix):
        raise ConfigError(f"{verb!r} is not a verb; did you mean: luthier train {verb}")
    raise ConfigError(f"{verb!r} is not a verb; " + (f"did you mean: luthier {guess}" if guess else f"there are {', '.join(verbs())}"))


def _usage(verb: str, e: Any) -> str:
    """One sentence for an option or argument that cannot be read, with the nearest option there is."""
    from ..settings.names import nearest

    asked, full = getattr(e, "option_name", None), e.ctx.command_path.removeprefix("luthier ") if e.ctx is not None else verb  # with the verb of a verb
    if asked is None or not e.format_message().startswith("No such option"):
        message = e.format_message().rstrip(".")
        return f"luthier {full}: {message[:1].lower()}{message[1:]} (luthier {full} --help says what it takes)"
    options = [o for p in e.ctx.command.params for o in p.opts if o.startswith("--")]
    setting = _setting(asked.lstrip("-")) if verb in WITH_SETTINGS else None
    guess = nearest(asked, options, 0.75)
    if setting is not None and (guess is None or "." in asked):
        return f"luthier {verb}: no option {asked}; settings are written without dashes: {setting}=VALUE"
    guess = guess or nearest(asked, options)
    return f"luthier {full}: no option {asked}; " + (f"did you mean {guess}?" if guess else f"there are {', '.join([*options, '--help'])}")


def _setting(name: str) -> str | None:
    """The key path of a setting that was written as an option."""
    from ..settings.names import foreign
    from ..settings.plugins import hints, unwrap
    from ..settings.run import Run

    if "." in name:
        return name
    sections = {s: unwrap(h)[0] for s, h in hints(Run).items()}
    inside = [f"{s}.{name.replace('-', '_')}" for s, cls in sections.items() if name.replace("-", "_") in getattr(cls, "__dataclass_fields__", ())]
    return name if name in sections else inside[0] if inside else foreign(name)


def _explain(e: Exception) -> str | None:
    """The sentence for what the user can put right; None for the rest."""
    from ..errors import LuthierError

    if isinstance(e, LuthierError):
        return str(e)
    if isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError":
        return "out of memory; lower optim.micro_tokens or data.max_tokens (results stay the same with the first), or set recompute=blocks"
    if isinstance(e, OSError) and e.strerror is not None and (e.filename is not None or e.errno in _DISK):
        where = "a file of the run" if e.filename is None else e.filename
        return (
            f"{where}: cannot be written: {e.strerror.lower()}; free space; a run goes on with --resume FOLDER"
            if e.errno in _DISK
            else f"{where}: {e.strerror.lower()}"
        )
    return None


_DISK = (28, 122, 30)  # no space left, quota exceeded, read-only file system


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or ["(no message)"])[0][:300]


def _trace(args: list[str]) -> str:
    import platform
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile("w", prefix="luthier-error-", suffix=".txt", delete=False, encoding="utf-8") as f:
        f.write(f"luthier {__version__}, python {platform.python_version()}, {platform.platform()}\nluthier {' '.join(args)}\n\n{traceback.format_exc()}")
    return f.name
