"""The law of imports, section 4 of docs/design.md: imports point down."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import luthier

SRC = Path(luthier.__file__).parent

# Who may import whom, of ours: files at the top by name, rooms (folders) as a whole or one file of them. Everybody may import errors. From the floor up.
PLUGINS, RUN = {"settings.plugins"}, {"settings.run"}
LAW: dict[str, set[str]] = {
    "errors": set(),
    "amounts": set(),
    "atomic": set(),
    "heap": set(),
    "core": set(),
    "nn": set(),
    "settings": {"heap"},
    "importing": {"settings"},
    "hub": RUN,
    "log": {"core"},
    "data": {"atomic", "core", "nn"},
    "findings": {"data"},
    "modelling": {"core"} | PLUGINS,
    "deltas": {"core", "modelling", "nn"} | PLUGINS,
    "methods": {"core", "deltas", "modelling", "nn"} | PLUGINS,
    "objectives": {"core", "nn"} | PLUGINS,
    "tasks": {"core", "nn"} | PLUGINS,
    "speed": {"core", "modelling"},
    "optim": {"core", "modelling.shards", "nn"},
    "devices": {"amounts", "core", "heap", "modelling"},
    "place": {"core", "devices", "modelling"} | PLUGINS,
    "generating": {"core", "modelling", "nn"},
    "policy": {"core", "deltas", "devices", "generating", "modelling", "nn"},
    "counts": {"modelling", "policy"},
    "train": {"core", "devices", "nn", "optim", "policy"},
    "reading": {"core", "data", "modelling.context", "settings.mix"} | RUN,
    "measuring": {"core", "data", "nn", "objectives", "policy", "reading", "settings"},
    "crafting": {"core", "measuring", "policy"},
    "references": {"atomic", "core", "data", "measuring", "modelling", "policy"},
    "quantising": {"atomic", "core", "data", "heap", "measuring", "modelling", "nn", "policy", "reading"} | PLUGINS,
    "precision": {"core", "modelling", "nn", "quantising"},
    "saving": {"atomic", "core", "deltas", "devices", "modelling", "nn", "optim", "policy", "settings"},
    "remembered": {"core", "data", "measuring", "saving"} | PLUGINS,
    "voices": {"core", "modelling", "policy", "saving"},
    "build": {"core", "devices", "heap", "hub", "modelling", "policy", "quantising", "saving", "speed", "voices"} | PLUGINS | RUN,
    "opening": {"build", "core", "hub", "policy", "quantising", "remembered", "saving"} | PLUGINS | RUN,
    "checking": {"build", "core", "modelling", "nn", "optim", "policy", "train"} | PLUGINS,
    "report": {"amounts", "atomic", "core", "counts", "data", "modelling", "nn", "policy", "settings"},
    "forgetting": {
        "atomic",
        "core",
        "data",
        "deltas",
        "hub",
        "measuring",
        "modelling",
        "nn",
        "objectives",
        "policy",
        "reading",
        "references",
        "saving",
        "voices",
    }
    | PLUGINS
    | RUN,
    "planning": {
        "amounts",
        "atomic",
        "build",
        "core",
        "counts",
        "data",
        "devices",
        "generating",
        "measuring",
        "modelling",
        "nn",
        "optim",
        "policy",
        "reading",
        "report",
        "settings",
        "speed",
    },
    "feedback": {
        "core",
        "data",
        "forgetting",
        "generating",
        "hub",
        "measuring",
        "nn",
        "opening",
        "policy",
        "reading",
        "remembered",
        "saving",
        "voices",
    }
    | PLUGINS
    | RUN,
    "evaluating": {"core", "data", "feedback", "measuring", "nn", "opening", "policy", "reading", "saving", "settings"},
}
ANYTHING_BUT_CLI = {"running", "staging", "comparing", "__init__"}
AXES = ("methods", "objectives", "precision", "place", "tasks", "speed")
OPTIONAL = {"bitsandbytes", "sacrebleu", "rouge_score", "lm_eval", "tensorboard", "wandb", "trackio", "matplotlib", "vllm", "triton"}
KERNELS = SRC / "speed" / "triton_rows.py"  # written in triton, and itself imported inside a function
FOR_TESTS_ONLY = {"peft", "trl", "accelerate", "pytest"}


def files() -> list[Path]:
    return sorted(SRC.rglob("*.py"))


def top(path: Path) -> str:
    """The module or folder right below the package that a file belongs to."""
    return path.relative_to(SRC).with_suffix("").parts[0]


def room(name: str) -> str:
    """``planning`` of ``planning.memory``; a file at the top is its own."""
    return name.partition(".")[0]


def imports(tree: ast.AST, path: Path, *, at_load: bool = False) -> Iterator[tuple[str, bool]]:
    """(name, ours) of every import: of ours the file at the top, or the folder and the file in it (``planning.memory``); else the top-level package.
    ``at_load``: only what importing runs."""
    for node in loaded(tree) if at_load else ast.walk(tree):
        if isinstance(node, ast.Import):
            whole = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = ["luthier", *path.relative_to(SRC).parent.parts]
            base = here[: len(here) - node.level + 1] if node.level else []
            module = base + (node.module.split(".") if node.module else [])
            whole = [module] if len(module) > 2 or module[0] != "luthier" else [[*module, alias.name] for alias in node.names]
        else:
            continue
        for name in whole:
            ours = name[0] == "luthier"
            if not ours:
                yield name[0], False
            elif len(name) > 1:
                yield ".".join(name[1:3] if (SRC / name[1]).is_dir() else name[1:2]), True


def loaded(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that importing a file executes: no function bodies, nothing for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from loaded(node)


@cache
def parsed() -> list[tuple[Path, ast.Module]]:
    found = [(f, ast.parse(f.read_text(encoding="utf-8"))) for f in files()]
    assert len(found) >= 60, f"only {len(found)} files were parsed"
    return found


def test_imports_point_down():
    seen, wrong = set(), []
    for path, tree in parsed():
        where = top(path)
        seen.add(where)
        for name, ours in imports(tree, path):
            if not ours or room(name) in (where, "errors", "__version__"):
                continue
            if where in ("cli", "__main__") or (where in ANYTHING_BUT_CLI and room(name) != "cli"):
                continue
            assert where in LAW, f"{where} has no line in the law of tests/test_imports.py; say what it may import"
            if not {name, room(name)} & LAW[where]:
                wrong.append(f"{path.relative_to(SRC)} imports {name}")
    assert not wrong, "; ".join(wrong)
    stale = set(LAW) - seen
    assert not stale, f"the law speaks of {sorted(stale)}, which are gone"


def without_circles(graph: dict[str, set[str]]) -> set[str]:
    """What is left of a graph once everything that leads to no circle is taken away: nothing, where there is none."""
    left = dict(graph)
    while ready := [m for m, deps in left.items() if not deps & left.keys()]:
        for m in ready:
            del left[m]
    return set(left)


def test_the_law_itself_has_no_circle():
    left = without_circles({m: {room(d) for d in deps} for m, deps in LAW.items()})
    assert not left


def test_the_files_of_a_room_do_not_load_one_another_in_a_circle():
    graph: dict[str, set[str]] = {}
    for path, tree in parsed():
        if len(path.relative_to(SRC).parts) == 2 and path.stem != "__init__":
            graph[f"{top(path)}.{path.stem}"] = {n for n, ours in imports(tree, path, at_load=True) if ours and room(n) == top(path)}
    assert len(graph) >= 100
    # config reads run, and run marks its fields with plugins' words and completes itself through config
    graph["settings.config"] -= {"settings.run"}
    assert not without_circles(graph)


def test_plug_in_folders_do_not_import_one_another():
    pairs = 0
    for path, tree in parsed():
        if top(path) in AXES:
            for name, ours in imports(tree, path):
                pairs += ours
                assert not (ours and room(name) in AXES and room(name) != top(path)), f"{path.relative_to(SRC)} imports {name}"
    assert pairs >= 10


def test_nn_is_pure_mathematics():
    found = [(path, name) for path, tree in parsed() if top(path) == "nn" for name, _ in imports(tree, path)]
    assert found
    assert not [f for f in found if room(f[1]) not in sys.stdlib_module_names | {"torch", "numpy", "nn"}]


def test_optional_packages_are_imported_inside_functions_and_the_peers_not_at_all():
    for path, tree in parsed():
        assert not {n for n, _ in imports(tree, path, at_load=True)} & OPTIONAL or path == KERNELS, path
        assert not any(isinstance(node, ast.ImportFrom) and KERNELS.stem in {a.name for a in node.names} for node in loaded(tree)), path
        assert not {n for n, _ in imports(tree, path)} & FOR_TESTS_ONLY, path


def test_settings_and_verbs_load_without_torch():
    light = {"heap", "settings", "importing", "staging.stages", "amounts", "errors", "cli", "__init__", "__main__"}
    heavy, count = [], 0
    for path, tree in parsed():
        if {top(path), ".".join(path.relative_to(SRC).with_suffix("").parts[:2])} & light:
            count += 1
            for name, ours in imports(tree, path, at_load=True):
                bad = not {name, room(name)} & (light | {"__version__"}) if ours else name in ("torch", "transformers", "datasets", "numpy", "matplotlib")
                if bad:
                    heavy.append(f"{path.relative_to(SRC)} imports {name}")
    assert count >= 35
    assert not heavy, "; ".join(heavy)


def test_importing_luthier_and_asking_for_help_import_no_torch():
    code = "import sys, luthier.cli as c; c.main(['--help']); bad = {'torch', 'transformers', 'typer', 'yaml'} & {*sys.modules}; sys.exit(str(bad or '') or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "luthier VERB" in done.stdout
