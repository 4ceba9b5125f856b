"""Networks that make virtual tokens: a table alone, or a table read through an MLP or an LSTM (reparameterisation).

The network helps training and is dropped afterwards: what serves is its output.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn


class Table(nn.Module):
    """(P, out) trained directly."""

    def __init__(self, length: int, out: int, *, std: float = 0.02, device: Any = None):
        super().__init__()
        self.table = nn.Parameter(torch.randn(length, out, device=device) * std)

    def forward(self) -> Tensor:
        return self.table


class Projected(nn.Module):
    """(P, out) = start + W2 tanh(W1 E + b1) + b2, with E (P, width) trained too (Li & Liang, 2021, section 4.3).

    ``start`` (P, out), frozen, is what the prefix begins as; W2 and b2 begin at 0 where it is given.
    """

    def __init__(self, length: int, width: int, hidden: int, out: int, *, device: Any = None):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(length, width, device=device))
        self.up = nn.Linear(width, hidden, device=device)
        self.down = nn.Linear(hidden, out, device=device)

    def begin_at(self, start_PO: Tensor) -> None:
        """Make ``start`` the output, until training moves it."""
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        self.register_buffer("start", start_PO.clone())

    def forward(self) -> Tensor:
        made = self.down(torch.tanh(self.up(self.embedding)))
        return made + self.start if "start" in self._buffers else made  # type: ignore[operator]


class Encoded(nn.Module):
    """(P, D) soft prompt as the output of an encoder over a trained table (Liu et al., 2021, arXiv 2103.10385, section 3.2).

    mlp: three linears with ReLU between. lstm: a two-way LSTM, then two linears with ReLU between.
    """

    def __init__(
        self, length: int, width: int, hidden: int, *, kind: Literal["mlp", "lstm"] = "mlp", layers: int = 2, dropout: float = 0.0, device: Any = None
    ):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(length, width, device=device))
        if kind == "lstm":
            self.lstm = nn.LSTM(width, hidden, layers, bidirectional=True, batch_first=True, dropout=dropout, device=device)
            parts = [nn.Linear(2 * hidden, 2 * hidden, device=device), nn.ReLU(), nn.Linear(2 * hidden, width, device=device)]
        else:
            sizes = [(width, hidden), (hidden, hidden), (hidden, width)]
            linears = [nn.Linear(a, b, device=device) for a, b in sizes]
            parts = [linears[0], nn.ReLU(), linears[1], nn.ReLU(), linears[2]]
        self.mlp = nn.Sequential(*parts)

    def forward(self) -> Tensor:
        x = self.embedding
        if hasattr(self, "lstm"):
            x = self.lstm(x[None])[0][0]
        return self.mlp(x)
