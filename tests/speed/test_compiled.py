"""The row kernels against torch in float64, and what becomes of a machine that cannot have them."""

import logging

import pytest
import torch

from luthier.nn.logprob import linear_logp
from luthier.speed import compiled
from luthier.speed.rows import Miss, Rms, swiglu, swiglu_back

needs = pytest.mark.skipif(compiled.kernels() is None, reason="no row kernels on this machine (no C++ compiler)")


@needs
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)])
def test_every_kernel_is_within_rounding_of_float64(dtype, most):
    tried = compiled.tried(compiled.kernels(), dtype, torch.Generator().manual_seed(7))
    assert len(tried) >= 5
    for name, (got, wanted) in tried.items():
        for a, b in zip(got, wanted, strict=True):
            assert float((a.double() - b).norm() / b.norm()) < most, name


@needs
def test_a_number_that_is_none_stays_none_and_infinity_is_kept():
    run = compiled.kernels()
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 40).to(dtype)
        x[1, 7] = float("nan")
        x[2, 5] = float("inf")
        y = Rms.apply(x, torch.ones(40, dtype=dtype), 1e-6, False, run)
        assert y[0].isfinite().all() and y[1].isnan().all() and y[2].isnan().any()
        h = swiglu(x, torch.ones_like(x), run)
        assert h[1].isnan().sum() == 1 and h[2, 5] == float("inf")
        logits, token = x.clone(), torch.zeros(3, dtype=torch.long)
        logp = Miss(run)(logits, token, 1.0, True)
        assert logp[0].isfinite() and logp[1].isnan() and logits[1].isnan().all()


@needs
def test_extreme_logits_have_the_log_probabilities_of_torch():
    run = Miss(compiled.kernels())
    x = torch.tensor([[0.0, 200.0, -200.0, 1e30], [-1e30, -1e30, -1e30, -1e30], [88.0, 89.0, 120.0, -3e38]])
    token = torch.tensor([0, 1, 2])
    wanted = x.log_softmax(-1).gather(1, token[:, None])[:, 0]
    torch.testing.assert_close(run(x.clone(), token, 1.0, False), wanted)


@needs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trains_head", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_log_probabilities_and_gradients_of_the_head_are_those_without_a_kernel(dtype, trains_head, scale):
    g = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, 24, generator=g).to(dtype).requires_grad_(req) for n, req in ((70, True), (501, trains_head)))
    token, up = torch.randint(0, 501, (70,), generator=g), torch.randn(70, generator=g)
    found = []
    for kernel in (None, Miss(compiled.kernels())):
        logp = linear_logp(h, w, None, token, scale=scale, kernel=kernel)
        found.append([logp, *torch.autograd.grad(logp, [t for t in (h, w) if t.requires_grad], up)])
    for a, b in zip(*found, strict=True):
        assert float((a.float() - b.float()).norm() / a.float().norm()) < (1e-6 if dtype == torch.float32 else 5e-3)
    with torch.no_grad():
        torch.testing.assert_close(linear_logp(h, w, None, token, scale=scale, kernel=Miss(compiled.kernels())), found[0][0])


def test_the_eager_form_of_the_gated_activation_is_its_derivative():
    gate, up, dh = (torch.randn(4, 6, dtype=torch.float64, requires_grad=r) for r in (True, True, False))
    wanted = torch.autograd.grad(torch.nn.functional.silu(gate) * up, [gate, up], dh)
    with torch.no_grad():
        dgate, dup, h = swiglu_back(dh, gate, up, None)
        torch.testing.assert_close(h, swiglu(gate, up, None))
    torch.testing.assert_close((dgate, dup), wanted)


@pytest.fixture
def afresh(monkeypatch, tmp_path):
    """A cache of its own, and nothing remembered before or after."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    compiled.kernels.cache_clear()
    yield tmp_path
    compiled.kernels.cache_clear()


def test_without_a_compiler_there_are_none_and_it_is_said(afresh, monkeypatch, caplog):
    monkeypatch.setattr(compiled.shutil, "which", lambda _: None)
    with caplog.at_level(logging.INFO, logger="luthier.speed"):
        assert compiled.kernels() is None
    assert "no C++ compiler" in caplog.text


@needs
def test_a_source_that_does_not_compile_leaves_nothing_behind(afresh, monkeypatch, caplog):
    (afresh / "rows.cpp").write_text("no C++")
    monkeypatch.setattr(compiled, "FOLDER", afresh)
    with caplog.at_level(logging.INFO, logger="luthier.speed"):
        assert compiled.kernels() is None
    assert "cannot compile" in caplog.text and not list((afresh / "kernels").iterdir())


@needs
def test_kernels_that_give_other_numbers_are_not_used_and_a_library_is_compiled_once(afresh, monkeypatch, caplog):
    for source in compiled.FOLDER.glob("*.[ch]pp"):
        (afresh / source.name).write_text(source.read_text().replace("d * u * (s + silu * (1.0f - s))", "d * u * (s - silu * (1.0f - s))"))
    monkeypatch.setattr(compiled, "FOLDER", afresh)
    with caplog.at_level(logging.WARNING, logger="luthier.speed"):
        assert compiled.kernels() is None
    assert "swiglu" in caplog.text
    (library,) = (afresh / "kernels").iterdir()
    made = library.stat().st_mtime_ns
    compiled.kernels.cache_clear()
    assert compiled.kernels() is None and library.stat().st_mtime_ns == made


@needs
@pytest.mark.parametrize("damage", [b"no library", b""])
def test_a_damaged_library_in_the_cache_is_made_anew(afresh, damage):
    made = compiled._library()
    made.write_bytes(damage)
    assert compiled.kernels() is not None
    assert made.stat().st_size > 1000 and list(made.parent.iterdir()) == [made]
