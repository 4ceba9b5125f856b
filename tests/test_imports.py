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

# Who may import whom, of ours. Settings read without torch: errors to run. Everybody may import errors.
SETTINGS = {"names", "plugins", "runfile", "schema", "config", "mix", "run", "stages"}
BASICS = {"core", "nn", "anatomy", "packed"}
LAW: dict[str, set[str]] = {
    "errors": set(),
    "names": set(),
    "amounts": set(),
    "runfile": set(),
    "plugins": {"names"},
    "schema": {"plugins", "run"},
    "config": SETTINGS,
    "mix": {"plugins"},
    "run": {"config", "mix", "plugins"},
    "stages": SETTINGS,
    "importing": SETTINGS,
    "core": set(),
    "nn": set(),
    "families": set(),
    "shards": set(),
    "heap": set(),
    "packed": {"shards"},
    "bnb": {"nn"},
    "anatomy": {"core", "families", "packed", "shards", "site"},
    "atomic": set(),
    "log": {"core"},
    "hub": {"run"},
    "site": {"core"},
    "standin": BASICS | {"site"},
    "context": {"core", "plugins"},
    "across": {"context", "core", "site"},
    "attention": BASICS | {"across", "context", "site"},
    "prompts": {"core", "plugins"},
    "sharing": {"core"},
    "trunkcache": {"anatomy", "core", "site"},
    "layout": {"core", "anatomy", "site"},
    "outputs": {"core", "site"},
    "lowrank": {"core", "layout"},
    "wiring": {"core", "anatomy"},
    "adapterhub": {"core", "anatomy"},
    "deep": BASICS | {"attention", "layout", "prompts"},
    "cache": {"core", "site"},
    "lean": {"anatomy", "cache", "core", "site"},
    "prepacked": {"lean", "packed"},
    "decoding": BASICS | {"attention", "cache", "prepacked", "site"},
    "graph": {"decoding"},
    "sampling": set(),
    "generation": {"core", "decoding", "sampling"},
    "sharding": BASICS | {"amounts", "device", "heap", "shards"},
    "policy": BASICS | {"device", "sharding", "sharing", "site", "standin", "attention", "prompts", "decoding", "generation", "graph", "prepacked"},
    "vllm_engine": {"adapter", "core", "hub", "opening", "plugins", "policy", "run", "sampling"},
    "probe": BASICS | {"site", "attention"},
    "counts": BASICS | {"site", "policy"},
    "methods": BASICS | {"shards", "site", "standin", "attention", "plugins", "layout", "outputs", "lowrank", "prompts", "deep", "wiring", "adapterhub"},
    "speed": BASICS | {"across", "shards", "site", "attention"},
    "precision": BASICS | {"bnb", "site"},
    "launched": set(),
    "device": {"core"},
    "elastic": {"atomic", "checkpoint", "config", "core", "launched", "run"},
    "heartbeat": set(),
    "ranks": {"heartbeat", "launched"},
    "place": BASICS | {"context", "device", "launched", "plugins", "ranks", "sharding", "site"},
    "recompute": BASICS | {"site"},
    "objectives": {"core", "nn", "plugins"},
    "data": {"atomic", "core", "nn"},
    "tasks": {"core", "nn", "plugins"},
    "optim": {"core", "nn", "shards"},
    "train": {"core", "device", "nn", "optim", "policy"},
    "by_name": {"config", "core", "plugins", "runfile"},
    "marks": {"core", "nn"},
    "paired": {"core", "marks", "nn"},
    "rowloss": {"core", "evaluate", "marks", "measure", "nn", "policy"},
    "slices": {"core", "data", "marks", "names", "nn"},
    "confusion": {"marks", "nn"},
    "winning": {"adapter", "core", "data", "endpoint", "judging", "marks", "measure", "nn", "opening"},
    "evaluation": {
        "asking",
        "by_name",
        "core",
        "data",
        "evaluate",
        "marks",
        "measure",
        "opening",
        "plugins",
        "policy",
        "reading",
        "rewards",
        "rowloss",
        "slices",
    },
    "harness": {"core", "data", "evaluation", "marks", "measure", "names", "nn", "policy", "scoreboard"},
    "scoreboard": {"confusion", "evaluation", "marks", "paired", "slices", "winning"},
    "evaluate": {"core", "marks", "nn", "paired"},
    "vocabulary": {"core", "shards", "site"},
    "resharding": {"core", "shards"},
    "sharded_model": {"core", "sharding", "shards"},
    "adapter": {"core", "atomic", "config", "layout", "lowrank", "plugins", "policy", "sharded_model", "shards", "site", "vocabulary"},
    "checkpoint": {"core", "launched", "nn", "optim", "policy", "adapter", "atomic", "resharding", "shards"},
    "merging": {"anatomy", "core", "packed", "plugins", "policy", "site", "adapter"},
    "combining": {"core", "adapter", "atomic", "layout", "lowrank"},
    "codes": {"anatomy", "atomic", "core", "packed", "plugins"},
    "quantised": BASICS | {"codes", "heap"},
    "build": BASICS
    | {
        "adapter",
        "attention",
        "codes",
        "context",
        "hub",
        "launched",
        "plugins",
        "policy",
        "probe",
        "quantised",
        "recompute",
        "run",
        "sharding",
        "site",
        "speed",
        "vocabulary",
        "voices",
    },
    "checking": BASICS | {"build", "optim", "plugins", "policy", "site", "train"},
    "remembered": {"adapter", "core", "data", "measure", "plugins"},
    "opening": {"codes", "core", "hub", "plugins", "policy", "run", "adapter", "build", "remembered"},
    "measure": {"by_name", "by_source", "core", "data", "evaluate", "objectives", "plugins", "policy", "reading", "run"},
    "by_source": {"data", "evaluate", "reading", "run"},
    "calibrating": BASICS | {"data", "measure", "plugins", "policy", "quantised", "reading"},
    "crafting": {"core", "measure", "policy"},
    "reading": {"context", "core", "data", "mix", "run"},
    "kernels": {"across", "anatomy", "attention", "site"},
    "saved": {"anatomy", "core", "kernels", "packed"},
    "microbatch": {"core", "nn", "reading", "run"},
    "memory": {
        "anatomy",
        "build",
        "context",
        "core",
        "counts",
        "decoding",
        "measure",
        "microbatch",
        "optim",
        "packed",
        "prepacked",
        "policy",
        "recompute",
        "run",
        "saved",
        "site",
        "speed",
    },
    "pace": {"saved", "speed"},
    "gpus": {"names"},
    "gathers": {"saved"},
    "roofline": {"gathers", "gpus", "pace", "saved"},
    "scale": {
        "amounts",
        "context",
        "core",
        "gathers",
        "gpus",
        "memory",
        "microbatch",
        "packed",
        "policy",
        "roofline",
        "run",
        "saved",
        "sharding",
        "site",
    },
    "outlook": {"amounts", "gpus", "plugins", "run", "scale"},
    "forecast": {"core", "memory", "microbatch", "optim", "pace", "recompute", "run", "saved"},
    "fitting": {"amounts", "core", "memory", "plugins", "run"},
    "advising": {"amounts", "core", "fitting", "memory", "plugins", "run"},
    "headroom": {"context", "core", "data", "foresight", "microbatch", "optim", "policy", "run"},
    "foresight": {"amounts", "atomic", "build", "core", "data", "forecast", "memory", "reading", "report", "run"},
    "voices": {"anatomy", "core", "adapter", "policy", "vocabulary"},
    "rewards": {"adapter", "by_name", "core", "data", "evaluate", "measure", "opening", "plugins", "policy", "reading", "remembered", "voices"},
    "asking": {"core", "data", "marks", "policy", "reading", "rewards"},
    "rollouts": {"decoding", "core", "data", "evaluate", "nn", "policy", "replaying", "rewards", "run", "voices"},
    "replaying": {"atomic", "core", "data", "objectives", "policy", "reading", "references", "run"},
    "keeping": {"core", "data", "nn", "policy"},
    "l2sp": {"core", "lowrank", "plugins", "policy", "shards", "site"},
    "divergence": {"core", "nn", "policy", "references"},
    "retention": {"core", "data", "divergence", "evaluate", "measure", "objectives", "plugins", "policy", "reading", "references", "run"},
    "spectrum": {"adapter", "core", "hub", "lowrank", "nn", "run"},
    "alarms": {"evaluate", "measure", "nn", "run"},
    "difficulty": {"core", "data", "plugins", "policy", "references", "run"},
    "forgetting": {"core", "data", "evaluate", "keeping", "l2sp", "measure", "plugins", "policy", "replaying", "run", "voices"},
    "endpoint": set(),
    "judging": {"data", "endpoint", "evaluate", "nn"},
    "collecting": {"core", "data", "measure", "opening", "policy"},
    "references": {"core", "atomic", "data", "measure", "policy", "site"},
    "knowledge": {"core", "data", "measure", "nn", "plugins", "policy", "references"},
    "familiarity": {"core", "data", "evaluate", "measure", "nn", "plugins", "policy", "run"},
    "ledger": {"adapter", "atomic", "config", "data", "hub", "plugins", "run", "stages"},
    "rehearsal": {
        "adapter",
        "build",
        "core",
        "data",
        "difficulty",
        "forgetting",
        "hub",
        "microbatch",
        "plugins",
        "policy",
        "reading",
        "references",
        "rewards",
        "run",
        "stages",
        "vocabulary",
    },
    "staleness": {"ledger", "stages"},
    "findings": {"data"},
    "report": BASICS | {"amounts", "atomic", "config", "counts", "data", "plugins", "policy", "run", "runfile"},
    "overview": {"ledger", "measure", "progress", "report", "stages"},
    "progress": {"amounts", "anatomy", "core", "counts", "crafting", "data", "measure", "plugins", "report", "train", "session"},
}
ANYTHING_BUT_CLI = {"session", "relay", "comparing", "__init__"}
AXES = ("methods", "objectives", "precision", "place", "tasks", "speed")
OPTIONAL = {"bitsandbytes", "sacrebleu", "rouge_score", "lm_eval", "tensorboard", "wandb", "trackio", "matplotlib", "vllm", "triton"}
KERNELS = SRC / "speed" / "triton_rows.py"  # written in triton, and itself imported inside a function
FOR_TESTS_ONLY = {"peft", "trl", "accelerate", "pytest"}


