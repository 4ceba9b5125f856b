"""Answers by vLLM: against a stand-in with the names and signatures of its documented interface, whose model is a tiny one of ours."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

import tiny
from luthier import opening
from luthier.core import LuthierError
from luthier.feedback.vllm_engine import Engine, open_engine
from luthier.measuring.measure import answer
from luthier.methods.dora import Method as Dora
from luthier.methods.lora import Method as Lora
from luthier.methods.prefix import Method as Prefix
from luthier.policy import Policy
from luthier.saving import adapter

# --- the stand-in -----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class SamplingParams:
    """The fields that are used; any other name is a TypeError, as with the real one."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)


class LLM:
    made: ClassVar[list[LLM]] = []

    def __init__(self, model: str, *, tokenizer: str | None = None, dtype: str = "auto", **settings: Any):
        known = {"enable_lora", "max_loras", "max_lora_rank", "enable_prefix_caching", "logprobs_mode", "gpu_memory_utilization", "max_model_len"}
        assert set(settings) <= known, settings
        assert not settings.get("enable_lora") or settings["max_lora_rank"] in (1, 8, 16, 32, 64, 128, 256, 320, 512)
        self.settings, self.asked, self.loaded = settings, [], {}
        self.policy = opening.load(model, precision="float32")
        self.words = opening.load(model, precision="float32").base.tokenizer if tokenizer is None else self.policy.base.tokenizer
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=settings.get("max_model_len", self.policy.limit)))
        LLM.made.append(self)

    def get_tokenizer(self) -> Any:
        return self.words

    def generate(self, prompts: Any, sampling_params: Any = None, *, use_tqdm: Any = True, lora_request: LoRARequest | None = None) -> list[RequestOutput]:
        assert len(prompts) == len(sampling_params)
        route = None
        if lora_request is not None:
            assert self.settings.get("enable_lora")
            if lora_request.lora_int_id not in self.loaded:  # a LoRA is read once for its number
                self.loaded[lora_request.lora_int_id] = route = f"lora-{lora_request.lora_int_id}"
                adapter.add(self.policy, Path(lora_request.lora_path), route)
            route = self.loaded[lora_request.lora_int_id]
        out = []
        for p, how in zip(prompts, sampling_params, strict=True):
            self.asked.append(how)
            assert how.n == 1 and how.ignore_eos and how.logprobs == 0 and not how.detokenize
            assert how.seed is None or 0 <= how.seed < 2**63
            settings = {"temperature": how.temperature, "top_k": how.top_k, "top_p": how.top_p, "stop": how.stop_token_ids, "seed": how.seed or 0}
            got = self.policy.generate([p["prompt_token_ids"]], route=[route], max_new=how.max_tokens, **settings)
            said = [{t: Logprob(x)} for t, x in zip(got.ids[0], got.logps[0], strict=True)]
            out.append(RequestOutput(p["prompt_token_ids"], [CompletionOutput(0, "", got.ids[0], sum(got.logps[0]), said, got.stopped[0])]))
        return out


