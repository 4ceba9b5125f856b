// What lies between the matrix products of a step, a row at a time: every number is read once and written once, sums are fp32, 16 bits are rounded once.
// Compiled where it is used (compiled.py) and called through ctypes, so it includes nothing of torch. Rows are shared among the threads torch has.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "numbers.hpp"

namespace {

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// Logits (n, V) become softmax - one at the token; logp (n,). ``write`` 0: only logp.
template <class T> void miss(T* logits, const int64_t* token, float* logp, int64_t n, int64_t V, float scale, int write, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        T* row = logits + i * V;
        float most = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : most)
        for (int64_t j = 0; j < V; j++) {
            const float x = load(row[j]);
            most = x > most ? x : most;
        }
        const float top = most * scale;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < V; j++) sum += exponential(load(row[j]) * scale - top);
        const float rest = std::log(sum);  // apart from top, which may be so large that it would be lost in it
        const float own = load(row[token[i]]) * scale - top - rest;
        logp[i] = own;
        if (!write) continue;
#pragma omp simd
        for (int64_t j = 0; j < V; j++) store(&row[j], scale * exponential(load(row[j]) * scale - top - rest));
        store(&row[token[i]], scale * (std::exp(own) - 1.0f));
    }
}

// y = w * round(x / rms(x)); plus_one (Gemma): y = (1 + w) * x / rms(x). Keeps 1 / rms(x), (n,).
template <class T> void rms(const T* x, const T* w, T* y, float* inverse, int64_t n, int64_t d, float eps, int plus_one, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const T* row = x + i * d;
        float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (int64_t j = 0; j < d; j++) squares += load(row[j]) * load(row[j]);
        const float by = 1.0f / std::sqrt(squares / static_cast<float>(d) + eps);
        inverse[i] = by;
        T* out = y + i * d;
        if (plus_one) {
#pragma omp simd
            for (int64_t j = 0; j < d; j++) store(&out[j], (1.0f + load(w[j])) * (load(row[j]) * by));
        } else {
#pragma omp simd
            for (int64_t j = 0; j < d; j++) store(&out[j], load(w[j]) * rounded<T>(load(row[j]) * by));
        }
    }
}

// dx = (u - x mean(u x) / rms^2) / rms with u = w g, or (1 + w) g.
template <class T>
void rms_back(const T* g, const T* x, const T* w, const float* inverse, T* dx, int64_t n, int64_t d, int plus_one, int threads) {
    const float more = plus_one ? 1.0f : 0.0f;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const T *up = g + i * d, *row = x + i * d;
        float along = 0.0f;
#pragma omp simd reduction(+ : along)
        for (int64_t j = 0; j < d; j++) along += (load(w[j]) + more) * load(up[j]) * load(row[j]);
        const float by = inverse[i], back = along / static_cast<float>(d) * by * by;
        T* out = dx + i * d;
#pragma omp simd
        for (int64_t j = 0; j < d; j++) store(&out[j], ((load(w[j]) + more) * load(up[j]) - load(row[j]) * back) * by);
    }
}

// The gradient of w: the sum over rows of g * round(x / rms), fp32. Every thread takes columns of its own.
template <class T> void rms_weight(const T* g, const T* x, const float* inverse, float* dw, int64_t n, int64_t d, int plus_one, int threads) {
    constexpr int64_t WIDE = 32;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t at = 0; at < d; at += WIDE) {
        const int64_t wide = at + WIDE < d ? WIDE : d - at;
        float sum[WIDE] = {};
        for (int64_t i = 0; i < n; i++) {
            const T *up = g + i * d + at, *row = x + i * d + at;
            const float by = inverse[i];
            if (plus_one) {
#pragma omp simd
                for (int64_t j = 0; j < wide; j++) sum[j] += load(up[j]) * (load(row[j]) * by);
            } else {
#pragma omp simd
                for (int64_t j = 0; j < wide; j++) sum[j] += load(up[j]) * rounded<T>(load(row[j]) * by);
            }
        }
        for (int64_t j = 0; j < wide; j++) dw[at + j] = sum[j];
    }
}

constexpr int64_t PIECE = 8192;  // numbers that a thread takes at a time where there are no rows

// h = silu(gate) * up, n numbers.
template <class T> void swiglu(const T* __restrict__ gate, const T* __restrict__ up, T* __restrict__ h, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t at = 0; at < n; at += PIECE) {
        const int64_t end = at + PIECE < n ? at + PIECE : n;
#pragma omp simd
        for (int64_t i = at; i < end; i++) {
            const float e = load(gate[i]);
            store(&h[i], rounded<T>(e * sigmoid(e)) * load(up[i]));
        }
    }
}

