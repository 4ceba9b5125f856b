"""What is kept of freed memory, measured in processes of their own."""

import os
import subprocess
import sys

import pytest

from luthier import heap

GROWN = """
import sys
{first}
import psutil, torch
held = lambda: psutil.Process().memory_info().rss
w = torch.randn(256, 256, dtype=torch.bfloat16)
for n in range(1, 700):
    torch.nn.functional.linear(torch.randn(n if n > 10 else 700 + n, 256, dtype=torch.bfloat16), w)
    before = held() if n == 10 else before if n > 10 else 0
print(held() - before)
"""


def grown(first: str) -> int:
    """Bytes that a process takes more after products of many different numbers of rows."""
    without = {k: v for k, v in os.environ.items() if k not in heap.KEPT}
    done = subprocess.run([sys.executable, "-c", GROWN.format(first=first)], capture_output=True, text=True, check=True, env=without, timeout=120)
    return int(done.stdout)


def test_products_of_many_sizes_leave_little_behind():
    plain, ours = grown("pass"), grown("import luthier.build")
    if plain < 5_000_000:
        pytest.skip("products on this processor leave nothing behind")
    assert ours < plain / 3


def test_a_capacity_that_the_user_chose_stands(monkeypatch):
    first, *others = heap.KEPT
    monkeypatch.setenv(first, "7")
    for name in others:
        monkeypatch.delenv(name, raising=False)
    heap.keep_few_products()
    assert os.environ[first] == "7" and all(os.environ[name] == str(heap.KEPT[name]) for name in others)
