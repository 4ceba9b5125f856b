"""``python -m benchmarks.scale [--write]``: what Llama 3's shapes take of 1, 8, 64 and 1,024 GPUs, by the planner (luthier plan --ranks). Nothing is run.

``--write``: docs/scale.md between its marks. Some minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luthier.amounts import seconds, size
from luthier.planning.gpus import Mesh, gpu
from luthier.planning.scale import Outlook, Scale, layouts
from luthier.settings.run import Run

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scale.md"
BEGIN, END = "<!-- begin: benchmarks.scale -->", "<!-- end: benchmarks.scale -->"
# Grattafiori et al. (Dubey et al.), 2024, arXiv 2407.21783, table 3: width, layers, heads, heads of keys and values, width of the feed-forward
SHAPES = {"8B": (4096, 32, 32, 8, 14336), "70B": (8192, 80, 64, 8, 28672), "405B": (16384, 126, 128, 8, 53248)}
MESHES = (Mesh(1), Mesh(8), Mesh(64, 8), Mesh(1024, 128))
METHODS: dict[str, Any] = {"LoRA": {"kind": "lora", "rank": 16, "targets": ["all"]}, "full": "full"}
TOKENS = 8192  # of a rank in a step
GPU = "h100"


def folder_of(root: Path, name: str) -> str:
    """A folder with a configuration alone."""
    hidden, layers, heads, kv, ff = SHAPES[name]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": ff,
        "head_dim": hidden // heads,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    }
    (root / name).mkdir(exist_ok=True)
    (root / name / "config.json").write_text(json.dumps(config))
    return str(root / name)


def run_of(root: Path, name: str, method: str, mesh: Mesh, *, tokens: int = TOKENS, longest: int = 2048, **place: Any) -> Run:
    """So many tokens of every rank, in one micro-batch; blocks are recomputed."""
    return Run(
        model=folder_of(root, name),
        data={"max_tokens": min(longest, tokens)},
        method=METHODS[method],
        objective="sft",
        precision="bfloat16",
        recompute="blocks",
        place={"kind": "fsdp", "on": "cpu", **place},
        optim={"micro_tokens": tokens, "batch_tokens": tokens * mesh.ranks // place.get("context", 1)},
    )


def waiting(o: Outlook) -> float:
    """Share of a step in which a rank does not compute."""
    return (o.step - o.seconds["computing"] - o.seconds["updating"]) / o.step


class Scales:
    """What is counted of a shape and a method, once."""

    def __init__(self, root: Path):
        self.root, self.made = root, dict[tuple[str, str], Scale]()

    def of(self, name: str, method: str) -> Scale:
        """Of this shape and method."""
        if (name, method) not in self.made:
            self.made[name, method] = Scale(run_of(self.root, name, method, MESHES[0]), gpu(GPU))
        return self.made[name, method]


def tables(scales: Scales) -> Iterator[str]:
    """All of them, as Markdown."""
    room = gpu(GPU).memory * 1e9
    for name in SHAPES:
        for method in METHODS:
            scale = scales.of(name, method)
            share = f"{scale.plan.trained / 1e6:,.0f} M of {scale.plan.whole / 1e9:,.1f} G parameters train"
            yield f"\n#### {name}, {'every weight' if method == 'full' else method} ({share})\n"
            yield "| GPUs | `place.shard` | a rank holds | fits 80 GB | handed over in a step | a step | of it waiting | tokens/s a GPU |"
            yield "|--:|---|--:|---|--:|--:|--:|--:|"
            for mesh in MESHES:
                chosen = scale.auto(mesh, room).shard
                for layout in layouts(mesh):
                    o = scale.outlook(run_of(scales.root, name, method, mesh), mesh, layout)
                    fits, mark = "yes" if o.total <= room else "no", " (auto)" if layout.shard == chosen and mesh.ranks > 1 else ""
                    cells = (size(o.total), fits, size(sum(o.traffic.values())), seconds(o.step), f"{waiting(o):.1%}", f"{o.tokens / o.step / mesh.ranks:,.0f}")
                    yield f"| {mesh.ranks:,} | {layout.shard}{mark} | {' | '.join(cells)} |"


SIZES = (1024, 4096, 8192)
MOST = 0.1


def least_tokens(scales: Scales) -> Iterator[str]:
    """From how many tokens of a rank on sharding over all ranks costs less than a tenth of a step."""
    yield "| | method | " + " | ".join(f"{m.ranks:,} GPUs" for m in MESHES[1:]) + " | 1,024 GPUs, a quarter of the network |"
    yield "|---|---|" + "--:|" * len(MESHES)
    for name in SHAPES:
        for method in METHODS:
            scale, cells = scales.of(name, method), []
            for mesh, kind in [*((m, GPU) for m in MESHES[1:]), (MESHES[-1], GPU + ",network=12.5")]:
                scale.gpu = gpu(kind)
                full = layouts(mesh)[-1]
                enough = (n for n in SIZES if scale.waiting(run_of(scales.root, name, method, mesh, tokens=n), mesh, full) <= MOST)
                cells.append(next((f"{n:,}" for n in enough), f"more than {SIZES[-1]:,}"))
            scale.gpu = gpu(GPU)
            yield f"| {name} | {method} | {' | '.join(cells)} |"


def long_sequences(scales: Scales, longest: int = 131_072) -> Iterator[str]:
    """One sequence that is shared by more and more ranks of a machine."""
    yield "| | method | `place.context` | a rank holds | fits 80 GB | keys and values handed over | a step | of it waiting | tokens/s a GPU |"
    yield "|---|---|--:|--:|---|--:|--:|--:|--:|"
    mesh = Mesh(8)
    for name, method in (("8B", "LoRA"), ("70B", "LoRA")):
        scale = scales.of(name, method)
        full = layouts(mesh)[-1]
        for shared in (1, 2, 4, 8):
            o = scale.outlook(run_of(scales.root, name, method, mesh, tokens=longest, longest=longest, context=shared), mesh, full)
            handed = size(o.traffic.get("keys and values", 0)) if shared > 1 else ""
            cells = (size(o.total), "yes" if o.total <= 80e9 else "no", handed, seconds(o.step), f"{waiting(o):.1%}", f"{o.tokens / o.step / mesh.ranks:,.0f}")
            yield f"| {name} | {method} | {shared} | {' | '.join(cells)} |"


def checkpoints() -> Iterator[str]:
    """Bytes of a checkpoint and how long a machine writes its share."""
    yield "| | full, all | a machine's share of 8 | of 128 | seconds at 2 GB/s a machine, 8 machines | 128 machines |"
    yield "|---|--:|--:|--:|--:|--:|"
    for name, numbers in (("8B", 8.03e9), ("70B", 70.55e9), ("405B", 405.85e9)):
        whole = 12 * numbers
        yield f"| {name} | {size(whole)} | {size(whole / 8)} | {size(whole / 128)} | {whole / 8 / 2e9:,.0f} | {whole / 128 / 2e9:,.1f} |"


def lines(root: Path) -> Iterator[str]:
    """What stands between the marks."""
    scales = Scales(root)
    yield f"### {TOKENS:,} tokens of every GPU in a step"
    yield from tables(scales)
    yield "\n### Tokens of a rank from which waiting is less than a tenth of a step, with `place.shard=full`\n"
    yield from least_tokens(scales)
    yield "\n### One sequence of 131,072 tokens for all ranks that share it, on a machine of eight, with `place.shard=full`\n"
    yield from long_sequences(scales)
    yield "\n### Checkpoints: masters and both moments, 12 bytes a trained number\n"
    yield from checkpoints()


def main(argv: list[str] | None = None) -> int:
    """Print, and with --write keep."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write docs/scale.md between its marks")
    a = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as root:
        found = []
        for line in lines(Path(root)):
            print(line, flush=True)
            found.append(line)
    if a.write:
        page = PAGE.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{chr(10).join(found)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
