"""A base with its deltas and heads: what every objective trains, every evaluation scores and every answer comes from."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .core import Base, Batch, Delta, Incompatible, LuthierError, Method, Objective, Place, Rollout, Stream
from .deltas import standin
from .deltas.prompts import Longer, make_room, put_in
from .devices.device import Alone
from .devices.sharding import sharding_of
from .generating import decoding, generation, prepacked
from .generating.graph import recorded
from .modelling import attention, sharing
from .modelling.anatomy import trunk
from .modelling.site import Frame, clean_name, members, sites, using
from .nn.logprob import Kernel, chunks, linear_logp, shape_logits


class Policy(nn.Module):
    """The model being trained, or a base that serves several deltas. ``name`` is the first delta's; with no delta it is the base itself.

    A route says what serves an example: None the base, "a" a delta, "a+b" a stack of two. `use` sets it for all calls, ``batch.route`` for each
    example of a batch.
    """

    def __init__(
        self, base: Base, delta: Delta | None = None, *, method: Method | None = None, name: str = "default", heads: dict[str, nn.Module] | None = None
    ):
        super().__init__()
        self.lm = base.model
        self.heads = nn.ModuleDict(heads or {})
        self.base, self.method, self.name = base, method, name
        self.place: Place = Alone()  # type: ignore[assignment]  # what ranks there are, once it was put
        self.objective: Objective | None = None  # what it was trained with, where that is known: it reads the heads
        self.deltas: dict[str, Delta] = {}
        self.active: str | None = None
        self.kernel: Kernel | None = None  # of the head's softmax, where there is one (speed/)
        self.by_hand: Any = None  # attention over packed examples, where there is one (speed/)
        self.voices: dict[str, Any] = {}  # other roles on the same base, see voices.py
        self.voice_heads = nn.ModuleDict()  # theirs; not saved with the delta
        self.reference_route: str | None = None  # what the policy was before training
        self.trunk_cache: Any = None  # hidden states that enter the lowest block that a run changes (trunkcache.py)
        self.share_prompts: sharing.Sharing = "auto"
        self._copy: list[Any] = []  # the same where the base's own weights are trained; in a list, so that it is no part of this module
        if delta is not None:
            self.add(name, delta)
        self.use(name if delta is not None else None)

    @property
    def delta(self) -> Delta | None:
        """The delta that is trained and saved: the first."""
        return self.deltas.get(self.name)

    def add(self, name: str, delta: Delta) -> None:
        """Serve one more delta, attached to this base under this name. Raises LuthierError for a name that is taken or could not be told from a stack."""
        if name in self.deltas:
            raise LuthierError(f"there is already a delta called {name!r} on this base; there are {', '.join(self.deltas)}")
        if not name or not set(name) <= NAME_CHARACTERS:
            raise LuthierError(f"{name!r}: a delta's name takes letters, digits, - and _; + joins the names of a stack")
        self.deltas[name] = delta

    def use(self, route: str | None) -> None:
        """Choose what serves calls without a route; None: the base. Raises LuthierError for a name that is not here."""
        self._known(route)
        self.active = route
        for site in sites(self.lm).values():
            site.active = route
        standin.use(self.lm, route)

    def _known(self, *routes: str | None) -> None:
        for name in {n for r in routes for n in members(r)} - set(self.deltas):
            raise LuthierError(f"no delta is called {name!r} here; there are {', '.join(self.deltas) or 'none, only the base'}")

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.lm.parameters()).device

    @property
    def sharded(self) -> bool:
        """Whether the base lies over the ranks, so that all of them have to run the same forwards."""
        return sharding_of(self.lm) is not None

    def rest(self) -> None:
        """Give back what a forward gathered of a sharded base and left for the head: after this its parameters are this rank's parts."""
        if (sharding := sharding_of(self.lm)) is not None:
            sharding.rest()

    @property
    def limit(self) -> int:
        """Positions that are left to the text: the model's, less what the delta in use puts before it."""
        return self.base.max_positions - self.room(self.active)

    def room(self, route: str | None) -> int:
        """Positions that the prompts and prefixes of a route take."""
        return sum(self.deltas[n].shift for n in members(route))

    def trained(self) -> dict[str, nn.Parameter]:
        """Everything the optimizer moves: the delta's parameters and the heads', and those of a value voice."""
        params = dict(self.delta.params) if self.delta is not None else {}
        params |= {f"heads.{n}": p for n, p in self.heads.named_parameters()}
        if (value := self.voices.get("value")) is not None:
            own = self.deltas[value.route].params if value.route != self.name else {}
            params |= {f"value.{k}": p for k, p in own.items()} | {f"value.heads.{n}": p for n, p in value.heads.named_parameters()}
        return params

    # --- forward ------------------------------------------------------------------------------------------------------

    def hidden(self, batch: Batch, *, route: Any = "in use") -> Tensor:
        """(B, T, D) last hidden states, aligned with ``batch.ids``. Examples never see one another. An encoder-decoder gives its decoder's.

        ``route``: what serves all examples; default: the batch's routes, else what is in use.
        """
        if route == "in use":  # no name has a space
            route = self.active if batch.route is None else tuple(batch.route)
        self._known(*(route if isinstance(route, tuple) else (route,)))
        if isinstance(route, tuple) and (odd := {n for r in route for n in members(r)} & set(getattr(self.lm.get_output_embeddings(), "edits", ()))):
            raise Incompatible(f"the delta {sorted(odd)[0]} edits the head, which scores positions and not examples, so no batch is routed to it; use() it")
        if batch.source is None:
            shorter = self._shorter(batch, route)
            with self.trunk_cache.around(batch, shorter) if self.trunk_cache is not None and not self._copied() else nullcontext():
                if shorter is None:
                    return self._run(trunk(self.lm), batch, route, prompted=True)
                states = self._run(trunk(self.lm), shorter.stream, shorter.route(route), prompted=True)
            return states.flatten(0, 1).index_select(0, shorter.back).view(*batch.shape, states.shape[-1])
        source, encoded = self._encode(batch.source, route)
        seen = {"encoder_hidden_states": encoded, "encoder_attention_mask": real(source).to(self.device)}
        return self._run(self.lm.get_decoder(), batch, route, prompted=False, **seen)

    def _copied(self) -> bool:
        """Whether a copy of the model is read just now."""
        return bool(self._copy) and self.lm is self._copy[0]

    def _shorter(self, batch: Batch, route: Any) -> sharing.Shorter | None:
        """The batch with what its examples share lying once, where that is the same mathematics and pays."""
        ours = self.base.shares and self.lm.config._attn_implementation == attention.NAME
        return sharing.shorten(batch, route, self.share_prompts) if ours and batch.segments.alike else None

    def _encode(self, source: Stream, route: Any) -> tuple[Stream, Tensor]:
        """The encoder's stream, prompts included, and its hidden states."""
        longer, states = self._states(self.lm.get_encoder(), source, route, prompted=True)
        return (source if longer is None else longer.stream), states

    def _run(self, module: Any, stream: Stream, route: Any, *, prompted: bool, **more: Any) -> Tensor:
        longer, states = self._states(module, stream, route, prompted=prompted, **more)
        if longer is None:
            return states
        return states.flatten(0, 1).index_select(0, longer.back.flatten()).view(*stream.shape, states.shape[-1])

    def _states(self, module: Any, stream: Stream, route: Any, *, prompted: bool, **more: Any) -> tuple[Longer | None, Tensor]:
        """Hidden states of a stream with its prompts in front of the examples."""
        routes = route if isinstance(route, tuple) else (route,) * len(stream.segments)
        made = {r: self.prompt(r) for r in dict.fromkeys(routes)} if prompted else {}
        longer = None
        if any(p is not None for p in made.values()):
            prompts = [made[r] for r in routes]
            if (parent := stream.segments.parent) is not None:  # what goes on from another has its prompt there
                prompts = [None if p >= 0 else own for p, own in zip(parent.tolist(), prompts, strict=True)]
            longer = make_room(stream, [0 if p is None else len(p) for p in prompts], self.pad)
            stream = longer.stream
        inputs: dict[str, Any] = {**stream.inputs, **more, "use_cache": False}
        frame, where = self._frame(stream, route, seq2seq=module is not trunk(self.lm))
        with using(frame):
            if longer is None:
                inputs["input_ids"] = stream.ids
            else:
                inputs["inputs_embeds"] = put_in(self.lm.get_input_embeddings()(stream.ids), longer, prompts)
            return longer, module(**inputs, **where).last_hidden_state

    def _frame(self, stream: Stream, route: Any, *, seq2seq: bool) -> tuple[Frame, dict[str, Tensor]]:
        """The frame of a forward, and the inputs that say where examples lie."""
        prefixes = self.prefixes(route)
        ours = self.lm.config._attn_implementation == attention.NAME
        if not ours and prefixes:
            raise Incompatible(
                f"the attention of this model ({self.base.anatomy.family}) is its own, so no prefix can enter it; use a method that edits outputs"
            )
        if ours and not seq2seq:
            positions = stream.segments.positions(stream.shape) + self.base.anatomy.first_position
            example_BT = stream.segments.example(stream.shape) if isinstance(route, tuple) else None
            if prefixes:
                shift = torch.tensor([self._shift(r) for r in (route if isinstance(route, tuple) else (route,) * len(stream.segments))])
                example = stream.segments.example(stream.shape)
                positions = positions + torch.where(example < 0, 0, shift[example])
            by_hand = self.by_hand if torch.is_grad_enabled() else None  # evaluation is computed plainly: see speed/
            frame = Frame(route, stream.segments, None if example_BT is None else example_BT.to(self.device), prefixes, by_hand=by_hand)
            return frame, {"position_ids": positions.to(self.device)}
        if not stream.segments.plain:  # one example a row, masked by transformers
            raise Incompatible(f"{self.base.anatomy.family} was found to leak between examples of one row; use data.pack=no")
        return Frame(route, None, None, prefixes), {"attention_mask": real(stream).to(self.device)}

    # --- what deltas of the kind "sequence" bring ------------------------------------------------------------------------

    @property
    def pad(self) -> int:
        """A token id for places that hold no token."""
        return getattr(self.base.tokenizer, "pad_token_id", None) or 0

    def prompt(self, route: str | None) -> Tensor | None:
        """(P, D) vectors before every example of a route; a stack's come in its order."""
        parts = [made() for n in members(route) if (made := self.deltas[n].prompt) is not None]
        return torch.cat(parts) if parts else None

    def prefixes(self, route: Any) -> dict[str, Any]:
        """Keys and values by delta and attention module; made here, once a forward, outside what recomputation repeats."""
        names = dict.fromkeys(n for r in (route if isinstance(route, tuple) else (route,)) for n in members(r))
        return {n: made() for n in names if (made := self.deltas[n].prefix) is not None}

    def _shift(self, route: str | None) -> int:
        """Positions by which prefixes move the text of a route; a soft prompt moves it by standing there."""
        return sum(self.deltas[n].shift for n in members(route) if self.deltas[n].prefix is not None)

    def score(self, hidden_ND: Tensor, token_N: Tensor, *, temperature: float = 1.0, want: Sequence[str] = ("logp",)) -> dict[str, Tensor]:
        """What the head says of N scored positions, fp32 (N,) each, without N x V logits.

        logp: log p(token). entropy: of the distribution, in nats. mean_logp: average log p over the vocabulary. likeliest: 1 where no token is likelier.
        """
        head, rule = self.lm.get_output_embeddings(), self.base.anatomy
        hidden_ND = rule.before_head(self.lm, hidden_ND)
        if tuple(want) == ("logp",) and type(head).forward is nn.Linear.forward:
            weight = head.weight if head.weight.dtype == hidden_ND.dtype else head.weight.to(hidden_ND.dtype)
            kernel = self.kernel if torch.is_grad_enabled() else None  # evaluation is computed plainly: see speed/
            return {"logp": linear_logp(hidden_ND, weight, head.bias, token_N, scale=rule.head_scale / temperature, cap=rule.head_cap, kernel=kernel)}

        def some(h_nD: Tensor, token_n: Tensor) -> tuple[Tensor, ...]:
            logp_nV = (shape_logits(head(h_nD), rule.head_scale, rule.head_cap) / temperature).log_softmax(-1)
            values = {
                "logp": lambda: logp_nV.gather(1, token_n[:, None]).squeeze(1),
                "entropy": lambda: -(logp_nV.exp() * logp_nV).sum(-1),
                "mean_logp": lambda: logp_nV.mean(-1),
                "likeliest": lambda: (logp_nV.argmax(-1) == token_n).float(),
            }
            return tuple(values[w]() for w in want)

        vocabulary = self.lm.config.get_text_config().vocab_size
        parts = [checkpoint(some, hidden_ND[c], token_N[c], use_reentrant=False) for c in chunks(max(1, len(hidden_ND)), vocabulary)]
        return {w: torch.cat([p[i] for p in parts]) for i, w in enumerate(want)}

    def generate(
        self,
        source: Sequence[Sequence[int]],
        *,
        route: Sequence[str | None] | None = None,
        samples: int = 1,
        max_new: int = 64,
        batch_tokens: int | None = None,
        batch_rows: int | None = None,
        cuda_graph: bool = False,
        **how: Any,
    ) -> Rollout:
        """Continue each prompt of token ids (an encoder-decoder: answer it) ``samples`` times; the rollout holds the samples of the first prompt first.

        ``route``: what serves each prompt; default: what is in use, for all. ``max_new``: tokens of an answer at most; one of ``stop`` ends it before, and is
        kept. ``temperature`` 0 takes the likeliest token; ``top_k`` and ``top_p`` narrow the choice, 0 and 1 leave it open. An answer is a function of the
        ``seed``, its prompt's number (``numbers``; 0, 1, ... where not given) and its sample, not of what else is asked for. ``batch_tokens``: positions whose
        keys and values are held at a time, ``batch_rows``: answers written at a time, at most; default: what fits into memory (decoding.py). ``cuda_graph``: on
        a GPU, repeat a step without its Python (graph.py). ``on_token`` sees every token but the stopping one as it comes, ``on_answers`` the number of
        finished answers after every batch. Raises LuthierError for an empty or over-long prompt, and for settings out of range.
        """
        routes = [self.active] * len(source) if route is None else list(route)
        if len(routes) != len(source):
            raise LuthierError(f"{len(routes)} routes for {len(source)} prompts; every prompt has one")
        self._known(*routes)
        training = self.training
        self.eval()
        try:
            limit = self.base.max_positions - max((self.room(r) for r in set(routes)), default=0)
            with nullcontext() if self.sharded else prepacked.products(self.lm, max_new):
                return generation.generate(
                    lambda batch: (recorded if cuda_graph and not self.sharded else decoding.steps_for)(self, [routes[i] for i in batch]),
                    source,
                    limit=limit,
                    room=[limit - (0 if self.base.anatomy.kind == "encoder_decoder" else len(p)) for p in source],
                    batch_tokens=decoding.cache_tokens(self) if batch_tokens is None else batch_tokens,
                    batch_rows=decoding.rows(self) if batch_rows is None else batch_rows,
                    samples=samples,
                    max_new=max_new,
                    **how,
                )
        finally:
            self.train(training)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """What the policy was before training: no gradients, evaluation mode. That is the base with the delta off, unless another was kept (voices.py).

        Raises Incompatible for a delta that trained the base itself, of which no copy was kept.
        """
        if not self._copy and self.method is not None and self.method.edits == "weights" and not getattr(self.method, "reversible", False):
            raise Incompatible("a method that trains the base's own weights has no base left to switch to; load the base again")
        active, training, trained = self.active, self.training, self.lm
        if self._copy:
            self.lm = self._copy[0]
        else:
            self.use(self.reference_route)
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.lm = trained
            if not self._copy:
                self.use(active)
            self.train(training)

    def keep_copy(self) -> None:
        """Keep the whole model as it is now, for `reference`. Raises Incompatible for one that is sharded."""
        if self.sharded:
            raise Incompatible(
                "the reference of a method that trains every weight is a copy of the base, and this base is sharded over ranks, which a copy is not; use "
                "place.shard=none, or a method whose delta is switched off (lora)"
            )
        kept = copy.deepcopy(self.lm).requires_grad_(False).eval()
        self._copy = [kept]

    def fold(self) -> None:
        """Write the delta into the base's weights, for good. Raises Incompatible where the method cannot."""
        if self.delta is None or self.delta.fold is None:
            raise Incompatible("this delta cannot be folded into weights: it changes what no single weight holds")
        self.use(None)  # what is written to is the base's own weight, whatever stands in for it
        self.delta.fold()
        del self.deltas[self.name]


def leave_out_unread(base: Base, delta: Delta) -> None:
    """For an objective with a head of its own, which does not read the language-model head: what only that uses would get no gradient, so it is not trained."""
    read = {id(p) for p in trunk(base.model).parameters()}
    unread = {clean_name(n): p for n, p in base.model.named_parameters() if id(p) not in read}
    for key, p in list(delta.params.items()):
        path, _, leaf = key.partition(":")
        if f"{path}.{leaf.partition('.')[0]}" in unread:
            if any(p is q for q in unread.values()):
                p.requires_grad_(False)
            del delta.params[key]


NAME_CHARACTERS = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")


def real(stream: Stream) -> Tensor:
    """(B, T): where a token of an example stands."""
    return stream.segments.example(stream.shape) >= 0
