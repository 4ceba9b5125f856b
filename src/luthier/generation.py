"""Sampling answers: one batched loop, finished rows dropped, log-probabilities kept.

Random numbers are a function of (seed, number of the prompt, step), so an answer does not depend on what else is in its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .core import LuthierError, Rollout
from .decoding import Steps


@torch.no_grad()
def generate(
    steps: Steps,
    prompts: Sequence[Sequence[int]],
    *,
    limit: int,
    max_new: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Sequence[int] = (),
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Rollout:
    """Continue ``prompts`` (token ids), each by at most ``max_new`` tokens or up to a token of ``stop``, which is kept.

    temperature 0: the likeliest token. top_k, top_p (Holtzman et al., 2019, arXiv 1904.09751) narrow the choice; 0 and 1 leave it open.
    ``limit``: positions the model has; ``numbers``: the prompts' numbers, for the random numbers (0, 1, ... where not given); ``on_token`` sees the tokens of a
    single prompt as they come. Log-probs are of the model's own distribution (temperature 1, nothing cut). Raises LuthierError for an empty
    or over-long prompt.
    """
    for i, p in enumerate(prompts):
        if not 0 < len(p) < limit:
            raise LuthierError(f"prompt {i + 1} has {len(p)} tokens; this model takes 1 to {limit - 1}")
    out = Rollout([[] for _ in prompts], [[] for _ in prompts], ["length"] * len(prompts))
    most = min(max_new, steps.room(prompts, limit)) if prompts else 0
    if most < 1:
        return out
    draws = [torch.Generator().manual_seed((seed * 1_000_003 + n) % 2**63) for n in numbers or range(len(prompts))]
    stops = set(stop)
    rows = list(range(len(prompts)))  # which prompt each row of the batch answers
    h_BD = steps.begin(prompts)
    for new in range(1, most + 1):
        logp_BV = steps.logits(h_BD).log_softmax(-1)
        token_B = choose(logp_BV, [draws[r] for r in rows], temperature, top_k, top_p)
        done = []
        for b, (r, t, lp) in enumerate(zip(rows, token_B.tolist(), logp_BV.gather(1, token_B[:, None]).squeeze(1).tolist(), strict=True)):
            out.ids[r].append(t)
            out.logps[r].append(lp)
            if t in stops:
                out.stopped[r] = "stop"
                done.append(b)
            elif on_token is not None:
                on_token(t)
        if len(done) == len(rows) or new == most:
            break
        if done:
            kept = [b for b in range(len(rows)) if b not in set(done)]
            steps.keep(kept)
            token_B, rows = token_B[kept], [rows[b] for b in kept]
        h_BD = steps.go_on(token_B)
    return out


def choose(logp_BV: Tensor, draws: Sequence[torch.Generator], temperature: float, top_k: int, top_p: float) -> Tensor:
    """One token a row: the likeliest, or by inverse transform of one uniform number from the row's own generator."""
    if temperature == 0.0:
        return logp_BV.argmax(-1)
    p_BV, order_BV = (logp_BV / temperature).softmax(-1).sort(-1, descending=True)
    if top_k > 0:
        p_BV[:, top_k:] = 0
    if top_p < 1.0:  # the smallest set that reaches top_p; the likeliest token always stays
        p_BV[:, 1:][p_BV.cumsum(-1)[:, :-1] >= top_p] = 0
    total_BV = p_BV.cumsum(-1)
    u_B1 = torch.stack([torch.rand(1, generator=g) for g in draws]).to(p_BV.device) * total_BV[:, -1:]
    rank_B1 = torch.searchsorted(total_BV, u_B1, right=True).clamp(max=p_BV.shape[-1] - 1)
    return order_BV.gather(1, rank_B1).squeeze(1)