def files() -> list[Path]:
    return sorted(SRC.rglob("*.py"))


def top(path: Path) -> str:
    """The module or folder right below the package that a file belongs to."""
    return path.relative_to(SRC).with_suffix("").parts[0]


def imports(tree: ast.AST, path: Path, *, at_load: bool = False) -> Iterator[tuple[str, bool]]:
    """(name, ours) of every import: of ours the name right below the package, else the top-level package. ``at_load``: only what importing runs."""
    for node in loaded(tree) if at_load else ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                yield (parts[1], True) if parts[0] == "luthier" and len(parts) > 1 else (parts[0], parts[0] == "luthier")
        elif isinstance(node, ast.ImportFrom):
            here = ["luthier", *path.relative_to(SRC).parent.parts]
            base = here[: len(here) - node.level + 1] if node.level else []
            whole = base + (node.module.split(".") if node.module else [])
            for name in [whole] if len(whole) > 1 or whole[0] != "luthier" else [[*whole, a.name] for a in node.names]:
                yield (name[1], True) if name[0] == "luthier" else (name[0], False)


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
            if not ours or name in (where, "errors", "__version__"):
                continue
            if where in ("cli", "__main__") or (where in ANYTHING_BUT_CLI and name != "cli"):
                continue
            assert where in LAW, f"{where} has no line in the law of tests/test_imports.py; say what it may import"
            if name not in LAW[where]:
                wrong.append(f"{path.relative_to(SRC)} imports {name}")
    assert not wrong, "; ".join(wrong)
    stale = set(LAW) - seen
    assert not stale, f"the law speaks of {sorted(stale)}, which are gone"


