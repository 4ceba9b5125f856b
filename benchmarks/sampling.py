"""``python -m benchmarks.sampling``: sampling several answers to each prompt, beside transformers' own generate.

One process, one thread, the same weights, the two in turn, round after round, so that a slow moment of the machine meets both; least and median times over the
rounds, and for what runs beside other work also the least CPU time. Both sample from the whole distribution at temperature 1, and nothing ends an answer early.
Before anything is timed, greedy ids are compared. ``--parts`` says where our time goes; ``--write`` puts the tables into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from luthier import build
from luthier.generating import cache, decoding, lean, prepacked
from luthier.modelling.anatomy import configs, is_linear
from luthier.opening import load
from luthier.policy import Policy

from . import machine
from .stored import SHAPE

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- begin: benchmarks.sampling -->", "<!-- end: benchmarks.sampling -->"
SHAPES = ("fiddle", "llama")


@dataclass(frozen=True)
class Work:
    """What is sampled."""

    prompts: int
    prompt: int  # tokens
    samples: int
    new: int

    def __str__(self) -> str:
        many = f"{self.prompts} prompts" if self.prompts > 1 else "1 prompt"
        return f"{many} of {self.prompt} tokens, {self.samples} answers of {self.new} tokens each"


@dataclass
class Times:
    """Seconds of one side, a round each."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def measure(self, run: Callable[[], Any]) -> None:
        """Once more."""
        gc.collect()
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)


def sides(shape: str, precision: str) -> tuple[Policy, Any]:
    """The same weights as our policy, and as transformers opens them: with its own attention."""
    if shape == "fiddle":
        policy = load("fiddle", precision=precision)
        theirs = copy.deepcopy(policy.lm)
        for c in configs(theirs):
            c._attn_implementation = "sdpa"
    else:
        torch.manual_seed(0)
        theirs = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(getattr(torch, precision)).eval()
        policy = Policy(build.adopt(copy.deepcopy(theirs), source="shape"))
    return policy.eval(), theirs.eval()


def prompts_of(work: Work, vocabulary: int) -> list[list[int]]:
    """Random tokens, the same every time."""
    made = torch.Generator().manual_seed(0)
    return torch.randint(3, vocabulary, (work.prompts, work.prompt), generator=made).tolist()


