"""Tasks by their names with settings, and the user's own files."""

import pytest

from luthier.core import LuthierError
from luthier.feedback.rewards import open_source
from luthier.measuring.by_name import open_task, task_and_part

OWN = """
class Task:
    def rows(self, split):
        return []
    def score(self, row, answer):
        return {"length": len(answer)}
"""


def test_settings_are_read_as_a_shell_quotes_them():
    task = open_task('exact_match after="Answer: " lowercase=no')
    assert (task.after, task.lowercase) == ("Answer: ", False)
    assert open_task("f1 normalise=plain").normalise == "plain"
    assert task_and_part("instruments:facts", "rewards")[1] == "facts"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("roug", "did you mean rouge"),
        ("f1 normalize=plain", "normalise"),
        ("f1 plain", "say name=value"),
        ('exact_match after="x', "no closing quotation"),
        ("chrf words=9", "0 to 4"),
        ("instruments:facts", "leave out :facts"),
        ("./none.py", "there is no file"),
    ],
)
def test_a_name_that_cannot_be_right_is_refused_with_what_would_be(name, sentence):
    with pytest.raises(LuthierError, match=sentence):
        open_task(name)


def test_a_file_of_ones_own_is_a_task_and_a_reward(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    assert open_task(str(tmp_path / "mine.py")).score({}, "abc") == {"length": 3}
    with pytest.raises(LuthierError, match="no settings"):
        open_task(f"{tmp_path / 'mine.py'} long=yes")
    from types import SimpleNamespace

    answer = SimpleNamespace(text="four", prompt=SimpleNamespace(extras={"task": {"prompt": "x"}}, where="here"))
    assert open_source(str(tmp_path / "mine.py"), None, "reward0")([answer]) == [4.0]
