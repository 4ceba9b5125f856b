"""What is fitted to growth: powers that are known, surprises that are there, and the page that keeps its other sections."""

from __future__ import annotations

import pytest

growth = pytest.importorskip("benchmarks.growth", reason="psutil and rich come with the benchmarks")
from benchmarks import kept, page  # noqa: E402

X = [1, 2, 4, 8, 16]


def document(**changed):
    """Every axis as it may grow, but for those that are given."""
    shapes = {a.name: (lambda x, a=a: 1.0 + min(a.time, 1.0) * x / 4, lambda x, a=a: 100.0 + 50 * min(a.memory, 1.0) * x) for a in growth.AXES}
    shapes |= changed
    points = {n: [{"x": x, "step_s": time(x), "median_s": time(x), "mib": memory(x)} for x in X] for n, (time, memory) in shapes.items()}
    machine = {"cpu": "", "cores": 2, "packages": {"torch": "2"}}
    return {"date": "", "machine": machine, "points": points, "notes": []}


@pytest.mark.parametrize("p", [0.5, 1.0, 1.5, 2.0])
def test_the_power_is_found_beside_what_is_always_there(p):
    assert growth.power(X, [3.0 + 2.0 * x**p for x in X]) == pytest.approx(p, abs=0.03)


def test_what_does_not_grow_is_flat():
    assert growth.power(X, [1.0, 1.05, 0.98, 1.02, 1.1]) is None


def test_nothing_is_called_a_surprise_where_all_grows_as_it_must():
    assert growth.surprises(document())[0] == "Nothing grows faster than it has to."


def test_a_quadratic_mask_and_idle_deltas_that_cost_are_named():
    said = growth.surprises(
        document(**{"tokens of a document": (lambda x: 1.0, lambda x: 50 + x * x), "deltas on the base": (lambda x: 1.0 + x, lambda x: 1.0)})
    )
    assert [s for s in said if s.startswith("Surprise")] == [
        "Surprise: memory grows with tokens of a document to the power of 2.00, where no growth was expected "
        "(2,048 tokens a step: attention grows with a document, a mask with its square).",
        "Surprise: the time of a step grows with deltas on the base to the power of 1.00, where no growth was expected "
        "(one of them trained; the others are kept, and nothing is computed with them).",
    ]


def test_noise_is_no_surprise_and_growth_that_noise_does_not_explain_is_one():
    noisy = [1.08, 0.95, 1.05, 0.93, 1.07]
    assert growth.explained(X, [y * n for y, n in zip([3.0 + 2.0 * x for x in X], noisy, strict=True)], 1.15)
    assert not growth.explained(X, [3.0 + 2.0 * x**1.6 for x in X], 1.15)
    assert not growth.explained(X, [1.0 + x for x in X], 0.0)


def test_the_section_takes_its_own_place_and_stays_when_the_page_is_written_anew(tmp_path):
    file = tmp_path / "benchmarks.md"
    file.write_text("# Benchmarks\n\nold ones\n\n<!-- begin: benchmarks.stored -->\n\nstored\n\n<!-- end: benchmarks.stored -->\n")
    growth.put(file, "first")
    growth.put(file, "second")
    page.write(file, {"results": []})
    text = file.read_text()
    assert "old ones" not in text
    assert "first" not in text
    for kept_text in ("## Bases in codes", "stored", "## Cost of growth", "second"):
        assert text.count(kept_text) >= 1
    assert text.count(growth.BEGIN) == 1
    assert kept.PAGE.name == file.name


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    growth.draw(document(), tmp_path / "images" / "growth.png")
    assert (tmp_path / "images" / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("axis", [a.name for a in growth.AXES])
def test_one_thing_is_changed_on_every_axis(axis):
    base, other = (growth._at(axis, value, quick=True) for value in (64, 128))
    changed = [k for k in vars(base[0]) if getattr(base[0], k) != getattr(other[0], k)] + [i for i in (1, 2, 3) if base[i] != other[i]]
    assert len(changed) == 1