def their_answers(lm: Any, prompts: list[list[int]], work: Work, *, sampled: bool) -> list[list[int]]:
    """transformers' generate, as it comes."""
    ids = torch.tensor(prompts)
    how = {"do_sample": True, "num_return_sequences": work.samples, "top_k": 0, "top_p": 1.0, "temperature": 1.0} if sampled else {"do_sample": False}
    settings = {"max_new_tokens": work.new, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    return lm.generate(ids, **settings, **how)[:, work.prompt :].tolist()


def our_answers(policy: Policy, prompts: list[list[int]], work: Work, *, sampled: bool) -> list[list[int]]:
    """Ours."""
    how: dict[str, Any] = {"samples": work.samples, "temperature": 1.0} if sampled else {}
    return policy.generate(prompts, max_new=work.new, **how).ids


@torch.no_grad()
def equal(policy: Policy, theirs: Any, prompts: list[list[int]], work: Work) -> str:
    """How far the greedy answers of the two agree, and how far apart transformers itself finds the tokens where they part."""
    answers = zip(prompts, our_answers(policy, prompts, work, sampled=False), their_answers(theirs, prompts, work, sampled=False), strict=True)
    for prompt, ours, peers in answers:
        for i, (a, b) in enumerate(zip(ours, peers, strict=True)):
            if a != b:
                logits = theirs(input_ids=torch.tensor([prompt + ours[:i]])).logits[0, -1].float()
                return f"equal up to token {i + 1} of {work.new}, a choice between two whose logits are {abs(float(logits[a] - logits[b])):.2g} apart"
    return "equal"


# --- where our time goes ----------------------------------------------------------------------------------------------


@contextmanager
def clocked(policy: Policy, spent: dict[str, float]) -> Iterator[None]:
    """Adds up the CPU seconds in attention and in the linears of blocks."""
    own, changed = cache.Grid.attend, []

    def timed(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            out = run(*args, **kwargs)
            spent[name] += time.process_time() - began
            return out

        return wrapped

    cache.Grid.attend = timed("attention", own)  # type: ignore[method-assign]
    try:
        for module in policy.lm.base_model.modules():
            if isinstance(short := module.__dict__.get("forward"), lean.Lean):
                short.qkv, short.gate_up = (product and timed("linears", product) for product in (short.qkv, short.gate_up))
            if is_linear(module):
                changed.append((module, module.__dict__.get("forward")))
                module.__dict__["forward"] = timed("linears", module.forward)
        yield
    finally:
        cache.Grid.attend = own  # type: ignore[method-assign]
        for module, was in changed:
            if was is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = was


@torch.no_grad()
def parts(policy: Policy, prompts: list[list[int]], work: Work) -> dict[str, float]:
    """CPU milliseconds: of laying weights out, of reading the prompts, and of one token's linears, attention, head, choice and all else."""
    from luthier.generating.sampling import Draws, pick

    clock = time.process_time
    began = clock()
    with prepacked.products(policy.lm, work.new):
        out = {"weights laid out": clock() - began}
        steps = decoding.DecoderSteps(policy, [None] * len(prompts))
        began = clock()
        first = steps.logits(steps.begin(prompts))
        out["prompts read"] = clock() - began
        steps.fork(work.samples, work.new)
        logits, draws = first.repeat_interleave(work.samples, 0), Draws(range(len(prompts) * work.samples), first.device)
        spent = dict.fromkeys(("linears", "attention", "head", "choice", "all else"), 0.0)
        with clocked(policy, spent):
            for _ in range(work.new - 1):
                times = [clock()]
                token = pick(logits, draws.next(), 1.0, 0, 1.0)[0]
                times.append(clock())
                hidden = steps.go_on(token)
                times.append(clock())
                logits = steps.logits(hidden)
                times.append(clock())
                for name, a, b in (("choice", 0, 1), ("all else", 1, 2), ("head", 2, 3)):
                    spent[name] += times[b] - times[a]
    spent["all else"] -= spent["linears"] + spent["attention"]
    return {k: 1e3 * v for k, v in (out | {f"a token: {k}": v / (work.new - 1) for k, v in spent.items()}).items()}


# --- the tables -------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and with --write keep."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="times both are measured in turn, after one that does not count (default 5)")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES, help="fiddle, or a Llama shape of 109.5 M parameters")
    parser.add_argument("--precisions", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--parts", action="store_true", help="where our time goes, too")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    parser.add_argument("--idle-timeout", type=float, default=120.0, metavar="S", help="how long to wait for an idle CPU (default 120)")
    a = parser.parse_args(argv)
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    noise = machine.wait_idle(a.idle_timeout)
    work = Work(a.prompts, a.prompt_tokens, a.samples, a.new_tokens)
    results: list[dict[str, Any]] = []
    for shape in a.shapes:
        for precision in a.precisions:
            results.append(compare(shape, precision, work, a.rounds, with_parts=a.parts))
            gc.collect()
    text = table(results, work, noise)
    print(text)
    if a.write:
        page = PAGE.read_text()
        if BEGIN not in page:
            page = page.rstrip() + f"\n\n## Sampling answers\n\n{BEGIN}\n{END}\n"
        head, tail = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(head + BEGIN + "\n\n" + text + "\n" + END + tail)
    return 0


def compare(shape: str, precision: str, work: Work, rounds: int, *, with_parts: bool) -> dict[str, Any]:
    """One row of the table."""
    policy, theirs = sides(shape, precision)
    prompts = prompts_of(work, policy.lm.config.vocab_size)
    row: dict[str, Any] = {"shape": shape, "precision": precision, "greedy": equal(policy, theirs, prompts, work)}
    ours, peers = Times(), Times()
    for r in range(rounds + 1):
        kept = (ours, peers) if r else (Times(), Times())
        kept[0].measure(lambda: our_answers(policy, prompts, work, sampled=True))
        kept[1].measure(lambda: their_answers(theirs, prompts, work, sampled=True))
        print(f"{shape}, {precision}: round {r} of {rounds}", file=sys.stderr, flush=True)
    if with_parts:
        row["parts"] = [parts(policy, prompts, work) for _ in range(3)]
    return row | {"ours": ours, "theirs": peers}


def table(results: list[dict[str, Any]], work: Work, noise: str | None) -> str:
    """Seconds of both and what lies between them."""
    m = machine.describe()
    tokens = work.prompts * work.samples * work.new
    lines = [
        f"`python -m benchmarks.sampling`: {work}; sampled at temperature 1 from the whole distribution. {m.get('cpu', '')}, 1 thread, torch "
        f"{torch.__version__}, transformers {m.get('packages', {}).get('transformers', '')}, {time.strftime('%Y-%m-%d')}. Seconds: least, median of "
        f"{len(results[0]['ours'].wall)} rounds in turn; least CPU seconds.",
        "",
        "| shape | greedy ids | ours | transformers | ours is faster by | ours, tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        ours, theirs = r["ours"], r["theirs"]
        cells = [f"{min(t.wall):.2f}, {statistics.median(t.wall):.2f}; CPU {min(t.cpu):.2f}" for t in (ours, theirs)]
        faster = [min(theirs.wall) / min(ours.wall), statistics.median(theirs.wall) / statistics.median(ours.wall), min(theirs.cpu) / min(ours.cpu)]
        ratio = f"{faster[0]:.2f}x (least), {faster[1]:.2f}x (median), {faster[2]:.2f}x (CPU)"
        lines.append(f"| {r['shape']}, {r['precision']} | {r['greedy']} | {cells[0]} | {cells[1]} | {ratio} | {tokens / min(ours.wall):,.0f} |")
    if "parts" in results[0]:
        names = list(results[0]["parts"][0])
        lines += ["", "Where ours goes, CPU milliseconds, the least of 3:", "", f"| shape | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
        for r in results:
            least = [min(p[n] for p in r["parts"]) for n in names]
            lines.append(f"| {r['shape']}, {r['precision']} | {' | '.join(f'{x:.2f}' for x in least)} |")
    if noise:
        lines += ["", f"The machine was not idle: {noise}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