// From the gradient of h: those of gate and up, and h again.
template <class T>
void swiglu_back(const T* __restrict__ g, const T* __restrict__ gate, const T* __restrict__ up, T* __restrict__ dgate, T* __restrict__ dup,
                 T* __restrict__ h, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t at = 0; at < n; at += PIECE) {
        const int64_t end = at + PIECE < n ? at + PIECE : n;
#pragma omp simd
        for (int64_t i = at; i < end; i++) {
            const float e = load(gate[i]), u = load(up[i]), d = load(g[i]), s = sigmoid(e), silu = e * s;
            store(&dup[i], d * silu);
            store(&dgate[i], d * u * (s + silu * (1.0f - s)));
            store(&h[i], rounded<T>(silu) * u);
        }
    }
}

// Rotary positions (n, heads, d): y = x cos + (-x2, x1) sin for the halves x1, x2 of a head; cos and sin (n, d). ``sign`` -1: the way back.
template <class T> void rotate(const T* x, const T* cosine, const T* sine, T* y, int64_t n, int64_t heads, int64_t d, float sign, int threads) {
    const int64_t half_d = d / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const T *c = cosine + i * d, *s = sine + i * d;
        for (int64_t h = 0; h < heads; h++) {
            const T* in = x + (i * heads + h) * d;
            T* out = y + (i * heads + h) * d;
            if (sign > 0) {
#pragma omp simd
                for (int64_t j = 0; j < half_d; j++) {
                    const float a = load(in[j]), b = load(in[j + half_d]);
                    store(&out[j], a * load(c[j]) - b * load(s[j]));
                    store(&out[j + half_d], b * load(c[j + half_d]) + a * load(s[j + half_d]));
                }
            } else {
#pragma omp simd
                for (int64_t j = 0; j < half_d; j++) {
                    const float a = load(in[j]), b = load(in[j + half_d]);
                    store(&out[j], a * load(c[j]) + b * load(s[j + half_d]));
                    store(&out[j + half_d], b * load(c[j + half_d]) - a * load(s[j]));
                }
            }
        }
    }
}

// Scores (rows, m) of attention become probabilities: softmax(scale * score) over what a query sees, 0 elsewhere. Rows come in pieces of ``per``, heads of ``n``
// queries each; of a piece, ``spans`` has the first key that is real, the key that its first query is itself, the end of the real keys, and how many of the n
// queries are real. Causal: nothing later than itself. Window: nothing so many places away, or more.
struct Seen {
    int64_t begin, end;
    Seen(int64_t row, const int64_t* spans, int64_t per, int64_t n, int causal, int64_t window) {
        const int64_t *span = spans + row / per * 4, j = row % n, own = span[1] + j;
        begin = span[0];
        end = causal && own + 1 < span[2] ? own + 1 : span[2];
        if (window > 0) {
            begin = own + 1 - window > begin ? own + 1 - window : begin;
            end = own + window < end ? own + window : end;
        }
        if (j >= span[3]) begin = end = 0;
    }
};

template <class T>
void attend(T* scores, const int64_t* spans, int64_t rows, int64_t per, int64_t n, int64_t m, int causal, int64_t window, float scale, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> kept(m);  // the exponentials of a row, before they are rounded
        float* const e = kept.data();
#pragma omp for schedule(static, 64)
        for (int64_t i = 0; i < rows; i++) {
            T* row = scores + i * m;
            const Seen seen(i, spans, per, n, causal, window);
            float most = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : most)
            for (int64_t j = seen.begin; j < seen.end; j++) {
                const float x = load(row[j]);
                most = x > most ? x : most;
            }
            const float top = most * scale;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = seen.begin; j < seen.end; j++) {
                const float x = exponential(load(row[j]) * scale - top);
                e[j] = x;
                sum += x;
            }
            const float by = 1.0f / sum;
#pragma omp simd
            for (int64_t j = seen.begin; j < seen.end; j++) store(&row[j], by * e[j]);
            std::memset(row, 0, sizeof(T) * seen.begin);
            std::memset(row + seen.end, 0, sizeof(T) * (m - seen.end));
        }
    }
}

// The gradient of the attention becomes that of the scores: scale * p * (g - sum(p g)).
template <class T>
void attend_back(T* g, const T* p, const int64_t* spans, int64_t rows, int64_t per, int64_t n, int64_t m, int causal, int64_t window, float scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 64)
    for (int64_t i = 0; i < rows; i++) {
        T* up = g + i * m;
        const T* own = p + i * m;
        const Seen seen(i, spans, per, n, causal, window);
        float along = 0.0f;
#pragma omp simd reduction(+ : along)
        for (int64_t j = seen.begin; j < seen.end; j++) along += load(up[j]) * load(own[j]);
#pragma omp simd
        for (int64_t j = seen.begin; j < seen.end; j++) store(&up[j], scale * load(own[j]) * (load(up[j]) - along));
        std::memset(up, 0, sizeof(T) * seen.begin);
        std::memset(up + seen.end, 0, sizeof(T) * (m - seen.end));
    }
}

