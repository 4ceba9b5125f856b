"""Every recipe reads, and says in its first lines what it needs and what to expect."""

from pathlib import Path

from luthier.config import load_run

RECIPES = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))


def test_every_recipe_reads_and_says_its_hardware():
    assert len(RECIPES) >= 4
    for path in RECIPES:
        run = load_run(str(path))
        assert run.name == path.stem.removeprefix("pretrain-"), path
        assert run.data.train, path
        assert "# Hardware:" in path.read_text().split("model:")[0], path
