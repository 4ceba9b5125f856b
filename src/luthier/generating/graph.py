"""Decoding steps that a GPU repeats without their Python: each step has the shapes and the addresses of the last, so one is recorded as a CUDA graph.

Keys and values have room for whole answers from the start, and attention goes over all of it; which of it is there is a number in memory that the graph reads.
A graph holds for one number of rows, so finished rows leave only when half have. Where recording fails (a model that asks the GPU a question on the way,
several routes in one batch), a line in the log says so and the steps run as they are.

Tested on a CPU for what it computes; the recording itself runs in tests/gpu only.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .decoding import DecoderSteps, Steps, fits_a_grid, steps_for

WARM = 2  # steps run before one is recorded: libraries set themselves up in the first
_said: set[str] = set()


def recorded(policy: Any, routes: Sequence[str | None]) -> Steps:
    """Steps that are recorded where a model's kind allows it."""
    if policy.base.anatomy.kind == "decoder" and fits_a_grid(policy):
        return GraphSteps(policy, routes)
    _say("this model's attention is its own")
    return steps_for(policy, routes)


def _say(why: str) -> None:
    """Once in a process."""
    if why not in _said:
        _said.add(why)
        logging.getLogger("luthier").warning("decoding steps are not recorded as a CUDA graph, and run one call at a time: %s", why)


class GraphSteps(DecoderSteps):
    """A decoder whose attention is ours, its steps recorded."""

    static, drop_at = True, 0.5
    usable = True  # until recording fails

    def fork(self, samples: int, most: int, *, last: bool = True) -> None:
        super().fork(samples, most, last=last)
        self._forget()

    def keep(self, rows: Sequence[int]) -> None:
        super().keep(rows)
        self._forget()

    def _forget(self) -> None:
        self.graph: Any = None
        self.steps = 0

    def go_on(self, token_B: Tensor) -> Tensor:
        if self.steps == 0:
            self.token_B, self.position_B = token_B.clone(), self.next_B.clone()
        else:
            self.token_B.copy_(token_B)
            self.position_B.copy_(self.next_B)
        self.next_B = (self.next_B + 1).clamp(max=self.last)
        with self.grid.step() as plans:
            if self.graph is None and self.steps >= WARM and self.usable:
                self._record(plans)
            if self.graph is not None:
                self.graph.replay()
            else:
                self.hidden_BD = self._forward(self.token_B, self.position_B, plans)
        self.steps += 1
        return self.hidden_BD

    def _record(self, plans: dict[Any, Any]) -> None:
        try:
            if self.device.type != "cuda":
                raise RuntimeError(f"the model is on {self.device.type}")
            if len(set(self.routes)) > 1:
                raise RuntimeError("one batch has several routes")
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.hidden_BD = self._forward(self.token_B, self.position_B, plans)
            self.graph = graph
        except RuntimeError as e:
            self.usable = False
            _say(str(e).splitlines()[0])
