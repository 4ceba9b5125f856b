"""``python -m benchmarks.planner``: what `luthier plan` predicts beside what runs take: live tensors, resident memory and seconds a step. Resumable.

Every run is a process of its own, trains a random model of a real shape for a few steps through the whole of a session, and is predicted in it before its first
step, as any run is. Needs an idle machine. ``--write`` puts the table into docs/results.md.

- *live*: bytes of all tensors at the worst moment of a training step. Measured by following every storage of a step on real tensors, from birth to release.
- *resident*: peak of the process above what it took after the imports.
- *step*: seconds of an optimizer step, the mean of those after the second.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import statistics
import sys
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .apart import ROOT, numbers_of

KEPT = ROOT / "benchmarks" / "results" / "planner"
PAGE = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- begin: benchmarks.planner -->", "<!-- end: benchmarks.planner -->"
STEPS, WARM = 7, 2
LIVE, UNDER, RESIDENT, TIME = 0.05, 0.02, 0.12, 0.20  # what the planner is meant to keep

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": 0,
}


def _llama(width: int, inner: int, blocks: int, heads: int, kv: int | None = None, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": blocks, "num_attention_heads": heads, "num_key_value_heads": kv or heads}
    return LLAMA | sizes | {"head_dim": width // heads} | more


SHAPES: dict[str, dict[str, Any]] = {
    "llama 110M": _llama(768, 2048, 12, 12),
    "llama 20M": _llama(384, 1024, 6, 6, 2, vocab_size=16000),
    "qwen2 160M": _llama(896, 2432, 14, 14, 2, model_type="qwen2", architectures=["Qwen2ForCausalLM"]),
    "llama 360M": _llama(1024, 2816, 24, 16, 4),
    "gpt2 124M": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 50257,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}


@dataclass(frozen=True)
class Case:
    """One run."""

    shape: str
    method: Any = "lora"
    precision: str = "bfloat16"
    objective: Any = "text"
    recompute: str = "none"
    micro_tokens: int = 2048
    max_tokens: int = 512
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As the table has it."""
        how = self.method if isinstance(self.method, str) else " ".join(str(v) for v in self.method.values() if not isinstance(v, list))
        goal = self.objective if isinstance(self.objective, str) else self.objective["kind"]
        again = ", recomputed" if self.recompute == "blocks" else ""
        return f"{self.shape}, {how}, {self.precision}, {goal}{again}, {self.micro_tokens:,} tokens in rows of {self.max_tokens}"


ALL = {"kind": "lora", "rank": 16, "targets": ["all"]}
CASES = [
    Case("fiddle", ALL, micro_tokens=8192, max_tokens=128),
    Case("fiddle", "full", micro_tokens=4096, max_tokens=256),
    Case("fiddle", "adapter", precision="float32", micro_tokens=4096, max_tokens=256),
    Case("fiddle", "prefix", micro_tokens=4096, max_tokens=256),
    Case("llama 20M", "ia3", micro_tokens=4096),
    Case("llama 20M", "full", precision="float32"),
    Case("llama 20M", ALL, recompute="blocks", micro_tokens=8192),
    Case("llama 20M", "dora", micro_tokens=2048),
    Case("llama 20M", "lora", objective="dpo"),
    Case("llama 20M", "prompt", precision="int8"),
    Case("llama 110M"),
    Case("llama 110M", ALL),
    Case("llama 110M", ALL, recompute="blocks"),
    Case("llama 110M", ALL, max_tokens=2048),
    Case("llama 110M", ALL, max_tokens=128),
    Case("llama 110M", "full"),
    Case("llama 110M", "full", precision="float32", micro_tokens=1024),
    Case("llama 110M", "full", recompute="blocks", micro_tokens=4096),
    Case("llama 110M", "adapter"),
    Case("llama 110M", "prefix"),
    Case("llama 110M", "dora", micro_tokens=1024),
    Case("llama 110M", {"kind": "partial", "last_blocks": 3}),
    Case("llama 110M", ALL, precision="nf4"),
    Case("llama 110M", ALL, precision="nf4", recompute="blocks", micro_tokens=4096),
    Case("llama 110M", ALL, precision="int8"),
    Case("llama 110M", ALL, precision="float32", micro_tokens=1024),
    Case("qwen2 160M", ALL),
    Case("qwen2 160M", "adapter", precision="nf4"),
    Case("gpt2 124M", "lora"),
    Case("gpt2 124M", "full", recompute="blocks"),
    Case("llama 360M", ALL, precision="nf4", micro_tokens=1024),
    Case("llama 360M", "lora", recompute="blocks", micro_tokens=1024),
]


# --- one run ----------------------------------------------------------------------------------------------------------


