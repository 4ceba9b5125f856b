"""The row kernels in Triton against torch in float64: compiled where there is a GPU; elsewhere by triton's interpreter, which has to be asked for before
triton is first imported, and so runs these tests in a process of its own."""

import importlib.util
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny
from luthier import speed
from luthier.methods.lora import Method as Lora
from luthier.nn.logprob import linear_logp
from luthier.settings.run import Speed
from luthier.speed import compiled, jitted
from luthier.speed.norms import Normed
from luthier.speed.rows import Miss, Rms, Rotate, swiglu, swiglu_back
from speed_forms import OFF, apart, batch_for, gradients, policy_on

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_cuda = pytest.mark.skipif(not (HAS_TRITON and torch.cuda.is_available()), reason="needs a CUDA device and triton")
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs triton (CUDA builds of torch bring it) and TRITON_INTERPRET=1")
KINDS = [
    pytest.param("cpu", marks=needs_interpreter),
    pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda]),
]
# Triton's interpreter cuts off what does not fit into bfloat16, where a GPU rounds to nearest.
NEAR = {torch.float32: 2e-6, torch.bfloat16: 1e-2 if INTERPRETED else 4e-3, torch.float16: 5e-4}


def interpreted(folder, change=lambda text: text):
    """The source of the kernels as a module of its own, whose kernels triton interprets on the CPU. ``change``: of its text."""
    (folder / "rows.py").write_text(change(Path(jitted.__file__).with_name("triton_rows.py").read_text()))
    spec = importlib.util.spec_from_file_location("interpreted_rows", folder / "rows.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return jitted.Kernels(module, "cpu")


@pytest.fixture(params=KINDS)
def run(request, tmp_path):
    if request.param == "cpu":
        yield interpreted(tmp_path)
    else:
        found = jitted.kernels()
        assert found is not None, "the log says why"
        yield found


@pytest.mark.parametrize("dtype", list(NEAR))
@pytest.mark.parametrize(("n", "d"), [(5, 38), (300, 7), (1, 129), (2, 5000)])
def test_every_kernel_is_within_rounding_of_float64(run, dtype, n, d):
    tried = compiled.tried(run, dtype, torch.Generator().manual_seed(7), n, d)
    assert set(tried) == {"miss", "rms 0", "rms 1", "swiglu", "rotate"}
    for name, (got, wanted) in tried.items():
        for a, b in zip(got, wanted, strict=True):
            assert a.dtype in (dtype, torch.float32) and float((a.double() - b.detach()).norm() / b.detach().norm()) < NEAR[dtype], name


@pytest.mark.parametrize("dtype", list(NEAR))
def test_a_number_that_is_none_stays_none_and_infinity_is_kept(run, dtype):
    x = torch.randn(3, 40).to(dtype)
    x[1, 7] = float("nan")
    x[2, 5] = float("inf")
    x = x.to(run.device)
    y = Rms.apply(x, torch.ones_like(x[0]), 1e-6, False, run)
    assert y[0].isfinite().all() and y[1].isnan().all() and y[2].isnan().any()
    h = swiglu(x, torch.ones_like(x), run)
    assert h[1].isnan().sum() == 1 and h[2, 5] == float("inf")
    logits, token = x.clone(), torch.zeros(3, dtype=torch.long, device=run.device)
    logp = Miss(run)(logits, token, 1.0, True)
    assert logp[0].isfinite() and logp[1].isnan() and logits[1].isnan().all()


def test_extreme_logits_have_the_log_probabilities_of_torch(run):
    low = torch.full((4, 5000), -3e38)
    low[0, 4999], low[1, :4500], low[2, 17], low[3] = 5.0, float("-inf"), 1e30, float("-inf")  # nothing but -inf in the first piece; in all
    for x in (torch.tensor([[0.0, 200.0, -200.0, 1e30], [-1e30] * 4, [88.0, 89.0, 120.0, -3e38]]), low):
        token = torch.arange(len(x)) * (x.shape[1] // 4)
        wanted = x.log_softmax(-1).gather(1, token[:, None])[:, 0]
        got = Miss(run)(x.to(run.device), token.to(run.device), 1.0, False)
        torch.testing.assert_close(got.cpu(), wanted, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trains_head", [False, True])
def test_log_probabilities_and_gradients_of_the_head_are_those_without_a_kernel(run, dtype, trains_head):
    g = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, 24, generator=g).to(run.device, dtype).requires_grad_(req) for n, req in ((40, True), (301, trains_head)))
    token, up = torch.randint(0, 301, (40,), generator=g).to(run.device), torch.randn(40, generator=g).to(run.device)
    found = []
    for kernel in (None, Miss(run)):
        logp = linear_logp(h, w, None, token, scale=0.3, kernel=kernel)
        found.append([logp, *torch.autograd.grad(logp, [t for t in (h, w) if t.requires_grad], up)])
    for a, b in zip(*found, strict=True):
        assert float((a.float() - b.float()).norm() / a.float().norm()) < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(("heads", "d"), [(1, 2), (3, 6), (32, 128), (40, 96)])
def test_heads_of_any_number_and_width_are_turned_and_turned_back(run, heads, d):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, heads, d, generator=g).to(run.device).requires_grad_()
    angle = torch.randn(2, 3, d // 2, generator=g).repeat(1, 1, 2).to(run.device)
    cosine, sine = angle.cos(), angle.sin()
    y = Rotate.apply(x, cosine, sine, run)
    a, b = x.chunk(2, -1)
    wanted = x * cosine[:, :, None] + torch.cat([-b, a], -1) * sine[:, :, None]
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6)
    (back,) = torch.autograd.grad(y, x, y.detach())
    torch.testing.assert_close(back, x.detach(), rtol=1e-5, atol=1e-5)  # a rotation by the same angle the other way


