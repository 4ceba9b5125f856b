"""Answers sampled by vLLM instead of our own loop, for GPUs: a model's folder, or one with a LoRA in PEFT's layout beside it.

`Engine` answers as a policy does: `generate` takes the same settings and returns the same Rollout, and `measure.answer` reads prompts through it. It holds a
model of its own, so a policy in training is shown to it as files: `Engine.take` writes the LoRA that is being trained and lets the next answers use it. What
vLLM does otherwise:

1. Its random numbers are its own. An answer is still a function of (seed, number of the prompt, sample), as far as its kernels repeat themselves.
2. Log-probs are those of its kernels (``logprobs_mode="raw_logprobs"``: temperature 1, nothing cut), which differ from training's in the last digits;
   ``Rollout.tempered`` is empty unless the temperature is 0 or 1.
3. It serves plain LoRA on linears, and nothing else: other deltas are merged first.

Written from vLLM's documented interface (LLM, SamplingParams, LoRARequest; versions 0.10 and later), and tested against a stand-in for it only: nothing here
has run with vLLM itself.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .. import opening
from ..core import LuthierError, Rollout
from ..generating.sampling import seed_of
from ..hub import locate
from ..policy import Policy
from ..saving import adapter
from ..settings.plugins import kind_of
from ..settings.run import Model

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM makes room for
NOT_PLAIN = {"use_dora": False, "bias": "none", "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "trainable_token_indices": None}


class Engine:
    """A model that vLLM holds. ``settings`` go to vllm.LLM as they are (tensor_parallel_size, gpu_memory_utilization, max_model_len, ...)."""

    def __init__(self, model: str | Path, *, lora: Path | None = None, rank: int | None = None, tokenizer: str | Path | None = None, **settings: Any):
        """``model``: a folder or a Hub id; ``lora``: an adapter's folder; ``rank``: room for LoRAs that are shown later (`take`).

        Raises LuthierError where vLLM is not installed, or the adapter is not one it serves.
        """
        try:
            import vllm
            from vllm.lora.request import LoRARequest
        except ImportError as e:
            raise LuthierError(f"sampling by vLLM needs the extra vllm: pip install 'luthier[vllm]' ({e})") from None
        self.vllm, self.request, self.lora, self.shown = vllm, LoRARequest, None, 0
        self.heads: dict[str, Any] = {}  # it writes text
        most = max([r for r in (rank, None if lora is None else _rank(lora)) if r is not None], default=0)
        if most > RANKS[-1]:
            raise LuthierError(f"a LoRA of rank {most} is more than vLLM has room for ({RANKS[-1]}); merge it first: luthier merge")
        room = {"enable_lora": True, "max_loras": 1, "max_lora_rank": next(r for r in RANKS if r >= most)} if most else {}
        words = {} if tokenizer is None else {"tokenizer": str(tokenizer)}
        usual = {"enable_prefix_caching": True, "logprobs_mode": "raw_logprobs"}  # a prompt is read once for all its samples
        self.llm = vllm.LLM(model=str(model), **{**usual, **room, **words, **settings})
        self.base = SimpleNamespace(tokenizer=self.llm.get_tokenizer(), anatomy=SimpleNamespace(kind="decoder", family="vllm"), source=str(model))
        self.limit = int(self.llm.llm_engine.model_config.max_model_len)
        if lora is not None:
            self.show(lora)

    def show(self, folder: Path | None) -> None:
        """Let the LoRA of this folder, as it is now, serve from here on; None: the model alone. Raises LuthierError for one that vLLM does not serve."""
        if folder is None:
            self.lora = None
            return
        _rank(folder)
        self.shown += 1  # vLLM remembers a LoRA by its number
        self.lora = self.request(f"shown-{self.shown}", self.shown, str(folder))

    def take(self, policy: Policy) -> None:
        """Show the LoRA of a policy in training, as it stands. Raises LuthierError for a delta that is not plain LoRA."""
        if policy.delta is None:
            self.show(None)
            return
        self.folder = tempfile.TemporaryDirectory(prefix="luthier-vllm-")
        where = Path(self.folder.name) / "adapter"
        adapter.save(policy, where)
        self.show(where)

    def generate(
        self,
        source: Sequence[Sequence[int]],
        *,
        samples: int = 1,
        max_new: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: Sequence[int] = (),
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        on_answers: Callable[[int], None] | None = None,
        batch_rows: int | None = None,
    ) -> Rollout:
        """As Policy.generate's. ``batch_rows`` is left to vLLM. Raises LuthierError for an empty or over-long prompt."""
        for i, p in enumerate(source):
            if not 0 < len(p) < self.limit:
                raise LuthierError(f"prompt {i + 1} has {len(p)} tokens; this model takes 1 to {self.limit - 1}")
        numbers = range(len(source)) if numbers is None else numbers
        each = {"n": 1, "temperature": temperature, "top_k": top_k, "top_p": top_p, "stop_token_ids": list(stop)}
        each |= {"ignore_eos": True, "logprobs": 0, "detokenize": False}  # only ``stop`` ends an answer; the log-prob of the token itself
        prompts, asked = [], []
        for p, number in zip(source, numbers, strict=True):
            for s in range(samples):
                prompts.append({"prompt_token_ids": list(p)})
                own = {"seed": seed_of(seed, number, s)} if temperature > 0 else {}
                asked.append(self.vllm.SamplingParams(max_tokens=min(max_new, self.limit - len(p)), **each, **own))
        given = self.llm.generate(prompts, asked, use_tqdm=False, lora_request=self.lora) if prompts and max_new else []
        out = Rollout([[] for _ in prompts], [[] for _ in prompts], ["length"] * len(prompts), [[] for _ in prompts])
        for i, request in enumerate(given):
            said = request.outputs[0]
            out.ids[i] = list(said.token_ids)
            out.logps[i] = [found[t].logprob for t, found in zip(said.token_ids, said.logprobs, strict=True)]
            out.stopped[i] = "stop" if said.finish_reason == "stop" else "length"
            out.tempered[i] = [0.0] * len(out.ids[i]) if temperature == 0 else list(out.logps[i]) if temperature == 1 else []
        if on_answers is not None:
            on_answers(len(prompts))
        return out


