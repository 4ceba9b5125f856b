"""The time of operations: what is counted is what really runs, and parts stand for wholes."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from configured import SMALL, deep
from luthier.planning import saved
from luthier.planning.memory import Plan, stepping, tensors_of
from luthier.planning.microbatch import batch_of, made_up, shape_of
from luthier.planning.pace import FREE, NUMBERS, Call, Like, Machine, Ops, RowKernel, part_of
from luthier.settings.run import Run
from luthier.speed import compiled

aten = torch.ops.aten
CPU = torch.device("cpu")


def recorded(run):
    plan = Plan(run)
    batch, scored = batch_of(shape_of(plan.run, plan.policy.base), plan.policy.base, plan.objective)
    plan.policy.train()
    found = []

    def watching(ours, n):
        found.append(Ops(ours, n))
        return found[0]

    ours = list(tensors_of(plan.policy, plan.optimizer))
    saved.count(plan.policy, ours, "cpu", lambda w: stepping(plan.policy, plan.objective, batch, w), scored=scored, watching=watching)
    return found[0], plan


class Real(TorchDispatchMode):
    """Counts operations on tensors with values, by themselves."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket not in FREE and not func.is_view:
            key = (str(func), tuple(tuple(t.shape) for t in tree_flatten((args, kwargs or {}))[0] if isinstance(t, torch.Tensor)))
            self.calls[key] = self.calls.get(key, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["lora", "full", "prefix"])
def test_the_products_and_attentions_that_are_counted_are_those_of_a_real_step(method, tmp_path):
    run = Run(model={"id": deep("llama", tmp_path), "random": True}, method=method, objective="text", precision="float32", **SMALL)
    ops, plan = recorded(run)
    from luthier import build

    torch.manual_seed(0)
    policy, objective = build.assemble(plan.run)
    policy.train()
    batch = made_up(shape_of(run, policy.base), policy.base, objective)
    with Real() as real:
        loss = objective.loss(policy, batch)
        torch.stack([w * loss.sums[k] / batch.units[k] for k, w in objective.terms.items()]).sum().backward()
    heavy = ("mm", "bmm", "scaled_dot_product", "softmax", "silu", "mean", "pow", "embedding")
    mine = {}
    for call, n in ops.calls.items():
        key = (str(call.func), tuple(t.shape for _, t in call.tensors))
        mine[key] = mine.get(key, 0) + n
    keep = lambda calls: {k: n for k, n in calls.items() if any(h in k[0] for h in heavy)}  # noqa: E731
    assert keep(mine) == keep(real.calls) and len(keep(mine)) > 10


@pytest.mark.parametrize(
    ("family", "method", "precision"), [("llama", "lora", "bfloat16"), ("llama", "adapter", "nf4"), ("t5", "prefix", "float32"), ("bert", "lora", "int8")]
)
def test_every_operation_of_a_step_can_be_run_by_itself(family, method, precision, tmp_path):
    objective = "classify" if family == "bert" else "sft"
    ops, _ = recorded(Run(model={"id": deep(family, tmp_path)}, method=method, objective=objective, precision=precision, **SMALL))
    timed = Machine(CPU).time(ops)
    assert [str(t.call.func) for t in timed if math.isnan(t.seconds)] == []
    assert sum(t.times for t in timed) == sum(ops.calls.values()) and all(t.seconds > 0 for t in timed)
    assert [t.total for t in timed] == sorted((t.total for t in timed), reverse=True)


def like(*shape, dtype=torch.float32):
    return Like.of(torch.empty(*shape, dtype=dtype, device="meta"))


def call(func, *leaves):
    return Call(func, leaves, "")


def test_a_large_product_is_run_in_part_and_the_part_is_its_share_of_the_work():
    small = call(aten.mm.default, like(64, 128), like(128, 256))
    assert part_of(small) == (small, 1.0)
    for m, k, n in ((8192, 4096, 4096), (64, 8192, 28672), (2048, 32000, 4096)):
        cut, share = part_of(call(aten.mm.default, like(m, k), like(k, n)))
        (_, a), (_, b) = cut.tensors
        assert a.shape[1] == b.shape[0] and share == pytest.approx(a.shape[0] * a.shape[1] * b.shape[1] / (m * k * n)) and share < 0.5
        assert 1e9 < 2 * a.shape[0] * a.shape[1] * b.shape[1] <= 6e9
    cut, share = part_of(call(aten.addmm.default, like(4096), like(8192, 4096), like(4096, 4096)))
    bias, a, b = (t for _, t in cut.tensors)
    assert torch.addmm(*(t.made(CPU) for t in (bias, a, b))).shape == (a.shape[0], b.shape[1])
    cut, share = part_of(call(aten.bmm.default, like(512, 512, 512), like(512, 512, 512)))
    assert [t.shape[1:] for _, t in cut.tensors] == [(512, 512)] * 2 and share == cut.tensors[0][1].shape[0] / 512


def test_what_goes_through_many_numbers_is_cut_along_its_longest_side():
    added = call(aten.add.Tensor, like(4, 100_000, 64), like(4, 100_000, 1))
    cut, share = part_of(added)
    a, b = (t for _, t in cut.tensors)
    assert a.shape[0] == b.shape[0] == 4 and a.shape[1] == b.shape[1] < 100_000 and a.count <= NUMBERS
    assert share == pytest.approx(a.shape[1] / 100_000)
    assert a.stride == (100_000 * 64, 64, 1)  # in memory it lies as the whole does
    few = call(aten.add.Tensor, like(1000, 64), like(64))
    assert part_of(few) == (few, 1.0)


def test_a_call_that_is_larger_takes_longer():
    machine = Machine(CPU)
    ops = Ops([])
    with ops:
        for n in (64, 1024):
            torch.empty(n, 1024, device="meta") @ torch.empty(1024, 1024, device="meta")
    small, large = sorted(machine.time(ops), key=lambda t: t.call.tensors[0][1].shape[0])
    assert large.seconds > 3 * small.seconds


@pytest.mark.skipif(compiled.kernels() is None, reason="no row kernels on this machine (no C++ compiler)")
def test_row_kernels_which_torch_does_not_see_are_counted_and_timed():
    on, off = (recorded(Run(model={"id": "fiddle"}, method="lora", precision="bfloat16", speed={"kernels": k}))[0] for k in ("auto", "off"))
    found = {c.func.name: n for c, n in on.calls.items() if isinstance(c.func, RowKernel)}
    assert {"rms", "rms_back", "rotate", "miss"} <= set(found) and not any(isinstance(c.func, RowKernel) for c in off.calls)
    timed = [t for t in Machine(CPU).time(on) if isinstance(t.call.func, RowKernel)]
    assert all(t.part == 1.0 and 0 < t.seconds < 1 for t in timed)
    assert not compiled.WATCHING  # nobody watches any more