def base(shape: str, folder: Path) -> str:
    """The model: fiddle, or a folder that holds a configuration and fiddle's tokenizer."""
    from luthier.hub import FIDDLE

    if shape == "fiddle":
        return "fiddle"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPES[shape]))
    for file in [*FIDDLE.glob("tokenizer*"), *FIDDLE.glob("chat_template*")]:
        shutil.copy(file, folder)
    return str(folder)


def data(case: Case, home: Path) -> Path:
    """Rows that are as long as may be."""
    rng = random.Random(0)
    words = ["river", "stone", "quiet", "music", "window", "garden", "letter", "winter", "little", "people"]
    said = lambda n: " ".join(rng.choices(words, k=n))  # noqa: E731
    if case.objective == "text":
        (home / "text.txt").write_text("\n\n".join(said(4 * case.max_tokens) for _ in range(60)))
        return home / "text.txt"
    with (home / "rows.jsonl").open("w") as f:
        for _ in range(200):
            f.write(json.dumps({"prompt": said(20), "chosen": said(2 * case.max_tokens), "rejected": said(2 * case.max_tokens)}) + "\n")
    return home / "rows.jsonl"


def settings(case: Case, home: Path) -> dict[str, Any]:
    """The run as a run file has it."""
    return {
        "model": {"id": base(case.shape, home / "base"), "random": case.shape != "fiddle"},
        "data": {"train": str(data(case, home)), "max_tokens": case.max_tokens, "validation_rows": 2, "cache": "no"},
        "method": case.method,
        "objective": case.objective,
        "precision": case.precision,
        "recompute": case.recompute,
        "optim": {"steps": STEPS, "batch_tokens": case.micro_tokens, "micro_tokens": case.micro_tokens, "lr": 1e-5},
        "evaluate": {"samples": 0, "forgetting": False, "best": False, "every_steps": STEPS},
        "place": {"memory": "off"},
        "out": str(home),
        "name": "run",
    } | case.more


def one(case: Case) -> dict[str, Any]:
    """Predict and measure in this process."""
    from luthier.planning import foresight
    from luthier.planning.memory import resident
    from luthier.running import session, starting  # the imports are what the baseline holds
    from luthier.running.progress import Reporter
    from luthier.settings.config import load_run

    session.is_long = lambda *how: True
    seen: list[foresight.Foresight] = []
    own = session.foresee
    session.foresee = lambda *a, **k: seen.append(own(*a, **k)) or seen[0]  # type: ignore[func-returns-value]
    with tempfile.TemporaryDirectory() as folder:
        run = load_run(settings(case, Path(folder)))
        start = resident()
        result = starting.execute(run, reporter=Reporter(quiet=True))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
        took = [x["seconds"] for x in lines if x["event"] == "train"][WARM:]
        found = seen[0]
        assert found.memory is not None and found.time is not None, found.why
        m = found.memory
        standing = sum(n for k, n in m.standing.items() if k not in ("program", "allocator"))
        predicted = {
            "live": standing + m.moments["training"].bytes,
            "resident": sum(m.standing.values()) + m.moments[m.worst].bytes - start,
            "step": found.time.step,
        }
        measured = {"live": live(case, Path(folder) / "again"), "resident": peak - start, "step": statistics.mean(took)}
    return {
        "case": case.name,
        "parameters": result.total,
        "trained": result.trained,
        "predicted": predicted,
        "measured": measured,
        "steps": took,
        "small": m.moments[m.worst].small,
    }