// Vectors (positions, heads, d) into pieces (pieces, heads, n, d), which say where each of their n places lies.
template <class T> void collect(const T* from, const int64_t* place, T* to, int64_t pieces, int64_t n, int64_t heads, int64_t d, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < pieces * n; i++) {
        T* out = to + ((i / n) * heads * n + i % n) * d;
        const T* in = from + place[i] * heads * d;
        for (int64_t h = 0; h < heads; h++) std::memcpy(out + h * n * d, in + h * d, sizeof(T) * d);
    }
}

// The way back: of a position, the sum of what lies of it in pieces, in fp32; 0 where nothing does. Its shares are ``first[i] .. first[i + 1]``; share s of
// head h is the vector ``start[s] + h * stride[s]``.
template <class T>
void spread(const T* from, const int64_t* first, const int64_t* start, const int64_t* stride, T* to, int64_t positions, int64_t heads, int64_t d, int threads) {
    constexpr int64_t WIDE = 64;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < positions; i++) {
        const int64_t begin = first[i], end = first[i + 1];
        for (int64_t h = 0; h < heads; h++) {
            T* out = to + (i * heads + h) * d;
            if (begin == end) {
                std::memset(out, 0, sizeof(T) * d);
            } else if (begin + 1 == end) {
                std::memcpy(out, from + (start[begin] + h * stride[begin]) * d, sizeof(T) * d);
            } else {
                for (int64_t at = 0; at < d; at += WIDE) {
                    const int64_t wide = at + WIDE < d ? WIDE : d - at;
                    float sum[WIDE] = {};
                    for (int64_t s = begin; s < end; s++) {
                        const T* in = from + (start[s] + h * stride[s]) * d + at;
#pragma omp simd
                        for (int64_t j = 0; j < wide; j++) sum[j] += load(in[j]);
                    }
#pragma omp simd
                    for (int64_t j = 0; j < wide; j++) store(&out[at + j], sum[j]);
                }
            }
        }
    }
}

}  // namespace

#define BOTH(T, name)                                                                                                                              \
    void miss_##name(T* l, const int64_t* t, float* p, int64_t n, int64_t V, float s, int w, int th) { miss<T>(l, t, p, n, V, s, w, th); }          \
    void rms_##name(const T* x, const T* w, T* y, float* r, int64_t n, int64_t d, float e, int o, int th) { rms<T>(x, w, y, r, n, d, e, o, th); }    \
    void rms_back_##name(const T* g, const T* x, const T* w, const float* r, T* dx, int64_t n, int64_t d, int o, int th) {                           \
        rms_back<T>(g, x, w, r, dx, n, d, o, th);                                                                                                  \
    }                                                                                                                                              \
    void rms_weight_##name(const T* g, const T* x, const float* r, float* dw, int64_t n, int64_t d, int o, int th) {                                   \
        rms_weight<T>(g, x, r, dw, n, d, o, th);                                                                                                       \
    }                                                                                                                                                  \
    void swiglu_##name(const T* a, const T* b, T* h, int64_t n, int th) { swiglu<T>(a, b, h, n, th); }                                               \
    void swiglu_back_##name(const T* g, const T* a, const T* b, T* da, T* db, T* h, int64_t n, int th) { swiglu_back<T>(g, a, b, da, db, h, n, th); } \
    void rotate_##name(const T* x, const T* c, const T* s, T* y, int64_t n, int64_t heads, int64_t d, float sign, int th) {                          \
        rotate<T>(x, c, s, y, n, heads, d, sign, th);                                                                                                  \
    }                                                                                                                                                  \
    void attend_##name(T* p, const int64_t* z, int64_t r, int64_t per, int64_t n, int64_t m, int c, int64_t w, float s, int th) {                        \
        attend<T>(p, z, r, per, n, m, c, w, s, th);                                                                                                     \
    }                                                                                                                                                  \
    void attend_back_##name(T* g, const T* p, const int64_t* z, int64_t r, int64_t per, int64_t n, int64_t m, int c, int64_t w, float s, int th) {      \
        attend_back<T>(g, p, z, r, per, n, m, c, w, s, th);                                                                                            \
    }                                                                                                                                                  \
    void collect_##name(const T* x, const int64_t* at, T* y, int64_t s, int64_t n, int64_t h, int64_t d, int th) { collect<T>(x, at, y, s, n, h, d, th); } \
    void spread_##name(const T* x, const int64_t* f, const int64_t* a, const int64_t* b, T* y, int64_t n, int64_t h, int64_t d, int th) {               \
        spread<T>(x, f, a, b, y, n, h, d, th);                                                                                                         \
    }

extern "C" {
BOTH(float, float32)
BOTH(half, bfloat16)
}
