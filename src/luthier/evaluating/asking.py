"""Answers to prompts alone, scored by tasks and by sources of reward: what a model that learned from rewards is measured by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..core import Answer, LuthierError, Row
from ..data.prepare import prepare
from ..data.render import stop_ids
from ..data.rollout import Sampling, sample
from ..feedback.rewards import Judge
from ..measuring.marks import Mark, mean
from ..policy import Policy
from ..reading import form_of


def asked(policy: Policy, data: Sequence[str], *, template: str | None, columns: Mapping[str, str], beginning: int, room: int) -> list[Row]:
    """The prompts of files, in seeded order, each once; ``extras["task"]`` is what tasks and rewards are shown.

    ``beginning``: so many first tokens of a paragraph of raw text are its prompt; ``room``: tokens that an answer may take. Raises LuthierError where none
    can be read, or an answer of that length leaves no room for a prompt.
    """
    if room >= policy.limit:
        raise LuthierError(f"--max-new: answers of {room} tokens leave no room for a prompt in the {policy.limit} positions of this model")
    # Read as validation data of itself: everything in it is held out here.
    prepared = prepare(
        data,
        policy.base.tokenizer,
        renders="prompts",
        form=form_of(policy.base),
        template=template,
        columns=columns,
        max_tokens=min(2048, policy.limit - room),
        beginning=beginning,
        validation=data,
        validation_rows=10**9,
        say=lambda _: None,
    )
    return prepared.validation


def answered(policy: Policy, prompts: Sequence[Row], *, template: str | None, max_new: int, temperature: float, seed: int, say: Any = None) -> list[Answer]:
    """One answer to each prompt; temperature 0: greedy."""
    tokenizer, anatomy = policy.base.tokenizer, policy.base.anatomy
    start = anatomy.decoder_start if anatomy.kind == "encoder_decoder" else None
    stop = stop_ids(tokenizer, template, kind=anatomy.kind)
    how = Sampling(max_new, temperature, stop, seed, lambda ids: tokenizer.decode(ids, skip_special_tokens=True), start)

    def tick(done: int) -> None:
        if say is not None:
            say.tick("answering", done, len(prompts))

    return sample(policy, prompts, 1, how, numbers=range(len(prompts)), on_answers=tick)


def rewarded(judge: Judge, answers: Sequence[Answer]) -> dict[str, Mark]:
    """The mean of every source of reward, and how long answers are."""
    judge(answers)
    columns = {short: mean(short, [a.scores[short] for a in answers]) for short in judge.names.values()}
    return columns | {"answer tokens": mean("answer tokens", [float(len(a.ids)) for a in answers], lower_is_better=None)}
