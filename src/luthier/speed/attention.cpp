// Attention over packed examples in one pass, for processors with products of bfloat16 (AVX512-BF16): scores, probabilities and their gradients live in a
// core's own caches and are never written to memory, so that nothing but q, k and v is kept, whatever the length (after Dao et al., 2022, arXiv 2205.14135; rows
// of scores are short enough here to be held whole, so the softmax needs no running maximum). Products are sums of fp32 over pairs of bfloat16.
//
// Queries come in pieces: up to a few hundred consecutive positions of one example, with the places of all keys that they may see. ``table`` has of each piece:
// the position of its first query, how many there are, where its keys' places begin and how many there are, and which key its first query is itself.
// q, out and their gradients are (positions, H, d); k and v (places, H_kv, d), d a multiple of 32.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "numbers.hpp"

#ifdef __AVX512BF16__
#include <immintrin.h>

namespace {

constexpr int64_t ROWS = 6, WIDE = 64;  // of a product: 24 sums stay in registers

struct Shape {
    int64_t heads, key_heads, d;
    int causal;
    int64_t window;
    float scale;
};

struct Piece {
    int64_t query, n, at, m, own;
};

struct Span {
    int64_t begin, end;  // keys that a query sees
};

inline Span span(const Shape& s, const Piece& p, int64_t row) {
    const int64_t own = p.own + row;
    Span seen{0, p.m};
    if (s.causal && own + 1 < seen.end) seen.end = own + 1;
    if (s.window > 0) {
        if (own + 1 - s.window > seen.begin) seen.begin = own + 1 - s.window;
        if (own + s.window < seen.end) seen.end = own + s.window;
    }
    return seen;
}

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// c[r] (Z * 16 floats) = or += sum over k in [begin, end) of pairs a[r][k * step] with pairs b[k * ldb ...].
template <int R, int Z>
inline void block(const uint32_t* const* a, int64_t step, const uint32_t* b, int64_t ldb, int64_t begin, int64_t end, float* const* c, bool add) {
    __m512 sum[R][Z];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int z = 0; z < Z; z++) sum[r][z] = add ? _mm512_loadu_ps(c[r] + 16 * z) : _mm512_setzero_ps();
    for (int64_t k = begin; k < end; k++) {
        __m512bh column[Z];
#pragma GCC unroll 4
        for (int z = 0; z < Z; z++) column[z] = (__m512bh)_mm512_loadu_si512(b + k * ldb + 16 * z);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const __m512bh x = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r][k * step]));
#pragma GCC unroll 4
            for (int z = 0; z < Z; z++) sum[r][z] = _mm512_dpbf16_ps(sum[r][z], x, column[z]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int z = 0; z < Z; z++) _mm512_storeu_ps(c[r] + 16 * z, sum[r][z]);
}

template <int Z>
inline void rows(int64_t n, const uint32_t* const* a, int64_t step, const uint32_t* b, int64_t ldb, int64_t begin, int64_t end, float* const* c, bool add) {
    switch (n) {
        case 1: return block<1, Z>(a, step, b, ldb, begin, end, c, add);
        case 2: return block<2, Z>(a, step, b, ldb, begin, end, c, add);
        case 3: return block<3, Z>(a, step, b, ldb, begin, end, c, add);
        case 4: return block<4, Z>(a, step, b, ldb, begin, end, c, add);
        case 5: return block<5, Z>(a, step, b, ldb, begin, end, c, add);
        default: return block<6, Z>(a, step, b, ldb, begin, end, c, add);
    }
}

// Up to ROWS rows of a product, columns [from, to) of b, multiples of 16; c[r] is where column 0 is.
inline void product(int64_t n, const uint32_t* const* a, int64_t step, const uint32_t* b, int64_t ldb, int64_t begin, int64_t end, float* const* c,
                    int64_t from, int64_t to, bool add) {
    for (int64_t at = from; at < to; at += WIDE) {
        float* there[ROWS];
        for (int64_t r = 0; r < n; r++) there[r] = c[r] + at;
        switch ((to - at < WIDE ? to - at : WIDE) / 16) {
            case 1: rows<1>(n, a, step, b + at, ldb, begin, end, there, add); break;
            case 2: rows<2>(n, a, step, b + at, ldb, begin, end, there, add); break;
            case 3: rows<3>(n, a, step, b + at, ldb, begin, end, there, add); break;
            default: rows<4>(n, a, step, b + at, ldb, begin, end, there, add); break;
        }
    }
}

