"""What a tokenizer does, found out once: whether it puts a token before a text, which tokens end a turn, and where each token lies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from ..core import LuthierError

T = TypeVar("T")
Made = TypeVar("Made")
Out = TypeVar("Out")
BATCH_ROWS, BATCH_CHARS = 1000, 4_000_000  # given to the tokenizer at a time


class Codec:
    """A tokenizer, called only in ways that never add a token by themselves."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.eos: int | None = tokenizer.eos_token_id
        self.fast: bool = bool(tokenizer.is_fast)
        bos = tokenizer.bos_token_id
        alone = tokenizer("a", verbose=False)["input_ids"]
        self.bos: int | None = bos if bos is not None and alone[:1] == [bos] else None  # only where the tokenizer itself would add it
        special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special} | set(tokenizer.all_special_ids)
        never = {bos, tokenizer.pad_token_id, tokenizer.unk_token_id} - {self.eos}
        self.ends: frozenset[int] = frozenset(special - never)  # tokens that can end a turn
        self.bos_ids: frozenset[int] = frozenset() if bos is None or bos == self.eos else frozenset({bos})

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """(length,) int32 of each text, with nothing added."""
        if not texts:
            return []
        if self.fast:  # straight to the tokenizer's own code: without offsets it is twice as fast
            return [np.array(e.ids, dtype=np.int32) for e in self._backend().encode_batch_fast(list(texts), add_special_tokens=False)]
        ids = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]
        return [np.asarray(i, dtype=np.int32) for i in ids]

    def encode_spans(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, (length, 2) first and last + 1 character of each token) of each text. Fast tokenizers only."""
        if not texts:
            return []
        found = self._backend().encode_batch(list(texts), add_special_tokens=False)
        spans = lambda e: np.fromiter(chain.from_iterable(e.offsets), np.int64, 2 * len(e)).reshape(-1, 2)  # noqa: E731 (half the time of np.array)
        return [(np.array(e.ids, dtype=np.int32), spans(e)) for e in found]

    def _backend(self) -> Any:
        self.reset()
        return self.tokenizer.backend_tokenizer

    def reset(self) -> None:
        """A tokenizer.json can ask for padding or truncation, and a call that cuts leaves it so; here both would be silent damage."""
        if self.fast:
            backend = self.tokenizer.backend_tokenizer
            if backend.padding is not None:  # asked first: a tokenizer that another thread is reading with cannot be changed
                backend.no_padding()
            if backend.truncation is not None:
                backend.no_truncation()

    @property
    def around(self) -> tuple[np.ndarray, np.ndarray]:
        """What the tokenizer puts before and behind a text ([CLS], [SEP])."""
        whole, inner = (self.tokenizer("a", add_special_tokens=add, verbose=False)["input_ids"] for add in (True, False))
        at = next((i for i in range(len(whole) - len(inner) + 1) if whole[i : i + len(inner)] == inner), len(whole))
        return np.array(whole[:at], dtype=np.int32), np.array(whole[at + len(inner) :], dtype=np.int32)

    @property
    def separator(self) -> np.ndarray:
        """What stands between two texts of a decoder's row: the separator token, else the end of sequence, else a line break."""
        for token in (self.tokenizer.sep_token_id, self.eos):
            if token is not None:
                return np.array([token], dtype=np.int32)
        return self.encode(["\n"])[0]

    def lacks_bos(self, ids: np.ndarray) -> bool:
        """Whether this tokenizer would put its beginning token before these."""
        return self.bos is not None and (not len(ids) or int(ids[0]) != self.bos)

    def with_bos(self, ids: np.ndarray, what: str) -> np.ndarray:
        """The ids with exactly the beginning token this tokenizer wants: put there where it is missing, never a second one."""
        if self.lacks_bos(ids):
            return np.concatenate([[self.bos], ids]).astype(np.int32)
        if len(ids) > 1 and ids[0] == ids[1] and int(ids[0]) in self.bos_ids:
            token = self.tokenizer.convert_ids_to_tokens(int(ids[0]))
            raise LuthierError(f"{what} begins with {token} twice. Models see it once: remove it from the template or from the text.")
        return ids


def in_batches(items: Iterable[T], size: Any) -> Iterator[list[T]]:
    """Lists of at most BATCH_ROWS items and about BATCH_CHARS characters; ``size(item)`` counts an item's."""
    batch: list[T] = []
    chars = 0
    for item in items:
        batch.append(item)
        chars += size(item)
        if len(batch) >= BATCH_ROWS or chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def one_ahead(items: Iterable[T], make: Callable[[T], Made], work: Callable[[Made], Out]) -> Iterator[tuple[T, Made, Out]]:
    """(item, make(item), work of that) in order, the work done by a thread while the next item is made.

    For a fast tokenizer, which lets Python run meanwhile: texts are rendered while those before them are cut into tokens.
    """
    with ThreadPoolExecutor(1) as worker:
        before: tuple[T, Made, Future[Out]] | None = None
        for item in items:
            made = make(item)
            now = (item, made, worker.submit(work, made))
            if before is not None:
                yield before[0], before[1], before[2].result()
            before = now
        if before is not None:
            yield before[0], before[1], before[2].result()