def test_many_numbers_in_no_rows_are_all_reached(run):
    g = torch.Generator().manual_seed(0)
    gate, up, dh = (torch.randn(3000, 1, generator=g).to(run.device) for _ in range(3))
    for a, b in zip(swiglu_back(dh, gate, up, run), swiglu_back(dh, gate, up, None), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert swiglu(gate[:0], up[:0], run).shape == (0, 1)


@pytest.mark.parametrize(("family", "plus_one"), [("qwen3", False), ("gemma2", True)])
def test_a_whole_step_equals_the_plain_form(run, family, plus_one, monkeypatch):
    if run.device == "cuda":
        pytest.skip("test_on_gpu.py has whole models there")
    policy = policy_on(tiny.base(family), Lora(targets=("query", "up", "down")))
    batch = batch_for(policy, n=2)
    loss, plain, _ = gradients(policy, OFF, batch)
    monkeypatch.setattr(speed, "kernels", lambda device: run)
    other, faster, notes = gradients(policy, Speed(), batch)
    assert "9 norms" in notes and "2 attentions" in notes
    assert {m.__dict__["forward"].plus_one for m in policy.lm.modules() if isinstance(m.__dict__.get("forward"), Normed)} == {plus_one}
    assert other == pytest.approx(loss, rel=1e-6) and apart(plain, faster) < 1e-5


# --- without a GPU ----------------------------------------------------------------------------------------------------


def test_tensors_of_another_device_or_kind_are_not_taken():
    run = jitted.Kernels(None)
    half, meta = torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(2, 4, dtype=torch.float16, device="meta")
    assert not run.fits(half) and run.fits(meta, meta)
    assert not run.fits(meta, meta.float()) and not run.fits(meta.t()) and not run.fits(meta.double())


def test_on_meta_a_kernel_is_counted_and_not_run():
    run, seen = jitted.Kernels(None), []
    watch = lambda name, dtype, args: seen.append((name, dtype, args[0].shape))  # noqa: E731
    compiled.WATCHING.append(watch)
    try:
        x = torch.ones(2, 3, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
        Rms.apply(x, x.new_ones(8), 1e-6, False, run).sum().backward()
    finally:
        compiled.WATCHING.remove(watch)
    assert seen == [("rms", torch.bfloat16, (2, 3, 8)), ("rms_back", torch.bfloat16, (2, 3, 8))] and x.grad.shape == x.shape


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="triton is not installed (CUDA builds of torch bring it), or this is that process")
def test_triton_interprets_them_in_a_process_of_its_own():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not gpu", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 30


class Launches:
    """Stands for the kernels' source, and keeps what they are launched with."""

    def __init__(self):
        self.seen = {}

    def __getattr__(self, name):
        class Kernel:
            def __getitem__(_, grid):
                assert all(isinstance(n, int) and n > 0 for n in grid)
                return lambda *args, **constants: self.seen.setdefault((name, str(constants)), (args, constants))

        return Kernel()


TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", int: "i32", float: "fp32"}


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="triton is not installed (CUDA builds of torch bring it), or interprets")
@pytest.mark.parametrize("dtype", list(NEAR))
@pytest.mark.parametrize("capability", [80, 90])
def test_what_is_launched_can_be_compiled_for_gpus_that_are_not_here(dtype, capability, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from luthier.speed import triton_rows

    launches = Launches()
    compiled.tried(jitted.Kernels(launches, "cpu"), dtype, torch.Generator().manual_seed(0), n=3, d=256)
    assert {name for name, _ in launches.seen} == {"miss", "rms", "rms_back", "rms_weight", "swiglu", "swiglu_back", "rotate"}
    for (name, _), (args, constants) in launches.seen.items():
        kernel, warps = getattr(triton_rows, name), constants.pop("num_warps")
        assert len(args) + len(constants) == len(kernel.arg_names), name
        given = {n: TYPES[a.dtype if isinstance(a, torch.Tensor) else type(a)] for n, a in zip(kernel.arg_names, args, strict=False)}
        source = ASTSource(fn=kernel, signature=given | dict.fromkeys(constants, "constexpr"), constexprs=constants)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        assert made.asm["cubin"], name


@needs_interpreter
def test_kernels_that_give_other_numbers_are_not_used(tmp_path, caplog):
    changed = interpreted(tmp_path, lambda text: text.replace("d * u * (s + silu * (1.0 - s))", "d * u * (s - silu * (1.0 - s))"))
    with caplog.at_level(logging.WARNING, logger="luthier.speed"):
        assert jitted.tried(changed) is None
    assert "swiglu (float32) gives other numbers" in caplog.text
    assert jitted.tried(interpreted(tmp_path)) is not None


def test_kernels_that_cannot_be_made_are_not_used_and_it_is_said(caplog):
    with caplog.at_level(logging.WARNING, logger="luthier.speed"):
        assert jitted.tried(jitted.Kernels(None, "cpu")) is None
    assert "triton cannot make them" in caplog.text


@pytest.mark.skipif(HAS_TRITON, reason="triton is installed")
def test_without_triton_there_are_none_and_it_is_said(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    jitted.kernels.cache_clear()
    with caplog.at_level(logging.INFO, logger="luthier.speed"):
        assert jitted.kernels() is None
    jitted.kernels.cache_clear()
    assert "pip install triton" in caplog.text


def test_without_a_gpu_there_are_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    jitted.kernels.cache_clear()
    assert jitted.kernels() is None
    jitted.kernels.cache_clear()