def live(case: Case, home: Path) -> int:
    """Bytes of all tensors at the worst moment of a training step, every storage followed on real tensors."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from luthier import build
    from luthier.optim import Optimizer
    from luthier.reading import batches_of, form_of, read_data
    from luthier.settings.config import load_run
    from luthier.train import train

    class Following(TorchDispatchMode):
        def __init__(self, before: int) -> None:
            super().__init__()
            self.alive: dict[int, int] = {}
            self.now = self.peak = before

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor):
                    self.born(t.untyped_storage())
            return out

        def born(self, storage: Any) -> None:
            key, size = storage._cdata, storage.nbytes()
            if key in self.alive or key in known:
                return
            self.alive[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.died, key)

        def died(self, key: int) -> None:
            self.now -= self.alive.pop(key, 0)

    home.mkdir()
    run, _ = build.resolve(load_run(settings(case, home)))
    build.seed_everything(0)
    model = build.load(run.model, precision=run.precision, device=run.place.device, trains_base=run.method.edits == "weights")
    prepared = read_data(run, model.tokenizer, positions=2048, say=lambda _: None, form=form_of(model))
    policy, objective = build.assemble(run, model)
    optimizer = Optimizer(policy.trained(), lr=1e-5)
    feed = batches_of(run, prepared, objective, pad=0, packed=model.packs)
    loop = train(policy, objective, feed, optimizer, lr=lambda step: 1e-5, steps=3, place=run.place)
    next(loop)  # the moments are there from now on
    tensors = list(_all(policy, optimizer))
    known = {t.untyped_storage()._cdata for t in tensors}
    size = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    with Following(size) as following:
        next(loop)
    return following.peak


def _all(policy: Any, optimizer: Any) -> Iterator[Any]:
    """What is there between two steps."""
    from luthier.modelling.packed import packed

    yield from policy.parameters()
    yield from policy.buffers()
    yield from policy.trained().values()
    for _, linear in packed(policy.lm):
        yield from linear.stored().values()
        if linear.resident is not None:
            yield linear.resident
    for g in optimizer.groups:
        yield from (g.master, g.grad)
    for state in optimizer.adam.state.values():
        yield from (t for k, t in state.items() if k != "step")


# --- all of them ------------------------------------------------------------------------------------------------------


def rows() -> list[dict[str, Any]]:
    """What has been measured, in the order of the cases."""
    return [json.loads(f.read_text()) for case in CASES if (f := _file(case)).is_file()]


def _file(case: Case) -> Path:
    return KEPT / ("".join(c if c.isalnum() else "-" for c in case.name) + ".json")


def errors(row: dict[str, Any]) -> dict[str, float]:
    """Predicted by measured, less one."""
    return {k: row["predicted"][k] / row["measured"][k] - 1 for k in ("live", "resident", "step")}


def kept(name: str, error: float) -> bool:
    """Whether an error is within what the planner is meant to keep."""
    return {"live": -UNDER <= error <= LIVE, "resident": abs(error) <= RESIDENT, "step": abs(error) <= TIME}[name]


def table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| run | live, GB | error | resident, GB | error | seconds a step | error |", "|---|---|---|---|---|---|---|"]
    for row in found:
        e, m = errors(row), row["measured"]
        said = {k: f"{v:+.1%}" if kept(k, v) else f"**{v:+.1%}**" for k, v in e.items()}
        lines.append(
            f"| {row['case']} | {m['live'] / 1e9:.3f} | {said['live']} | {m['resident'] / 1e9:.2f} | {said['resident']} | {m['step']:.3g} | {said['step']} |"
        )
    goals = {"live": f"within {LIVE:.0%} and not under by more than {UNDER:.0%}", "resident": f"within {RESIDENT:.0%}", "step": f"within {TIME:.0%}"}
    summary = []
    for name, goal in goals.items():
        all_of = [errors(r)[name] for r in found]
        held = sum(kept(name, v) for v in all_of)
        summary.append(f"{name} {goal}: {held} of {len(found)} (median {statistics.median(all_of):+.1%}, from {min(all_of):+.1%} to {max(all_of):+.1%})")
    large = sum(r["parameters"] >= 100e6 for r in found)
    dates = sorted({r["date"] for r in found})
    return "\n".join(
        [
            *lines,
            "",
            f"{len(found)} runs, {large} of them of 100 M parameters or more, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}. " + "; ".join(summary) + ".",
        ]
    )


def write() -> None:
    """Put the table into docs/results.md."""
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(rows())}\n\n{END}{rest.split(END)[1]}")
    print(f"written: {PAGE}")


def again(case: Case) -> None:
    """Predict the memory of a run that has been measured once more."""
    import torch

    from luthier.planning.foresight import as_long
    from luthier.planning.memory import Plan
    from luthier.settings.config import load_run

    row = json.loads(_file(case).read_text())
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(as_long(load_run(settings(case, Path(folder))), case.max_tokens))
        m = plan.predict(plan.run, "cpu", program=0).here(torch.device("cpu"))
    row["predicted"]["resident"] = m.total
    _file(case).write_text(json.dumps(row, indent=1) + "\n")


def main() -> None:
    """Run what has no numbers yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="TEXT", help="runs whose name contains this, measured again")
    parser.add_argument("--threads", type=int, default=2, help="of each run (default 2)")
    parser.add_argument("--write", action="store_true", help="only write the table from the runs there are")
    parser.add_argument("--again", action="store_true", help="only predict memory again, beside what was measured, and write the table")
    parser.add_argument("--one", metavar="JSON", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one is not None:
        print(json.dumps(one(next(c for c in CASES if c.name == json.loads(a.one)["name"]))))
        return
    KEPT.mkdir(parents=True, exist_ok=True)
    for case in (c for c in CASES if a.again and _file(c).is_file()):
        again(case)
    for case in CASES if not (a.write or a.again) else ():
        if (a.only is not None and a.only not in case.name) or (a.only is None and _file(case).is_file()):
            continue
        row = numbers_of("benchmarks.planner", {"name": case.name}, case.name, a.threads)
        _file(case).write_text(json.dumps(row, indent=1) + "\n")
        print(f"{case.name}: " + ", ".join(f"{k} {v:+.1%}" for k, v in errors(row).items()), flush=True)
    write()


if __name__ == "__main__":
    sys.exit(main())
