"""What a run replays: general text that it names, or text that the base itself writes before training.

Self-replay: pseudo-rehearsal (Robins, 1995), on language models LAMOL (Sun et al., 2019, arXiv 1909.03329). A text begins with the tokenizer's token for the
beginning of a text, after which the samples are the base's own idea of text; where there is none, with one token drawn evenly from the vocabulary (as the data
of LLM-QAT begin: Liu et al., 2023, arXiv 2305.17888, section 2.1). All else is sampled at temperature 1, nothing cut off, so it is what the base would say. How
we differ from LLM-QAT: no greedy first tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .. import atomic, references
from ..core import Incompatible, LuthierError, Objective, Row, spread_answers
from ..data.feed import Batches
from ..data.formats import Bad, read_file
from ..data.prepare import Prepared
from ..data.replay import SEED
from ..data.shapes import LOOK_AT, detect
from ..data.sources import files_of
from ..data.sources import read as open_records
from ..objectives import masked_text, sft
from ..objectives import text as text_objective
from ..policy import Policy
from ..reading import form_of, read_data
from ..settings.run import Replay, Run

Say = Callable[[str], None]
Tick = Callable[[str, int, int], None]
SELF = "self"
FEWEST = 64  # tokens: raw text is not cut shorter than this of itself
HELD = 16_384  # tokens of the source that are held out to be measured, about
SELF_ROWS, SELF_TOKENS = 512, 128


@dataclass
class Text:
    """What is replayed, what is held out of it, and the objective that learns it."""

    learner: Objective
    train: list[Row]
    held: list[Row]
    row_tokens: int


def row_tokens(run: Run, rows: list[Row]) -> int:
    """Longest piece of replayed raw text: what one step replays, so that every step gets some, but at least FEWEST tokens."""
    r, o = run.data.replay, run.optim
    if r.row_tokens is not None:
        return r.row_tokens
    assert r.share is not None
    step = o.batch_tokens if o.batch_examples is None else o.batch_examples * sum(map(len, rows)) / max(1, len(rows))
    return max(FEWEST, round(r.share / (1 - r.share) * step))


def weight(replay: Replay) -> float:
    """Of the mean loss of the replayed tokens, beside the objective's."""
    assert replay.share is not None
    return replay.share / (1 - replay.share) if replay.weight is None else replay.weight


def read(run: Run, policy: Policy, sources: tuple[str, ...], objective: Objective, *, say: Say, held: int = 0, **data: Any) -> Prepared:
    """General text as rows of ``objective``; at most ``held`` of them, and at most a twentieth, are held out."""
    share = 0.05 if held else 0.0
    own: dict[str, Any] = {"validation": (), "validation_share": share, "validation_rows": max(1, held), "shape": "auto", "columns": {}, "limit": None} | data
    asked = replace(run, objective=objective, data=replace(run.data, train=sources, mix=None, over_length="truncate", **own))
    return read_data(asked, policy.base.tokenizer, positions=policy.limit, say=say, form=form_of(policy.base))