def open_engine(what: str, *, model: str | None = None, **settings: Any) -> Engine:
    """An engine for what `opening.load` takes: a base, an adapter's folder, a run's. Raises LuthierError where vLLM cannot serve it."""
    folder = adapter.artefact(Path(what).expanduser())
    if folder is None or not adapter.is_adapter(folder):
        return Engine(locate(Model(id=str(folder or what))), **settings)
    config, ours = adapter.describe(folder)
    _rank(folder)
    words = folder if (folder / "tokenizer_config.json").is_file() else None
    return Engine(locate(opening.base_of(folder, config, ours, model, False)), lora=folder, tokenizer=words, **settings)


def _rank(folder: Path) -> int:
    """Of a LoRA in PEFT's layout that vLLM serves."""
    path = folder / adapter.CONFIG
    config = json.loads(path.read_text()) if path.is_file() else {}
    if config.get("peft_type") != "LORA":
        raise LuthierError(f"{folder}: vLLM serves LoRA in PEFT's layout beside a model, and this is {config.get('peft_type', 'another delta')}; {MERGE}")
    if (stored := adapter.packed_precision(folder)) is not None:
        raise LuthierError(f"{folder}: this LoRA was trained on a base in {kind_of(stored)}, which vLLM would replace by another; {MERGE}")
    odd = [k for k, plain in NOT_PLAIN.items() if config.get(k, plain) not in (plain, None, [], {})]
    if odd:
        raise LuthierError(f"{folder}: this LoRA is not plain ({', '.join(odd)} in {adapter.CONFIG}), which vLLM does not serve; {MERGE}")
    return int(config["r"])


MERGE = "merge it into its base first (luthier merge) and name the merged folder"