// 16 rows of 16 pairs become 16 rows of what stood in columns.
inline void turn(const uint32_t* const* in, uint32_t* out, int64_t ld) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = in[i] ? _mm512_loadu_si512(in[i]) : _mm512_setzero_si512();
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int c = 0; c < 4; c++) {
        const __m512i even = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88), odd = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
        const __m512i even2 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88), odd2 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
        _mm512_storeu_si512(out + c * ld, _mm512_shuffle_i32x4(even, even2, 0x88));
        _mm512_storeu_si512(out + (4 + c) * ld, _mm512_shuffle_i32x4(odd, odd2, 0x88));
        _mm512_storeu_si512(out + (8 + c) * ld, _mm512_shuffle_i32x4(even, even2, 0xdd));
        _mm512_storeu_si512(out + (12 + c) * ld, _mm512_shuffle_i32x4(odd, odd2, 0xdd));
    }
}

// Vectors x[place[j]] of one head as columns: out (d / 2, ld) pairs along d; columns from m to ld are 0.
inline void columns(const half* x, const int64_t* place, int64_t m, int64_t stride, int64_t d, uint32_t* out, int64_t ld) {
    for (int64_t j = 0; j < ld; j += 16)
        for (int64_t k = 0; k < d / 2; k += 16) {
            const uint32_t* in[16];
            for (int64_t i = 0; i < 16; i++) in[i] = j + i < m ? reinterpret_cast<const uint32_t*>(x + place[j + i] * stride) + k : nullptr;
            turn(in, out + k * ld + j, ld);
        }
}

// The same vectors in pairs of neighbours: out (ceil(m / 2), d), each (x[place[2 j]], x[place[2 j + 1]]). Without places: consecutive positions.
inline void neighbours(const half* x, const int64_t* place, int64_t m, int64_t stride, int64_t d, uint32_t* out) {
    for (int64_t j = 0; j < m; j += 2) {
        const half *one = x + (place ? place[j] : j) * stride, *two = j + 1 < m ? x + (place ? place[j + 1] : j + 1) * stride : nullptr;
        for (int64_t c = 0; c < d; c += 16) {
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(one + c)));
            const __m512i high = two ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(two + c))) : _mm512_setzero_si512();
            _mm512_storeu_si512(out + j / 2 * d + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
}

// The softmax of a row of scores in place, over what is seen. Returns nothing of what is not: it stays as it is.
inline void softmax(float* s, Span seen, float scale) {
    float most = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : most)
    for (int64_t j = seen.begin; j < seen.end; j++) most = s[j] > most ? s[j] : most;
    const float top = most * scale;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = seen.begin; j < seen.end; j++) {
        const float e = exponential(s[j] * scale - top);
        s[j] = e;
        sum += e;
    }
    const float by = 1.0f / sum;
#pragma omp simd
    for (int64_t j = seen.begin; j < seen.end; j++) s[j] *= by;
}

// Rounded to 16 bits over [from, to): 0 where nothing is seen.
inline void narrow(const float* s, Span seen, int64_t from, int64_t to, half* out) {
    std::memset(out + from, 0, sizeof(half) * (seen.begin - from));
#pragma omp simd
    for (int64_t j = seen.begin; j < seen.end; j++) store(&out[j], s[j]);
    std::memset(out + seen.end, 0, sizeof(half) * (to - seen.end));
}

inline void write(const float* from, int64_t d, half* to) {
#pragma omp simd
    for (int64_t j = 0; j < d; j++) store(&to[j], from[j]);
}

// Room that a thread keeps from piece to piece.
struct Room {
    std::vector<float> numbers;
    std::vector<uint32_t> pairs;
    float* floats(size_t n) {
        if (numbers.size() < n) numbers.resize(n);
        return numbers.data();
    }
    uint32_t* words(size_t n) {
        if (pairs.size() < n) pairs.resize(n);
        return pairs.data();
    }
};

// Rows [row, row + n) of a piece: what all of them see, from a multiple of WIDE to one of 2.
inline Span around(const Shape& s, const Piece& p, int64_t row, int64_t n, Span* each) {
    Span all{p.m, 0};
    for (int64_t r = 0; r < n; r++) {
        each[r] = span(s, p, row + r);
        all.begin = each[r].begin < all.begin ? each[r].begin : all.begin;
        all.end = each[r].end > all.end ? each[r].end : all.end;
    }
    return {all.begin / WIDE * WIDE, up(all.end, 2)};
}

