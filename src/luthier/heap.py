"""What the C library keeps of the memory that was freed, and when Python looks for garbage.

The former is of glibc alone: other allocators give back by themselves, and there is nothing to do.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

M_MMAP_THRESHOLD = -3  # of malloc.h
# What is prepared for a product, by oneDNN and by torch around it, is kept for every number of rows that was met, for the last 1,024: up to 800 MB, which a run
# that packs its examples hardly ever uses again. A micro-batch has fewer products of different sizes than these.
KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": 64, "LRU_CACHE_CAPACITY": 128}


@contextmanager
def loading() -> Iterator[None]:
    """Modules are imported, of which nothing is garbage: Python does not look for any meanwhile. Saves a quarter of the time of torch and transformers."""
    looks = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if looks:
            gc.enable()


@cache
def _glibc() -> Any:
    """The C library where it is glibc, else None."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def give_back() -> None:
    """Give what was freed so far back to the system, once. What is allocated next takes its pages anew; nothing else changes."""
    if _glibc() is not None:
        _glibc().malloc_trim(0)


def keep_few_products() -> None:
    """Keep what is prepared for as many products as a micro-batch has, unless the user says how many: before the first product of a process, which is when it
    is looked for."""
    for name, n in KEPT.items():
        os.environ.setdefault(name, str(n))


def give_back_always() -> None:
    """From here on large blocks are mapped one by one, and unmapped when they are freed: for a process that gathers and frees at every step.

    glibc keeps freed blocks for later, and before 2.38 aligned ones (all of PyTorch's) hardly ever fit again: a rank that had gathered every block once would
    hold memory for all of them. It costs a page fault for each 4 KB of whatever is large and short-lived; `give_back` does not.
    """
    if _glibc() is not None:
        _glibc().mallopt(M_MMAP_THRESHOLD, 256 * 1024)
