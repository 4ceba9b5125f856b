"""Tasks of EleutherAI's lm-evaluation-harness on our models: `luthier eval runs/NAME --harness arc_easy,hellaswag`.

The harness (package lm-eval, extra luthier[harness]) reads its tasks and says what is asked; here three questions are answered for it: how likely a text is
after another, how likely a text is from its beginning, and what comes after a text. Continuations are told from contexts by token as the harness' own models
do it, so the numbers are comparable with published ones. Its per-document scores get our intervals and paired tests.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core import LuthierError, Row, next_token_batch, scored
from ..measuring import marks
from ..measuring.marks import Mark, Score
from ..measuring.measure import can_write, group, to_device
from ..nn import intervals
from ..policy import Policy
from .evaluation import Opening, opened
from .scoreboard import Board

Z = 1.959964  # of the 95 % interval from a standard error, where a task gives nothing but that
LONGEST = 256  # new tokens where a task does not say
WEIGHED: dict[str, intervals.Statistic] = {  # of -log p and of words or bytes, summed over documents
    "word_perplexity": lambda sums_R2: np.exp(intervals.ratio_of_sums(sums_R2)),
    "byte_perplexity": lambda sums_R2: np.exp(intervals.ratio_of_sums(sums_R2)),
    "bits_per_byte": lambda sums_R2: intervals.ratio_of_sums(sums_R2) / np.log(2),
}
Pair = tuple[Sequence[int], Sequence[int]]  # context, continuation


@torch.no_grad()
def likelihoods(policy: Policy, pairs: Sequence[Pair], *, tokens: int = 8192, on_done: Callable[[int], None] = lambda n: None) -> list[tuple[float, bool]]:
    """(log p of the continuation, whether each of its tokens is the likeliest) of every pair. A context that is too long loses its beginning.

    ``tokens``: positions in a forward. Raises LuthierError for a pair without a context or a continuation.
    """
    rows = [_row(before, after, policy.limit, i) for i, (before, after) in enumerate(pairs)]
    place = {id(row): i for i, row in enumerate(rows)}
    out: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
    done = 0
    policy.eval()
    for some in group(rows, tokens, policy.base.packs):
        batch = to_device(next_token_batch(some, pad=policy.pad, packed=policy.base.packs), policy)
        hidden_ND, target_N, example_N = scored(batch, policy.hidden(batch))
        found = policy.score(hidden_ND, target_N, want=("logp", "likeliest"))
        sums_S2 = torch.zeros(len(some), 2, device=target_N.device).index_add(0, example_N, torch.stack([found["logp"], 1 - found["likeliest"]], 1))
        for row, (logp, missed) in zip(some, sums_S2.tolist(), strict=True):
            out[place[id(row)]] = (logp, missed == 0)
        done += len(some)
        on_done(done)
    return out


def _row(before: Sequence[int], after: Sequence[int], limit: int, number: int) -> Row:
    if not before or not after:
        raise LuthierError(f"--harness: request {number + 1} has no {'continuation' if before else 'context'} to score")
    ids = [*before, *after][-limit:]
    learned = min(len(after), len(ids) - 1)
    return Row(np.array(ids, dtype=np.int32), np.arange(len(ids)) >= len(ids) - learned, f"request {number + 1}")


def continued(policy: Policy, prompts: Sequence[Sequence[int]], wanted: Mapping[str, Any], *, stop: Sequence[int], seed: int) -> list[str]:
    """What comes after each prompt, up to the first of the texts in ``wanted["until"]``. A prompt that is too long loses its beginning."""
    most = min(int(wanted.get("max_gen_toks") or LONGEST), policy.limit - 1)
    warm = float(wanted.get("temperature") or 0.0) if wanted.get("do_sample") else 0.0
    how: dict[str, Any] = {"max_new": most, "stop": stop, "temperature": warm, "seed": seed}
    if warm:
        how |= {"top_p": float(wanted.get("top_p") or 1.0), "top_k": int(wanted.get("top_k") or 0)}
    rollout = policy.generate([list(p)[-(policy.limit - most) :] for p in prompts], **how)
    until = wanted.get("until") or []
    out = []
    for ids in rollout.ids:
        text = policy.base.tokenizer.decode(ids, skip_special_tokens=True)
        for end in [until] if isinstance(until, str) else until:
            text = text.split(end)[0] if end else text
        out.append(text)
    return out


# --- the harness' side -----------------------------------------------------------------------------------------------


def model_for(policy: Policy, *, template: str | None = None, seed: int = 0) -> Any:
    """A policy as the harness' LM. Raises LuthierError where the harness is not installed, and for a model that is no decoder."""
    TemplateLM = _imported().api.model.TemplateLM
    can_write(policy)
    if policy.base.anatomy.kind != "decoder":
        raise LuthierError("--harness asks how likely texts are from left to right, and this model is no decoder; score it on --data instead")
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    from ..data.codec import Codec
    from ..data.templates import Template

    codec = Codec(policy.base.tokenizer)
    eos = policy.base.tokenizer.eos_token_id
    first = codec.bos if codec.bos is not None else eos

    class Ours(TemplateLM):  # type: ignore[misc, valid-type]
        """One policy, as it is when it is asked."""

        tokenizer_name = policy.base.source or "luthier"
        eot_token_id = eos
        prefix_token_id = first

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            ids = codec.encode([string])[0].tolist()
            return [codec.bos, *ids] if codec.bos is not None and add_special_tokens is not False and ids[:1] != [codec.bos] else ids

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return likelihoods(policy, [(before, after) for _, before, after in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            out = []
            for (text,) in [r.args for r in requests]:
                ids = codec.encode([text])[0].tolist()
                windows = get_rolling_token_windows(token_list=ids, prefix_token=first, max_seq_len=policy.limit - 1, context_len=1)
                found = likelihoods(policy, [make_disjoint_window(w) for w in windows])
                out.append(sum(logp for logp, _ in found))
            return out

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            alike: dict[str, list[int]] = defaultdict(list)
            for i, r in enumerate(requests):
                alike[repr(sorted(r.args[1].items()))].append(i)
            out = [""] * len(requests)
            for places in alike.values():
                prompts = [self.tok_encode(requests[i].args[0]) for i in places]
                for i, text in zip(places, continued(policy, prompts, requests[places[0]].args[1], stop=sorted(codec.ends), seed=seed), strict=True):
                    out[i] = text
            return out

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return Template(policy.base.tokenizer, template).text(chat_history, None, generation=add_generation_prompt)

    return Ours()


def _imported() -> Any:
    try:
        import lm_eval
        import lm_eval.api.model
        import lm_eval.evaluator
    except ImportError as e:
        raise LuthierError(f"--harness needs the package lm-eval ({e}): pip install 'luthier[harness]'") from None
    return lm_eval


def run_tasks(policy: Policy, tasks: Sequence[str], own: Path | None, *, rows: int | None, template: str | None, seed: int) -> tuple[dict[str, Mark], dict]:
    """The harness' scores of a policy as it is: those that are means over documents as marks, and all as scores, by "task metric"."""
    model = model_for(policy, template=template, seed=seed)
    lm_eval = _imported()
    if own is not None and not own.is_dir():
        raise LuthierError(f"--harness-tasks {own}: there is no such folder; it holds task files (.yaml) of lm-eval")
    with _quiet():
        manager = lm_eval.tasks.TaskManager(include_path=None if own is None else str(own.resolve()))
        if unknown := [t for t in tasks if t not in manager.all_tasks]:
            from ..settings.names import nearest

            guess = nearest(unknown[0], manager.all_tasks)
            raise LuthierError(f"--harness: lm-eval has no task {unknown[0]!r}" + (f"; did you mean {guess}?" if guess else "; lm-eval ls tasks lists them"))
        chat = template is not None
        found = lm_eval.evaluator.simple_evaluate(
            model=model, tasks=list(tasks), task_manager=manager, limit=rows, bootstrap_iters=1000, apply_chat_template=chat, random_seed=seed
        )
    return _read(found, seed)


def _read(found: Mapping[str, Any], seed: int) -> tuple[dict[str, Mark], dict[str, Score]]:
    made: dict[str, Mark] = {}
    scores: dict[str, Score] = {}
    for task, numbers in found["results"].items():
        n = int((found.get("n-samples", {}).get(task) or {}).get("effective", 0))
        for key, value in numbers.items():
            metric, _, chosen = key.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or metric in ("alias", "sample_len"):
                continue
            name = f"{task} {metric}" + ("" if chosen in ("none", "") else f" ({chosen})")
            each = [s.get(metric) for s in found.get("samples", {}).get(task, ()) if s.get("filter", "none") == chosen]
            if each and all(isinstance(x, bool | int | float | np.number) for x in each) and abs(float(np.mean(each)) - value) < 1e-6:
                down = not (found.get("higher_is_better", {}).get(task) or {}).get(metric, True)
                made[name] = marks.mean(name, [float(x) for x in each], lower_is_better=down)
                scores[name] = made[name].score(seed=seed)
                continue
            if metric in WEIGHED and each and all(isinstance(x, tuple | list) and len(x) == 2 for x in each):
                stats_N2 = np.array([[-float(logp), float(size)] for logp, size in each])
                made[name] = marks.pooled(name, stats_N2, WEIGHED[metric], lower_is_better=True)
                scores[name] = made[name].score(seed=seed)
                continue
            error = numbers.get(f"{metric}_stderr,{chosen}")
            half = Z * error if isinstance(error, int | float) else np.nan
            scores[name] = Score(float(value), float(value - half), float(value + half), n)
    return made, scores


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness logs a page of warnings; what it prints goes nowhere, and its errors are raised."""
    evaluator = _imported().evaluator
    before, asks_git = logging.root.manager.disable, evaluator.get_git_commit_hash
    logging.disable(logging.WARNING)
    evaluator.get_git_commit_hash = lambda: None  # git's complaint about a folder without history would read like an error of ours
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
        evaluator.get_git_commit_hash = asks_git


def evaluated(board: Board, opening: Opening, tasks: Sequence[str], own: Path | None, **how: Any) -> None:
    """Fill a board with the harness' scores of a model, its other adapters and its base. ``how``: rows, template, precision, seed."""
    _imported()
    policy, labels, subjects = opened(opening, how.pop("precision"), with_base=True)
    found: dict[str, dict[str, Mark]] = {}
    for name, label in labels.items():
        policy.use(name)
        found[label], board.columns[label] = run_tasks(policy, tasks, own, **how)
    board.compared(found, subjects, [c for c in found if c not in subjects], how["seed"])