@pytest.fixture
def vllm(monkeypatch):
    module, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    module.LLM, module.SamplingParams, request.LoRARequest = LLM, SamplingParams, LoRARequest
    for name, m in (("vllm", module), ("vllm.lora", lora), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, m)
    LLM.made.clear()
    return LLM.made


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base, and a LoRA and a prefix trained on it, as folders."""
    where = tmp_path_factory.mktemp("vllm")
    tiny.folder(where / "base")
    for name, method in (("lora", Lora(rank=4, targets=("all",))), ("dora", Dora()), ("prefix", Prefix())):
        base = opening.load(str(where / "base"), precision="float32").base
        delta = method.attach(base, "default")
        tiny.randomise(delta.params, std=0.3)
        adapter.save(Policy(base, delta, method=method), where / name)
    return where


PROMPTS = [[5, 9, 11], [7] * 9, [12, 30]]


def test_a_model_s_folder_answers_as_our_own_loop(vllm, home):
    engine, policy = open_engine(str(home / "base")), opening.load(str(home / "base"), precision="float32")
    how = {"max_new": 8, "stop": [20, 33], "numbers": [3, 1, 2]}
    for sampling in ({}, {"temperature": 1.0, "samples": 2, "seed": 5, "top_k": 9}, {"temperature": 0.5, "top_p": 0.9}):
        got, expected = engine.generate(PROMPTS, **how, **sampling), policy.generate(PROMPTS, **how, **sampling)
        assert [len(x) for x in got.ids] == [len(x) for x in expected.ids] or sampling  # its random numbers are its own
        assert len(got.ids) == len(expected.ids) == len(got.logps) == len(got.tempered)
        if not sampling:
            assert got.ids == expected.ids and got.stopped == expected.stopped and got.tempered == expected.tempered
            for a, b in zip(got.logps, expected.logps, strict=True):
                assert a == pytest.approx(b, abs=1e-5)
    seeds = [h.seed for h in vllm[0].asked[3:9]]
    assert len(set(seeds)) == 6 and [h.seed for h in vllm[0].asked[:3]] == [None] * 3
    assert got.tempered == [[], [], []] and engine.generate(PROMPTS, temperature=1.0, max_new=2).tempered[0]
    assert vllm[0].settings == {"enable_prefix_caching": True, "logprobs_mode": "raw_logprobs"}


def test_an_adapter_s_folder_is_served_as_a_lora(vllm, home):
    engine, policy = open_engine(str(home / "lora"), gpu_memory_utilization=0.5), opening.load(str(home / "lora"), precision="float32")
    assert engine.generate(PROMPTS, max_new=8).ids == policy.generate(PROMPTS, max_new=8).ids
    assert vllm[0].settings["max_lora_rank"] == 8 and vllm[0].settings["gpu_memory_utilization"] == 0.5
    engine.show(None)
    assert engine.generate(PROMPTS, max_new=8).ids == policy.generate(PROMPTS, max_new=8, route=[None] * 3).ids


def test_a_lora_in_training_is_shown_as_it_stands(vllm, home):
    policy = opening.load(str(home / "lora"), precision="float32")
    engine = Engine(home / "base", rank=policy.method.rank)
    for _ in range(2):
        engine.take(policy)
        assert engine.generate(PROMPTS, max_new=8).ids == policy.generate(PROMPTS, max_new=8).ids
        with torch.no_grad():
            for p in policy.delta.params.values():
                p.mul_(-1.7)
    assert engine.generate(PROMPTS, max_new=8).ids != policy.generate(PROMPTS, max_new=8).ids  # not shown yet


def test_prompts_are_rendered_and_answers_read_as_with_a_policy(vllm, home):
    engine, policy = open_engine(str(home / "base")), opening.load(str(home / "base"), precision="float32")
    asked = ["so", [{"role": "user", "content": "how"}], "x" * 600]
    assert answer(engine, asked, max_new=6) == answer(policy, asked, max_new=6)


def test_what_vllm_cannot_serve_is_refused_with_what_to_do(vllm, home, tmp_path):
    for name, why in (("dora", "use_dora"), ("prefix", "PREFIX_TUNING")):
        with pytest.raises(LuthierError, match=f"{why}.*merge it into its base first"):
            open_engine(str(home / name))
    config = json.loads((home / "lora" / adapter.CONFIG).read_text())
    for name in home.joinpath("lora").iterdir():
        (tmp_path / name.name).write_bytes(name.read_bytes())
    (tmp_path / adapter.CONFIG).write_text(json.dumps(config | {"rank_pattern": {"q_proj": 2}}))
    with pytest.raises(LuthierError, match="rank_pattern"):
        open_engine(str(tmp_path))
    with pytest.raises(LuthierError, match="rank 513"):
        Engine(home / "base", rank=513)
    with pytest.raises(LuthierError, match="prompt 1 has 600 tokens"):
        open_engine(str(home / "base")).generate([[3] * 600])


def test_without_vllm_the_extra_is_named(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(LuthierError, match=r"pip install 'luthier\[vllm\]'"):
        open_engine(str(home / "base"))


def test_the_command_answers_by_it(vllm, home, capsys):
    from luthier.cli import main

    assert main(["generate", str(home / "lora"), "--prompt", "so", "--max-new", "4", "--engine", "vllm"]) == 0
    by_vllm = capsys.readouterr().out
    assert main(["generate", str(home / "lora"), "--prompt", "so", "--max-new", "4", "--precision", "float32"]) == 0
    assert capsys.readouterr().out == by_vllm and len(vllm) == 1
    assert main(["generate", str(home / "lora"), "--prompt", "so", "--engine", "vllm", "--use", "none"]) == 2
    assert "leave out --adapter and --use" in capsys.readouterr().err
