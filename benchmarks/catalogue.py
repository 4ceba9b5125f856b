"""The workloads, and what is aimed at on each. "default" and "tuned": times the real tokens a second of the peer as it comes and at its best settings;
"memory": the peak as a share of the peer's as it comes; "distance": from the limit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .workload import ALL, Workload

_LLAMA_WANTS = {"default": 8.0, "tuned": 5.0, "memory": 0.4}
_HALF: dict[str, Any] = {"family": "qwen2", "hidden": 896, "layers": 24, "heads": 14, "kv_heads": 2, "ff": 4864, "vocabulary": 151_936, "prompt_times": 3.0}
_BERT: dict[str, Any] = {"family": "bert", "kind": "classify", "ff": 3072, "vocabulary": 30_522}
_SMALL: dict[str, Any] = {"examples": 5, "tries": 2}  # about 650 tokens a step: what a row costs in minutes is mostly the peer as it comes


def short() -> list[Workload]:
    """What `make bench` runs: the 100 M shapes."""
    return [
        Workload("SFT, LoRA on q, v", tries=2, wants=_LLAMA_WANTS),
        Workload("SFT, LoRA on all linears", targets=ALL, wants=_LLAMA_WANTS, **_SMALL),
        Workload("SFT, full fine-tuning", method="full", lr=2e-5, wants={"tuned": 3.0}, **_SMALL),
        Workload("raw text, LoRA on q, v", kind="text", examples=5, tries=2, wants={"tuned": 2.0}),
        Workload("BERT-base classification, LoRA on q, v", examples=16, tries=2, lr=2e-5, wants={"tuned": 1.5}, **_BERT),
        Workload("DPO, prompt three times the answer, LoRA on q, v", kind="dpo", examples=2, tries=2, prompt_times=3.0, wants={"tuned": 3.0}),
        Workload("SFT, prefix tuning", method="prefix", lr=1e-2, wants={"tuned": 2.0}, **_SMALL | {"tries": 3}),
        Workload("SFT, QLoRA (NF4) on all linears", precision="nf4", targets=ALL, wants={"tuned": 3.0}, **_SMALL),
    ]


def long() -> list[Workload]:
    """What `make bench-long` adds: the shape of half a billion parameters with its vocabulary, every setting of the peer tried."""
    half = {**_HALF, "examples": 4, "steps": 4, "tune_steps": 2, "tries": 4}
    return [
        Workload("SFT, 0.5B, 152k vocabulary, 25 % labelled, LoRA on q, v", wants={"default": 6.0, "tuned": 4.0, "distance": 1.8}, **half),
        Workload("SFT, 0.5B, 152k vocabulary, 25 % labelled, full fine-tuning", method="full", lr=2e-5, wants={"tuned": 3.0}, **half),
    ]


def curved(seed: int, *, tiny: bool = False) -> Workload:
    """Four layers of the half-billion shape, with its vocabulary, on text that has something to learn: what equal results are measured on."""
    shape = _HALF | {"layers": 4, "prompt_times": 0.0} | ({"hidden": 56, "ff": 96, "vocabulary": 2000} if tiny else {})
    steps = {"steps": 6, "threads": 1} if tiny else {"steps": 50}
    return Workload("4 layers of 0.5B, 152k vocabulary, LoRA on q, v", lr=2e-3, natural=True, examples=4, seed=seed, **steps, **shape)


def quick() -> list[Workload]:
    """All of them so small that only the harness is tried, not the speed."""
    tiny: dict[str, Any] = {"hidden": 64, "layers": 2, "heads": 4, "ff": 128, "vocabulary": 512, "examples": 4, "steps": 3, "threads": 1, "tries": 1}
    out = []
    for work in [*short(), *long()]:
        shape = tiny | ({"kv_heads": 2} if work.kv_heads else {}) | ({"examples": 2} if work.kind == "dpo" else {})
        out.append(replace(work, name=f"quick: {work.name}", **shape))
    return out