def test_the_law_itself_has_no_circle_but_the_one_of_settings():
    # config reads run, and run marks its fields with plugins' words and completes itself through config
    left = {m: {d for d in deps if not {m, d} <= SETTINGS} - {"session"} for m, deps in LAW.items()}
    while ready := [m for m, deps in left.items() if not deps & left.keys()]:
        for m in ready:
            del left[m]
    assert not left


def test_plug_in_folders_do_not_import_one_another():
    pairs = 0
    for path, tree in parsed():
        if top(path) in AXES:
            for name, ours in imports(tree, path):
                pairs += ours
                assert not (ours and name in AXES and name != top(path)), f"{path.relative_to(SRC)} imports {name}"
    assert pairs >= 10


def test_nn_is_pure_mathematics():
    found = [(path, name) for path, tree in parsed() if top(path) == "nn" for name, _ in imports(tree, path)]
    assert found
    assert not [f for f in found if f[1] not in sys.stdlib_module_names | {"torch", "numpy", "nn"}]


def test_optional_packages_are_imported_inside_functions_and_the_peers_not_at_all():
    for path, tree in parsed():
        assert not {n for n, _ in imports(tree, path, at_load=True)} & OPTIONAL or path == KERNELS, path
        assert not any(isinstance(node, ast.ImportFrom) and KERNELS.stem in {a.name for a in node.names} for node in loaded(tree)), path
        assert not {n for n, _ in imports(tree, path)} & FOR_TESTS_ONLY, path


def test_settings_and_verbs_load_without_torch():
    light = SETTINGS | {"amounts", "errors", "cli", "__init__", "__main__"}
    heavy, count = [], 0
    for path, tree in parsed():
        if top(path) in light:
            count += 1
            for name, ours in imports(tree, path, at_load=True):
                if (name not in light | {"__version__"}) if ours else name in ("torch", "transformers", "datasets", "numpy", "matplotlib"):
                    heavy.append(f"{path.relative_to(SRC)} imports {name}")
    assert count >= 12
    assert not heavy, "; ".join(heavy)


def test_importing_luthier_and_asking_for_help_import_no_torch():
    code = "import sys, luthier.cli as c; c.main(['--help']); bad = {'torch', 'transformers', 'typer', 'yaml'} & {*sys.modules}; sys.exit(str(bad or '') or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "luthier VERB" in done.stdout
