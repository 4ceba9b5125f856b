"""A plan for many ranks in lines: a table over the ways the base may lie, and what one of them takes in full."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from ..amounts import seconds, size
from ..errors import LuthierError
from ..settings.plugins import kind_of
from ..settings.run import Run
from .gpus import Gpu, Mesh
from .scale import Layout, Outlook, Scale, layouts

HEADS = ("shard", "a rank holds", "traffic a step", "a step", "of it waiting", "tokens/s", "")


def lines(run: Run, mesh: Mesh, gpu: Gpu, rooms: Mapping[str, int], only: str | None = None) -> Iterator[str]:
    """What a run takes on a mesh. ``rooms``: names and bytes of the devices that it is judged by; ``only``: this choice of place.shard.

    Raises LuthierError for what is not there on such a mesh.
    """
    found, where = {layout.shard: layout for layout in layouts(mesh)}, "one machine" if mesh.machines == 1 else f"{mesh.machines} machines"
    if only is not None and only not in found:
        raise LuthierError(f"place.shard: {only} is not there on {mesh.ranks} ranks of {where}; accepted are auto, {', '.join(found)}")
    scale, room = Scale(run, gpu), max(rooms.values())
    every = {name: scale.outlook(run, mesh, layout) for name, layout in found.items()}
    plan = scale.plan
    yield f"base {run.model.id}: {plan.policy.base.anatomy.family}, {plan.whole:,} parameters, precision {kind_of(plan.run.precision)}"
    yield f"method {kind_of(run.method)}: {plan.trained:,} trained parameters; objective {kind_of(run.objective)}; recompute {run.recompute}"
    yield (
        f"{mesh.ranks:,} ranks{f' on {where} of {mesh.local}' if mesh.machines > 1 else ''}, each {'an' if gpu.name[0] in 'ahlr' else 'a'} {gpu.name}: "
        f"{gpu.memory:g} GB, {gpu.bfloat16:g} TFLOP/s in bfloat16, {gpu.link:g} GB/s to its neighbours"
        + (f", {gpu.network:g} GB/s of network" if mesh.machines > 1 else "")
    )
    chosen = scale.auto(mesh, room) if only is None else found[only]
    mine = every[chosen.shard]
    yield from _step(run, mine)
    yield ""
    yield from _table(every.values(), chosen, rooms)
    yield f"place.shard={chosen.shard}{', which auto chooses: ' + chosen.why if only is None else ''}"
    yield ""
    yield from _parts(mine)


def _step(run: Run, o: Outlook) -> Iterator[str]:
    each = f", each shared by {run.place.context} ranks" if run.place.context > 1 else ""
    yield f"a step: {o.tokens:,} tokens; a rank's part: {o.micro_batches:,} micro-batch{'es' if o.micro_batches > 1 else ''} of {o.shape}{each}"
    if o.idle:
        yield f"  {o.idle:,} of {o.mesh.ranks:,} ranks have nothing to do in a step: there are fewer examples than ranks (optim.batch_tokens)"


def _table(every: Iterable[Outlook], chosen: Layout, rooms: Mapping[str, int]) -> Iterator[str]:
    rows = [HEADS]
    for o in every:
        fits = [name for name, room in rooms.items() if o.total <= room]
        waiting = o.step - o.seconds["computing"] - o.seconds["updating"]
        rows.append(
            (
                o.layout.shard,
                size(o.total),
                size(sum(o.traffic.values())),
                seconds(o.step),
                f"{waiting / o.step:.1%}",
                f"{o.tokens / o.step:,.0f}",
                f"fits {', '.join(fits)}" if fits else f"fits none of {', '.join(rooms)}",
            )
        )
    widths = [max(len(r[i]) for r in rows) for i in range(len(HEADS))]
    for r in rows:
        mark = "* " if r[0] == chosen.shard else "  "
        yield (mark + r[0].ljust(widths[0]) + "".join("  " + r[i].rjust(widths[i]) for i in range(1, len(r) - 1)) + "  " + r[-1]).rstrip()


def _parts(o: Outlook) -> Iterator[str]:
    """Memory, traffic and time of one choice, by what they are."""
    parts: Mapping[str, float]
    said: Callable[[float], str]
    for title, parts, said in (
        ("memory of a rank", o.standing | o.working, size),
        ("handed to collectives in a step", o.traffic, size),
        ("a step", o.seconds, seconds),
    ):
        whole = sum(parts.values())
        shown = {k: n for k, n in parts.items() if n > 0.0005 * whole}
        if shown:
            yield f"{title}: {said(whole)}"
            yield from (f"  {name:<36}{said(n):>12}" for name, n in sorted(shown.items(), key=lambda p: -p[1]))


def of_ranks(run: Run) -> Run:
    """The run on a place of several processes, whichever it names."""
    if kind_of(run.place) == "fsdp":
        return run
    from ..settings.plugins import plugin

    return replace(run, place=plugin("place", "fsdp")(on=run.place.on))
