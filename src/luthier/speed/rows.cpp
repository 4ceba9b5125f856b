// What lies between the matrix products of a step, a row at a time: every number is read once and written once, sums are fp32, 16 bits are rounded once.
// Compiled where it is used (compiled.py) and called through ctypes, so it includes nothing of torch. Rows are shared among the threads torch has.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

using half = uint16_t;  // bfloat16, by its bits

inline float bits(uint32_t u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

inline float load(float x) { return x; }
inline float load(half x) { return bits(static_cast<uint32_t>(x) << 16); }

inline void store(float* to, float x) { *to = x; }
inline void store(half* to, float x) {  // to nearest, ties to even; what is no number stays none
    uint32_t u;
    std::memcpy(&u, &x, 4);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const uint32_t none = (u >> 16) | 0x40u;
    *to = static_cast<half>((u & 0x7fffffffu) > 0x7f800000u ? none : rounded);
}

template <class T> inline float rounded(float x) {
    T t;
    store(&t, x);
    return load(t);
}

// e^x for x <= 88, 0 below -87: a polynomial of degree 6 over [-ln 2 / 2, ln 2 / 2] (Taylor's, its last coefficients fitted), off by less than 2 units in the
// last place. What is no number stays none.
inline float exponential(float x) {
    const float low = x < -87.3f ? -87.3f : x;
    const float clipped = low > 88.0f ? 88.0f : low;
    const float n = std::nearbyint(clipped * 1.44269504f);
    const float r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * bits(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

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

// Scores (rows, l) of queries at position row % l become causal attention: softmax(scale * score) over what is not later, 0 elsewhere.
template <class T> void attend(T* scores, int64_t rows, int64_t l, float scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 64)
    for (int64_t i = 0; i < rows; i++) {
        T* row = scores + i * l;
        const int64_t seen = i % l + 1;
        float most = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : most)
        for (int64_t j = 0; j < seen; j++) {
            const float x = load(row[j]);
            most = x > most ? x : most;
        }
        const float top = most * scale;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < seen; j++) sum += exponential(load(row[j]) * scale - top);
        const float by = 1.0f / sum;
#pragma omp simd
        for (int64_t j = 0; j < seen; j++) store(&row[j], by * exponential(load(row[j]) * scale - top));
        std::memset(row + seen, 0, sizeof(T) * (l - seen));
    }
}

// The gradient of the attention becomes that of the scores: scale * p * (g - sum(p g)).
template <class T> void attend_back(T* g, const T* p, int64_t rows, int64_t l, float scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 64)
    for (int64_t i = 0; i < rows; i++) {
        T* up = g + i * l;
        const T* own = p + i * l;
        const int64_t seen = i % l + 1;
        float along = 0.0f;
#pragma omp simd reduction(+ : along)
        for (int64_t j = 0; j < seen; j++) along += load(up[j]) * load(own[j]);
#pragma omp simd
        for (int64_t j = 0; j < seen; j++) store(&up[j], scale * load(own[j]) * (load(up[j]) - along));
        std::memset(up + seen, 0, sizeof(T) * (l - seen));
    }
}

}  // namespace

#define BOTH(T, name)                                                                                                                              \
    void miss_##name(T* l, const int64_t* t, float* p, int64_t n, int64_t V, float s, int w, int th) { miss<T>(l, t, p, n, V, s, w, th); }          \
    void rms_##name(const T* x, const T* w, T* y, float* r, int64_t n, int64_t d, float e, int o, int th) { rms<T>(x, w, y, r, n, d, e, o, th); }    \
    void rms_back_##name(const T* g, const T* x, const T* w, const float* r, T* dx, int64_t n, int64_t d, int o, int th) {                           \
        rms_back<T>(g, x, w, r, dx, n, d, o, th);                                                                                                  \
    }                                                                                                                                              \
    void swiglu_##name(const T* a, const T* b, T* h, int64_t n, int th) { swiglu<T>(a, b, h, n, th); }                                               \
    void swiglu_back_##name(const T* g, const T* a, const T* b, T* da, T* db, T* h, int64_t n, int th) { swiglu_back<T>(g, a, b, da, db, h, n, th); } \
    void rotate_##name(const T* x, const T* c, const T* s, T* y, int64_t n, int64_t heads, int64_t d, float sign, int th) {                          \
        rotate<T>(x, c, s, y, n, heads, d, sign, th);                                                                                                  \
    }                                                                                                                                                  \
    void attend_##name(T* s, int64_t rows, int64_t l, float scale, int th) { attend<T>(s, rows, l, scale, th); }                                     \
    void attend_back_##name(T* g, const T* p, int64_t rows, int64_t l, float scale, int th) { attend_back<T>(g, p, rows, l, scale, th); }

extern "C" {
BOTH(float, float32)
BOTH(half, bfloat16)
}