def text_of(run: Run, policy: Policy, trained: list[Row], *, packed: bool, folder: Path, say: Say, tick: Tick) -> Text:
    """Read or sample what the run replays. ``trained``: the run's own rows; ``folder``: where what the base wrote is kept, and looked for.

    Raises LuthierError where a source cannot be read as text or conversations, Incompatible where this model cannot learn it.
    """
    kind = policy.base.anatomy.kind
    if policy.base.probes.get("head", 0.0) is None:
        raise Incompatible("data.replay.source: the language-model head is missing from this model's files, so it cannot learn text; leave data.replay out")
    length = min(row_tokens(run, trained), policy.limit, run.data.max_tokens or 2048)
    most = max(1, HELD // length)
    learner: Objective = text_objective.Objective() if kind == "decoder" else masked_text.Objective()
    out = Text(learner, [], [], length)
    files = tuple(s for s in run.data.replay.source if s != SELF)
    for source in files:
        try:
            files_of(source, run.data.split)
        except LuthierError as e:
            raise LuthierError(f"data.replay.source: {e}") from None
    chats = tuple(s for s in files if kind == "decoder" and not is_text(s, run.data.split))
    for some, how in ((chats, sft.Objective()), (tuple(s for s in files if s not in chats), learner)):
        if some:
            found = read(run, policy, some, how, say=_prefixed(say), held=most, **({"max_tokens": max(8, length)} if how is learner else {}))
            out.train += found.train
            out.held += found.validation
    if SELF in run.data.replay.source:
        written = written_by_base(run, policy, folder=folder, say=say, tick=tick)
        cut = max(1, min(most, len(written) // 20))
        out.train += written[cut:]
        out.held += written[:cut]
    total = sum(map(len, out.train))
    say(
        f"replayed: {run.data.replay.share:.1%} of the tokens of a step, on top of the data, from {len(out.train):,} rows of {total:,} tokens; "
        f"weight {weight(run.data.replay):.3g}; {len(out.held)} rows held out"
    )
    return out


def _prefixed(say: Say) -> Say:
    return lambda line: say(f"replay: {line}")


def is_text(source: str, split: str) -> bool:
    """Whether a source holds raw text rather than conversations; a Hub data set is taken for text where its first records are."""
    bad = Bad("stop")
    files = files_of(source, split)
    records = open_records(source, bad=bad, split=split) if files is None else read_file(files[0], bad=bad)
    first = list(islice(records, LOOK_AT))
    if not first:
        raise LuthierError(f"data.replay.source: {source}: no row in it.")
    return detect(first).is_text


def steady(run: Run, policy: Policy, sources: tuple[str, ...], tokens: int, *, packed: bool, say: Say) -> Batches:
    """General text in steps of ``tokens``, without an end: what PPO-ptx learns beside the rewards."""
    learner = text_objective.Objective()
    rows = read(run, policy, sources, learner, say=say).train
    how: dict[str, Any] = {"pad": policy.pad, "packed": packed, "micro_tokens": run.optim.micro_tokens, "seed": run.seed}
    how |= {"rank": run.place.rank, "size": run.place.size}
    return Batches(rows, learner.collate, batch_tokens=tokens, steps=10**9, **how)


# --- text that the base writes itself ----------------------------------------------------------------------------------


def written_by_base(run: Run, policy: Policy, *, folder: Path, say: Say, tick: Tick) -> list[Row]:
    """Texts sampled from what the policy is before training, seeded; kept in ``folder`` under the base's fingerprint and the settings.

    Raises Incompatible for a model that does not write text by itself.
    """
    r, kind, tokenizer = run.data.replay, policy.base.anatomy.kind, policy.base.tokenizer
    if kind != "decoder":
        raise Incompatible(
            f"data.replay.source: self needs a model that writes text by itself, and this one is an {kind.replace('_', '-')}; name a file instead"
        )
    count, length = r.self_rows or SELF_ROWS, min(r.self_tokens or SELF_TOKENS, policy.limit)
    started = getattr(run.method, "from_", None) is not None
    which = references.identity(policy, started)
    name = hashlib.blake2b(repr((count, length, run.seed)).encode(), digest_size=6).hexdigest()
    file = None if which is None else folder / which / f"{name}.jsonl"
    ids = policy.place.share(_known(file, count), "texts that are known")
    known = ids is not None
    if ids is None:
        starts = _beginnings(policy, count, run.seed)
        stop = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        with references.as_it_was(policy, started):
            got = spread_answers(
                policy,
                starts,
                max_new=length - 1,
                temperature=1.0,
                stop=stop,
                seed=run.seed * 100_003 + SEED,
                on_answers=lambda done: tick("texts written by the base, to be replayed", done, count),
            )
        ids = [[*s, *new] for s, new in zip(starts, got.ids, strict=True)]
        if file is not None and policy.place.leads:
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic.text(file, "".join(json.dumps({"ids": i, "text": tokenizer.decode(i)}, ensure_ascii=False) + "\n" for i in ids))
    where = "" if file is None else f" {'found' if known else 'kept'} in {file}"
    say(f"{len(ids)} texts of {sum(map(len, ids)):,} tokens that the base wrote itself,{where or ' not kept: this base has no fingerprint'}")
    long = [i for i in ids if len(i) > 1]
    return [Row(np.array(i, dtype=np.int32), np.arange(len(i)) > 0, f"written by the base: {n + 1}") for n, i in enumerate(long)]


def _beginnings(policy: Policy, count: int, seed: int) -> list[list[int]]:
    """One token each: the beginning of text, or where there is none any usual token, evenly."""
    tokenizer = policy.base.tokenizer
    if tokenizer.bos_token_id is not None:
        return [[tokenizer.bos_token_id]] * count
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    usual = np.array([i for i in range(len(tokenizer)) if i not in special])
    return [[int(i)] for i in np.random.default_rng([seed, SEED]).choice(usual, count)]


def _known(file: Path | None, count: int) -> list[list[int]] | None:
    """What was written before; None where there is no such file, or a damaged one, which is written anew."""
    if file is None or not file.is_file():
        return None
    try:
        ids = [[int(i) for i in json.loads(line)["ids"]] for line in file.read_text(encoding="utf-8").splitlines()]
    except (ValueError, KeyError, TypeError):
        return None
    return ids if len(ids) == count else None
