"""The row kernels of rows.cpp for GPUs, in Triton: every number is read once and written once, sums are fp32, 16 bits are rounded once.

Read by jitted.py where triton is installed, and by nothing else. Names and the order of pointers are those of rows.cpp; widths are constants of the compiled
code, for a run has few of them, while numbers of rows are not. No fast-math: what is no number stays none. Only what is constant has a type: triton reads types
as values.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def miss(logits, token, logp, scale, V: tl.constexpr, WRITE: tl.constexpr, WIDE: tl.constexpr):
    """Logits (n, V) become scale * (softmax - one at the token), a program a row; logp (n,)."""
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * V
    at = tl.load(token + row)
    mine = tl.load(line + at).to(tl.float32) * scale  # before it is written over
    top = float("-inf")
    total = 0.0
    for start in range(0, V, WIDE):
        col = start + tl.arange(0, WIDE)
        x = tl.load(line + col, mask=col < V, other=float("-inf")).to(tl.float32) * scale
        most = tl.maximum(top, tl.max(x, 0))
        base = tl.where(most == float("-inf"), 0.0, most)  # nothing but -inf so far: no difference of two of them
        total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base), 0)
        top = most
    rest = tl.log(total)  # apart from top, which may be so large that it would be lost in it
    own = mine - top - rest
    tl.store(logp + row, own)
    if WRITE:
        for start in range(0, V, WIDE):
            col = start + tl.arange(0, WIDE)
            x = tl.load(line + col, mask=col < V, other=float("-inf")).to(tl.float32) * scale
            p = tl.exp(x - top - rest) - tl.where(col == at, 1.0, 0.0)
            tl.store(line + col, (scale * p).to(logits.dtype.element_ty), mask=col < V)


@triton.jit(do_not_specialize=["n"])
def rms(x, w, y, inverse, n, eps, D: tl.constexpr, PLUS_ONE: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """y = w * round(x / rms(x)); PLUS_ONE (Gemma): y = (1 + w) * x / rms(x). Keeps 1 / rms(x), (n,)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, WIDE)
    real = (row < n)[:, None] & (col < D)[None, :]
    at = row[:, None] * D + col[None, :]
    value = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    gain = tl.load(w + col, mask=col < D, other=0.0).to(tl.float32)[None, :]
    by = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(value * value, 1) / D + eps))
    tl.store(inverse + row, by, mask=row < n)
    normed = value * by[:, None]
    if PLUS_ONE:
        out = (1.0 + gain) * normed
    else:
        out = gain * normed.to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["n"])
def rms_back(g, x, w, inverse, dx, n, D: tl.constexpr, PLUS_ONE: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """dx = (u - x mean(u x) / rms^2) / rms with u = w g, or (1 + w) g."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, WIDE)
    real = (row < n)[:, None] & (col < D)[None, :]
    at = row[:, None] * D + col[None, :]
    value = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    gain = tl.load(w + col, mask=col < D, other=0.0).to(tl.float32)[None, :]
    if PLUS_ONE:
        gain += 1.0
    up = gain * tl.load(g + at, mask=real, other=0.0).to(tl.float32)
    by = tl.load(inverse + row, mask=row < n, other=0.0)
    back = tl.sum(up * value, 1) / D * by * by
    tl.store(dx + at, ((up - value * back[:, None]) * by[:, None]).to(dx.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["n"])
def rms_weight(g, x, inverse, parts, n, D: tl.constexpr, PLUS_ONE: tl.constexpr, LINES: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """The gradient of w: sums over LINES rows of g * round(x / rms), fp32 (n / LINES, D); these are added up in order, so that the same gives the same."""
    col = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    part = tl.program_id(1).to(tl.int64)
    total = tl.zeros((WIDE,), dtype=tl.float32)
    for start in range(0, LINES, ROWS):
        row = part * LINES + start + tl.arange(0, ROWS)
        real = (row < n)[:, None] & (col < D)[None, :]
        at = row[:, None] * D + col[None, :]
        normed = tl.load(x + at, mask=real, other=0.0).to(tl.float32) * tl.load(inverse + row, mask=row < n, other=0.0)[:, None]
        if not PLUS_ONE:
            normed = normed.to(x.dtype.element_ty).to(tl.float32)
        total += tl.sum(tl.load(g + at, mask=real, other=0.0).to(tl.float32) * normed, 0)
    tl.store(parts + part * D + col, total, mask=col < D)


@triton.jit
def swiglu(gate, up, h, n, WIDE: tl.constexpr):
    """h = silu(gate) * up, n numbers."""
    at = tl.program_id(0).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    e = tl.load(gate + at, mask=at < n, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < n, other=0.0).to(tl.float32)
    silu = (e / (1.0 + tl.exp(-e))).to(h.dtype.element_ty).to(tl.float32)
    tl.store(h + at, (silu * u).to(h.dtype.element_ty), mask=at < n)


@triton.jit
def swiglu_back(g, gate, up, dgate, dup, h, n, WIDE: tl.constexpr):
    """From the gradient of h: those of gate and up, and h again."""
    at = tl.program_id(0).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    e = tl.load(gate + at, mask=at < n, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < n, other=0.0).to(tl.float32)
    d = tl.load(g + at, mask=at < n, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-e))
    silu = e * s
    tl.store(dup + at, (d * silu).to(dup.dtype.element_ty), mask=at < n)
    tl.store(dgate + at, (d * u * (s + silu * (1.0 - s))).to(dgate.dtype.element_ty), mask=at < n)
    tl.store(h + at, (silu.to(h.dtype.element_ty).to(tl.float32) * u).to(h.dtype.element_ty), mask=at < n)


@triton.jit
def rotate(x, cosine, sine, y, HEADS: tl.constexpr, D: tl.constexpr, BACK: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Rotary positions (n, heads, d): y = x cos + (-x2, x1) sin for the halves x1, x2 of a head; cos and sin (n, d). BACK: the way back."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    half: tl.constexpr = D // 2
    j = tl.arange(0, WIDE)
    real = (head < HEADS)[:, None] & (j < half)[None, :]
    at = (row * HEADS + head)[:, None] * D + j[None, :]
    a = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    b = tl.load(x + at + half, mask=real, other=0.0).to(tl.float32)
    line = row * D + j
    c1 = tl.load(cosine + line, mask=j < half, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cosine + line + half, mask=j < half, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sine + line, mask=j < half, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sine + line + half, mask=j < half, other=0.0).to(tl.float32)[None, :]
    if BACK:
        first = a * c1 + b * s2
        second = b * c2 - a * s1
    else:
        first = a * c1 - b * s1
        second = b * c2 + a * s2
    tl.store(y + at, first.to(y.dtype.element_ty), mask=real)
    tl.store(y + at + half, second.to(y.dtype.element_ty), mask=real)
