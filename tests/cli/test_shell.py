"""The command line's shell: verbs are found without being imported, and whatever goes wrong is one sentence."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from luthier import __version__, cli
from luthier.errors import Incompatible, LuthierError
from luthier.settings.plugins import AXES, kinds


def said(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = cli.main(list(args))
    out = capsys.readouterr()
    assert "Traceback" not in out.out + out.err
    return code, out.out, out.err


@pytest.fixture
def verb(monkeypatch):
    """Makes `luthier kinds` do something else."""
    from luthier.cli import kinds as module

    def become(error: BaseException) -> None:
        def command() -> None:
            """Fail."""
            raise error

        monkeypatch.setattr(module, "command", command)

    return become


def test_help_lists_every_verb_that_has_a_file_with_its_sentence(capsys):
    code, out, _ = said(capsys, "--help")
    assert code == 0
    assert len(cli.verbs()) >= 8
    for name, sentence in cli.verbs().items():
        assert f"  {name:<15}{sentence}\n" in out
    there = Path(cli.__file__).parent.glob("[!_]*")
    files = {p.stem.replace("_", "-") for p in there if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert files == set(cli.verbs()), "a verb's file without a line in cli.VERBS, or the other way round"
    assert said(capsys)[1] == said(capsys, "-h")[1] == out


def test_help_answers_at_once():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "luthier", "--help"], check=True, capture_output=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # processor time: the clock on the wall depends on who else is at work
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.4


def test_the_version_is_said(capsys):
    assert said(capsys, "--version") == (0, f"luthier {__version__}\n", "")


@pytest.mark.parametrize("name", list(cli.verbs()))
def test_every_verb_explains_itself(capsys, name):
    code, out, _ = said(capsys, name, "--help")
    assert code == 0 and f"luthier {name}" in out and "--help" in out


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["trian"], "'trian' is not a verb; did you mean: luthier train"),
        (["run.yaml"], "'run.yaml' is not a verb; did you mean: luthier train run.yaml"),
        (["qqq"], "'qqq' is not a verb; there are demo, train, "),
        (["kinds", "--jsn"], "luthier kinds: no option --jsn; did you mean --json?"),
        (["kinds", "--zzzzz"], "luthier kinds: no option --zzzzz; there are --json, --schema, --check, --help"),
        (["train", "--lr", "1"], "luthier train: no option --lr; settings are written without dashes: optim.lr=VALUE"),
        (["train", "--method.rank", "1"], "luthier train: no option --method.rank; settings are written without dashes: method.rank=VALUE"),
        (["train", "--learning-rate", "1"], "luthier train: no option --learning-rate; settings are written without dashes: optim.lr=VALUE"),
        (["kinds", "a", "b"], "luthier kinds: got unexpected extra argument"),
        (["kinds", "methd"], "no axis is called 'methd'; did you mean methods?"),
        (["kinds", "xyz"], "no axis is called 'xyz'; there are methods, objectives, precision, place, tasks"),
        (["kinds", "methods", "--schema"], "--schema is about a whole run; give it alone"),
        (["train", "nosuch.yaml"], "nosuch.yaml: no such run file"),
        (["train", "x.jsonl", "method.rnk=3"], "method.rnk=3: method lora has no such key; did you mean method.rank?"),
    ],
)
def test_what_the_user_can_put_right_is_one_sentence_and_code_2(capsys, args, sentence):
    code, out, err = said(capsys, *args)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {sentence}") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (LuthierError("x: wrong"), "x: wrong"),
        (Incompatible("these two"), "these two"),
        (FileNotFoundError(2, "No such file or directory", "a.jsonl"), "a.jsonl: no such file or directory"),
        (PermissionError(13, "Permission denied", "runs"), "runs: permission denied"),
        (OSError(28, "No space left on device"), "a file of the run: cannot be written: no space left on device"),
        (MemoryError(), "out of memory; lower optim.micro_tokens"),
    ],
)
def test_errors_of_the_world_are_one_sentence_and_code_2(capsys, verb, error, sentence):
    verb(error)
    code, _, err = said(capsys, "kinds")
    assert code == 2 and err.startswith(f"error: {sentence}") and err.count("\n") == 1


def test_an_unexpected_error_says_where_its_trace_is_and_is_code_1(capsys, verb):
    verb(ZeroDivisionError("by zero\nmore"))
    code, _, err = said(capsys, "kinds")
    assert code == 1 and err.startswith("error: unexpected ZeroDivisionError: by zero; the trace is in ") and err.count("\n") == 1
    trace = Path(re.search(r"the trace is in (\S+),", err).group(1))  # type: ignore[union-attr]
    assert "Traceback" in trace.read_text() and "luthier kinds" in trace.read_text()
    trace.unlink()


def test_debug_shows_the_trace(verb, monkeypatch):
    verb(LuthierError("x"))
    with pytest.raises(LuthierError):
        cli.main(["kinds", "--debug"])
    monkeypatch.setenv("LUTHIER_DEBUG", "1")
    with pytest.raises(LuthierError):
        cli.main(["kinds"])


def test_ctrl_c_is_130_without_a_trace(capsys, verb):
    verb(KeyboardInterrupt())
    assert said(capsys, "kinds") == (130, "", "interrupted\n")


def test_a_pipe_that_closes_is_no_error():
    done = subprocess.run(f"{sys.executable} -m luthier kinds | head -c 1", shell=True, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


def test_python_m_luthier_gives_the_exit_code_on():
    done = subprocess.run([sys.executable, "-m", "luthier", "trian"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: 'trian'")


def test_kinds_lists_every_file_of_every_axis_without_importing_any(capsys):
    _, out, _ = said(capsys, "kinds")
    for axis in AXES:
        for kind in kinds(axis):
            assert re.search(rf"^  {kind} +\S", out, re.M)
    one = json.loads(said(capsys, "kinds", "method", "--json")[1])
    assert list(one) == ["methods"] and one["methods"]["lora"].startswith("LoRA")
    code = "import sys, luthier.cli; luthier.cli.main(['kinds']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_kinds_prints_the_schema_of_a_run(capsys):
    schema = json.loads(said(capsys, "kinds", "--schema")[1])
    assert {"model", "data", "method", "optim"} <= set(schema["properties"])


def test_doctor_finds_nothing_needed_broken_but_what_is(monkeypatch, capsys):
    from luthier.cli import doctor

    monkeypatch.setattr(doctor, "NEEDED", ("torch", "yaml", "nosuchpackage"))
    monkeypatch.setattr(doctor, "base", lambda: doctor.Finding("ok", "fiddle", ""))
    code, out, _ = said(capsys, "doctor")
    assert code == 1 and "bad   nosuchpackage    does not import: ModuleNotFoundError" in out and "\n1 of what luthier needs is broken" in out
    monkeypatch.setattr(doctor, "NEEDED", ("torch", "yaml"))
    code, out, _ = said(capsys, "doctor")
    assert code == 0 and re.search(r"float32 [\d,]+ GFLOP/s, bfloat16 [\d,]+ GFLOP/s", out)
    for line in ("python", "memory", "disk", "compiler", "hub cache", "cpu"):
        assert re.search(rf"^(ok|warn) +{line}", out, re.M), line


def test_doctor_refuses_a_version_outside_the_range():
    from luthier.cli import doctor

    assert doctor.package("yaml", {"pyyaml": ">=99"}).state == "bad"
    assert doctor.package("yaml", {"pyyaml": ">=5"}).state == "ok"
    assert doctor.optional("nosuch", "quant").text == "not installed; optional: pip install 'luthier[quant]'"


def test_a_matrix_product_is_measured_in_operations_per_second():
    import torch

    from luthier.cli.doctor import gemm

    assert 1e8 < gemm(torch.float32, torch.device("cpu"), size=256, seconds=0.02) < 1e14


def test_every_verb_that_brings_torch_says_that_it_is_heavy():
    folder = Path(cli.__file__).parent
    light = {str(p.relative_to(folder)) for p in folder.rglob("[!_]*.py") if not re.search(r"^ +heavy\(", p.read_text(), re.M)}
    assert light == {
        "doctor.py",
        "export.py",  # merge's
        "import_config.py",
        "data/cache.py",
        "runs/diff.py",
        "runs/finding.py",
        "runs/listing.py",
        "runs/show.py",
    }


def test_the_program_looks_for_garbage_once_it_is_loaded_and_a_caller_s_process_always():
    code = "import gc, sys, luthier.cli as c; gc.disable(); c.heavy('core'); assert gc.isenabled() and gc.get_freeze_count() > 1000"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    code = "import gc, luthier.cli as c; c.main(['kinds']); c.heavy('core'); assert gc.isenabled() and not gc.get_freeze_count()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, stdout=subprocess.DEVNULL)


def test_public_names_are_what_they_say_in_whatever_order_they_are_imported():
    code = "import luthier.running.session, luthier; assert callable(luthier.train) and luthier.Run(method='lora').method.rank == 8; luthier.nosuch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ})
    assert "module 'luthier' has no attribute 'nosuch'; it has Batch, Loss, Policy, Run, " in done.stderr
