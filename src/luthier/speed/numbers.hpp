// Numbers as the kernels read, compute and write them.
#pragma once

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

}  // namespace
