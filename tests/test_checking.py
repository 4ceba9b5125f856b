"""The contracts for users' own files: they pass for ours, for the example in CONTRIBUTING.md, and find what is wrong with broken ones."""

import re
from pathlib import Path

import pytest

from luthier import checking
from luthier.cli import main
from luthier.settings.plugins import kinds, plugin

ROOT = Path(__file__).parent.parent


def example():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return re.search(r"```python\n(.*?)```", text, re.S).group(1)


@pytest.fixture
def check(tmp_path, capsys):
    def run(source):
        file = tmp_path / "mine.py"
        file.write_text(source)
        code = main(["kinds", "--check", str(file)])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def test_the_example_in_contributing_is_a_method_of_forty_lines_that_holds(check):
    source = example()
    code = [line for line in source.splitlines() if line.strip() and not line.strip().startswith(('"""', "#"))]
    assert len(code) <= 40
    code, out = check(source)
    assert code == 0 and "every contract holds" in out, out
    assert out.count("  ok ") >= 24


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (
            "torch.ones(n_in if on_input else n_out))",
            "torch.ones(n_in if on_input else n_out).mul(2), requires_grad=False)",
            "no gradient|does not require grad",
        ),
        ("return weight * (self.vector if self.on_input else self.vector[:, None])", "return weight", "largest relative difference"),
        ("return y if self.on_input else y * self.vector.to(y.dtype)", "return y * 1.01 if self.on_input else y * y.mean()", "differs by"),
        ("return at_sites(base", "base.model.get_input_embeddings().weight.data.mul_(1.5)\n        return at_sites(base", "are not the base's"),
    ],
)
def test_a_broken_method_is_found_out(check, before, after, said):
    source = example()
    assert before in source
    code, out = check(source.replace(before, after))
    assert code == 1 and re.search(said, out), out


@pytest.mark.parametrize("kind", [k for k in kinds("methods") if k not in ("crafted_prompt", "diff_pruning")])
def test_our_own_methods_hold(kind):
    wrong = [f for f in checking.check_method(plugin("methods", kind)()) if f.wrong]
    assert not wrong, wrong


def test_objectives_and_tasks_are_checked_too(check):
    for kind in ("sft", "text", "reward", "dpo", "kto", "orpo"):
        assert not [f for f in checking.check_objective(plugin("objectives", kind)()) if f.wrong]
    for kind in kinds("tasks"):
        assert not [f for f in checking.check_task(plugin("tasks", kind)()) if f.wrong], kind
    source = (ROOT / "src" / "luthier" / "objectives" / "sft.py").read_text()
    source = source.replace("from ..core", "from luthier.core").replace(
        "return next_token_loss(policy, batch)", "return _mean(next_token_loss(policy, batch), batch)"
    )
    source += "\n\ndef _mean(loss, batch):\n    return Loss({k: v / batch.units[k] for k, v in loss.sums.items()})\n"
    code, out = check(source)
    assert code == 1 and "return sums, not means" in out, out


def test_a_file_without_a_plug_in_is_one_sentence(check):
    code, out = check("x = 1\n")
    assert code == 2 and "no class Method, Objective or Task" in out
