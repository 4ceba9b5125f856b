"""Every recipe reads, and says in its first lines what it needs and what to expect."""

from pathlib import Path

from luthier.settings.config import load_run
from luthier.staging.stages import has_stages, load_stages

RECIPES = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))


def test_every_recipe_reads_and_says_its_hardware():
    assert len(RECIPES) >= 4
    for path in RECIPES:
        stages = load_stages(path) if has_stages(path) else None
        assert stages is None or not stages.notes, path
        runs = [load_run(str(path))] if stages is None else [s.asked for s in stages.stages]
        assert (runs[0].name if stages is None else stages.name) in (path.stem.removeprefix("pretrain-"), f"{path.parent.name}-{path.stem}"), path
        assert all(run.data.files for run in runs), path
        assert "# Hardware:" in path.read_text().split("model:")[0], path
