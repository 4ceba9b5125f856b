"""How blocks are wired: what is measured equals what the model computes, on every family."""

import pytest
import torch

import tiny
from luthier.core import next_token_batch
from luthier.modelling.anatomy import blocks, modules
from luthier.modelling.wiring import wirings
from luthier.policy import Policy

NORMED_SUM = {"bert", "roberta", "bart"}


@pytest.mark.parametrize("family", tiny.MODELS)
def test_stream_and_closing_norm_are_what_the_model_computes(family):
    base = tiny.base(family)
    own, everything = blocks(base.model), dict(modules(base.model))
    ways, seen = wirings(base, own), {}

    def record(path):
        everything[path].register_forward_hook(lambda m, args, out: seen.__setitem__(path, (args[0], out[0] if isinstance(out, tuple) else out)))

    for path in {p for b in own for p in (b.path, b.mlp_out, b.attention_out, ways[b.path].stream)}:
        record(path)
    policy = Policy(base)
    b = next_token_batch(tiny.rows_for(family, 2), pad=policy.pad, packed=False)
    with torch.no_grad():
        policy.hidden(b)
    multiplier = getattr(base.model.config, "residual_multiplier", 1.0)
    beside = getattr(base.model.config, "use_parallel_residual", False) or family in ("phi", "cohere")  # attention and feed-forward read one stream
    for block in own:
        way = ways[block.path]
        total = seen[way.stream][0] + multiplier * (seen[block.mlp_out][1] + (seen[block.attention_out][1] if beside else 0))
        with torch.no_grad():
            torch.testing.assert_close(total if way.closing is None else everything[way.closing](total), seen[block.path][1], atol=1e-5, rtol=1e-5)
        assert (way.closing is not None) == (family in NORMED_SUM)
