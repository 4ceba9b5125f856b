"""The crafted prompt: what it puts before an example, how it is chosen, and that a run of it saves and reloads."""

import json

import numpy as np
import pytest
import torch

import tiny
from luthier import opening
from luthier.core import Incompatible, Row, next_token_batch
from luthier.methods.crafted_prompt import Method
from luthier.policy import Policy
from luthier.running.starting import execute
from luthier.settings.run import Checkpoint, Data, Evaluate, Model, Optim, Run


def test_it_is_the_same_as_writing_the_tokens_before_the_text():
    base = tiny.base("llama")
    lead, row = [5, 6, 7, 8], tiny.rows(1)[0]
    policy = Policy(base, Method(ids=tuple(lead)).attach(base, "default"))
    written = tiny.row([*lead, *row.ids.tolist()])
    with torch.no_grad():
        ours = policy.hidden(next_token_batch([row], pad=0, packed=False))[0, : len(row)]
        policy.use(None)
        plain = policy.hidden(next_token_batch([written], pad=0, packed=False))[0, len(lead) : len(written)]
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-6)


def test_candidates_are_seeded_and_fit():
    rows = [Row(np.full(10, i, dtype=np.int32), np.ones(10, dtype=bool)) for i in range(20)]
    method = Method(instructions=("",), shots=(0, 1, 3), tries=3, max_tokens=25)
    found = method.candidates(rows, None, limit=1000, seed=0)
    assert found == method.candidates(rows, None, limit=1000, seed=0) != method.candidates(rows, None, limit=1000, seed=1)
    assert {len(m.ids) for m in found} == {0, 10}  # three examples are 30 tokens, more than 25
    with pytest.raises(Incompatible, match="no candidate prompt fits 5 tokens"):
        Method(instructions=("",), shots=(1,)).candidates(rows, None, limit=5, seed=0)


def test_a_run_chooses_saves_and_reloads(tmp_path):
    folder = tiny.folder(tmp_path / "base")
    data = tmp_path / "own.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i} and {i}?", "completion": f"{2 * i}"}) + "\n" for i in range(30)))
    result = execute(
        Run(
            model=Model(id=str(folder)),
            data=Data(train=(str(data),), validation_share=0.3),
            method={"kind": "crafted_prompt", "shots": [0, 1, 2], "tries": 3, "max_tokens": 200},
            precision="float32",
            optim=Optim(steps=3),
            evaluate=Evaluate(samples=0),
            checkpoint=Checkpoint(),
            out=str(tmp_path / "runs"),
        )
    )
    tried = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [t["loss"] for t in tried if "tokens" in t and t.get("place")]
    assert len(losses) >= 6 and losses == sorted(losses)
    assert result.after.loss.value == pytest.approx(min(losses), rel=1e-5)
    chosen = json.loads((result.artefact / "luthier.json").read_text())["method"]
    assert chosen["kind"] == "crafted_prompt"
    again = opening.load(result.artefact, precision="float32")
    assert list(again.method.ids) == list(chosen["ids"])
    batch = next_token_batch(tiny.rows(2), pad=0, packed=False)
    with torch.no_grad():
        with_it = again.hidden(batch)
        again.use(None)
        assert (again.hidden(batch) - with_it).abs().max() > 0 or not chosen["ids"]