void forward(const Shape& s, const Piece& p, const int64_t* place, int64_t key_head, const half* q, const half* k, const half* v, half* out, Room& room) {
    const int64_t d = s.d, ld = up(p.m, WIDE), group = s.heads / s.key_heads, stride = s.heads * d, key_stride = s.key_heads * d;
    uint32_t* kt = room.words(d / 2 * ld + (p.m + 1) / 2 * d + ROWS * ld / 2);
    uint32_t* vp = kt + d / 2 * ld;
    uint32_t* narrowed = vp + (p.m + 1) / 2 * d;
    float* scores = room.floats(ROWS * ld + ROWS * d);
    float* sums = scores + ROWS * ld;
    columns(k + key_head * d, place, p.m, key_stride, d, kt, ld);
    neighbours(v + key_head * d, place, p.m, key_stride, d, vp);
    for (int64_t h = key_head * group; h < (key_head + 1) * group; h++)
        for (int64_t row = 0; row < p.n; row += ROWS) {
            const int64_t n = p.n - row < ROWS ? p.n - row : ROWS;
            Span each[ROWS];
            const Span all = around(s, p, row, n, each);
            const uint32_t* a[ROWS];
            float* c[ROWS];
            for (int64_t r = 0; r < n; r++) {
                a[r] = reinterpret_cast<const uint32_t*>(q + (p.query + row + r) * stride + h * d);
                c[r] = scores + r * ld;
            }
            product(n, a, 1, kt, ld, 0, d / 2, c, all.begin, up(all.end, WIDE), false);
            for (int64_t r = 0; r < n; r++) {
                half* own = reinterpret_cast<half*>(narrowed) + r * ld;
                softmax(c[r], each[r], s.scale);
                narrow(c[r], each[r], all.begin, all.end, own);
                a[r] = reinterpret_cast<const uint32_t*>(own);
                c[r] = sums + r * d;
            }
            product(n, a, 1, vp, d, all.begin / 2, all.end / 2, c, 0, d, false);
            for (int64_t r = 0; r < n; r++) write(c[r], d, out + (p.query + row + r) * stride + h * d);
        }
}

// Gradients of one piece; those of keys and values are added to fp32 sums (places, H_kv, d).
void backward(const Shape& s, const Piece& p, const int64_t* place, int64_t key_head, const half* q, const half* k, const half* v, const half* g, half* dq,
              float* dk, float* dv, Room& room) {
    const int64_t d = s.d, ld = up(p.m, WIDE), group = s.heads / s.key_heads, stride = s.heads * d, key_stride = s.key_heads * d;
    const int64_t turned = d / 2 * ld, beside = (p.m + 1) / 2 * d, queries = (p.n + 1) / 2;
    uint32_t* kt = room.words(2 * turned + beside + 2 * queries * d + 2 * queries * ld + ROWS * ld / 2);
    uint32_t *vt = kt + turned, *kp = vt + turned, *qp = kp + beside, *gp = qp + queries * d, *pp = gp + queries * d, *sp = pp + queries * ld;
    half* narrowed = reinterpret_cast<half*>(sp + queries * ld);
    float* scores = room.floats(2 * ROWS * ld + ROWS * d);
    float *upper = scores + ROWS * ld, *sums = upper + ROWS * ld;
    columns(k + key_head * d, place, p.m, key_stride, d, kt, ld);
    columns(v + key_head * d, place, p.m, key_stride, d, vt, ld);
    neighbours(k + key_head * d, place, p.m, key_stride, d, kp);
    for (int64_t h = key_head * group; h < (key_head + 1) * group; h++) {
        neighbours(q + p.query * stride + h * d, nullptr, p.n, stride, d, qp);
        neighbours(g + p.query * stride + h * d, nullptr, p.n, stride, d, gp);
        for (int64_t row = 0; row < p.n; row += ROWS) {
            const int64_t n = p.n - row < ROWS ? p.n - row : ROWS;
            Span each[ROWS];
            const Span all = around(s, p, row, n, each);
            const uint32_t *a[ROWS], *b[ROWS];
            float *c[ROWS], *e[ROWS];
            for (int64_t r = 0; r < n; r++) {
                a[r] = reinterpret_cast<const uint32_t*>(q + (p.query + row + r) * stride + h * d);
                b[r] = reinterpret_cast<const uint32_t*>(g + (p.query + row + r) * stride + h * d);
                c[r] = scores + r * ld;
                e[r] = upper + r * ld;
            }
            product(n, a, 1, kt, ld, 0, d / 2, c, all.begin, up(all.end, WIDE), false);
            product(n, b, 1, vt, ld, 0, d / 2, e, all.begin, up(all.end, WIDE), false);
            for (int64_t r = 0; r < n; r++) {
                const Span seen = each[r];
                float *own = c[r], *theirs = e[r], along = 0.0f;
                softmax(own, seen, s.scale);
#pragma omp simd reduction(+ : along)
                for (int64_t j = seen.begin; j < seen.end; j++) along += own[j] * theirs[j];
#pragma omp simd
                for (int64_t j = seen.begin; j < seen.end; j++) theirs[j] = s.scale * own[j] * (theirs[j] - along);
                // Half of a pair of rows: the lower 16 bits are an even row's.
                uint32_t *to_p = pp + (row + r) / 2 * ld, *to_s = sp + (row + r) / 2 * ld;
                const int shift = r % 2 ? 16 : 0;
                if (!shift) {
                    std::memset(to_p, 0, sizeof(uint32_t) * ld);
                    std::memset(to_s, 0, sizeof(uint32_t) * ld);
                }
                half* low = narrowed + r * ld;
                narrow(own, seen, seen.begin, seen.end, low);
#pragma omp simd
                for (int64_t j = seen.begin; j < seen.end; j++) to_p[j] |= static_cast<uint32_t>(low[j]) << shift;
                narrow(theirs, seen, all.begin, all.end, low);
#pragma omp simd
                for (int64_t j = seen.begin; j < seen.end; j++) to_s[j] |= static_cast<uint32_t>(low[j]) << shift;
                a[r] = reinterpret_cast<const uint32_t*>(low);
                c[r] = sums + r * d;
            }
            product(n, a, 1, kp, d, all.begin / 2, all.end / 2, c, 0, d, false);
            for (int64_t r = 0; r < n; r++) write(c[r], d, dq + (p.query + row + r) * stride + h * d);
        }
        for (int64_t key = 0; key < p.m; key += ROWS) {
            const int64_t n = p.m - key < ROWS ? p.m - key : ROWS;
            // The queries that see any of these keys.
            int64_t first = 0, last = p.n;
            if (s.causal && key - p.own > first) first = key - p.own;
            if (s.window > 0) {
                const int64_t after = key + n - 1 + s.window - p.own, before = key - s.window + 1 - p.own;
                last = after < last ? after : last;
                first = before > first ? before : first;
            }
            if (first >= last) continue;
            const uint32_t *a[ROWS], *b[ROWS];
            float *c[ROWS], *e[ROWS];
            for (int64_t r = 0; r < n; r++) {
                const int64_t to = (place[key + r] * s.key_heads + key_head) * d;
                a[r] = pp + key + r;
                b[r] = sp + key + r;
                c[r] = dv + to;
                e[r] = dk + to;
            }
            product(n, a, ld, gp, d, first / 2, (last + 1) / 2, c, 0, d, true);
            product(n, b, ld, qp, d, first / 2, (last + 1) / 2, e, 0, d, true);
        }
    }
}

inline Piece piece(const int64_t* table, int64_t i) {
    const int64_t* t = table + 5 * i;
    return {t[0], t[1], t[2], t[3], t[4]};
}

}  // namespace

extern "C" {

int attention_is_here() { return __builtin_cpu_supports("avx512bf16") ? 1 : 0; }

void attention(const half* q, const half* k, const half* v, half* out, const int64_t* table, int64_t pieces, const int64_t* places, int64_t heads,
               int64_t key_heads, int64_t d, int causal, int64_t window, float scale, int threads) {
    const Shape s{heads, key_heads, d, causal, window, scale};
#pragma omp parallel num_threads(threads)
    {
        Room room;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < pieces * key_heads; i++) {
            const Piece p = piece(table, i / key_heads);
            forward(s, p, places + p.at, i % key_heads, q, k, v, out, room);
        }
    }
}

// ``families``: pieces [families[i], families[i + 1]) share keys with one another and with no others, so one thread adds up what they give them, in order.
void attention_back(const half* q, const half* k, const half* v, const half* g, half* dq, float* dk, float* dv, const int64_t* table, const int64_t* families,
                    int64_t count, const int64_t* places, int64_t heads, int64_t key_heads, int64_t d, int causal, int64_t window, float scale, int threads) {
    const Shape s{heads, key_heads, d, causal, window, scale};
#pragma omp parallel num_threads(threads)
    {
        Room room;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count * key_heads; i++)
            for (int64_t j = families[i / key_heads]; j < families[i / key_heads + 1]; j++) {
                const Piece p = piece(table, j);
                backward(s, p, places + p.at, i % key_heads, q, k, v, g, dq, dk, dv, room);
            }
    }
}
}

#else

extern "C" {
int attention_is_here() { return 0; }
}

#endif
