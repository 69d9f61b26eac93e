// Vectors of kLanes floats: GCC's and Clang's vector extensions, for kernels that have one source for every set.
//
// A file that includes this has set kLanes to its registers' width before (see rowwise_avx512.cpp). Elements of any type
// are loaded as floats and rounded once when they are stored. See scalar.h for the namespace.
#pragma once

#include "scalar.h"

namespace halfbyte {
namespace {

// Vectors never cross a call that is not inlined, so how a set would pass them does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"
#define HB_INLINE inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));

HB_INLINE Floats all(float x) { return x - Floats{}; }

HB_INLINE Floats load_whole(const float *p) {
    Floats x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
HB_INLINE Floats load_whole(const bfloat16 *p) {
    Halves h;
    std::memcpy(&h, p, sizeof h);
    return (Floats)(__builtin_convertvector(h, Words) << 16);
}
HB_INLINE Floats load_whole(const float16 *p) {
    Floats x;
    for (int i = 0; i < kLanes; ++i) x[i] = to_float(p[i]);
    return x;
}

HB_INLINE Floats load_whole(const int8_t *p) {
    Bytes b;
    std::memcpy(&b, p, sizeof b);
    return __builtin_convertvector(__builtin_convertvector(b, Ints), Floats);
}

HB_INLINE void store_whole(float *p, Floats x) { std::memcpy(p, &x, sizeof x); }
HB_INLINE void store_whole(bfloat16 *p, Floats x) {
    const Words u = (Words)x, rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    const Words is_nan = (Words)(x != x);
    const Halves h = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0), Halves);
    std::memcpy(p, &h, sizeof h);
}
HB_INLINE void store_whole(float16 *p, Floats x) {
    for (int i = 0; i < kLanes; ++i) store(p + i, x[i]);
}

// The first `count` lanes; where there are fewer than kLanes, a row's ragged end, the others are `rest`.
template <class T>
HB_INLINE Floats load(const T *p, int64_t count, float rest = 0.0f) {
    if (count >= kLanes) return load_whole(p);
    float buffer[kLanes];
    for (int i = 0; i < kLanes; ++i) buffer[i] = i < count ? to_float(p[i]) : rest;
    return load_whole(buffer);
}
template <class T>
HB_INLINE void store(T *p, int64_t count, Floats x) {
    if (count >= kLanes) return store_whole(p, x);
    float buffer[kLanes];
    store_whole(buffer, x);
    for (int i = 0; i < count; ++i) store(p + i, buffer[i]);
}

HB_INLINE Floats choose(Ints which, Floats yes, Floats no) {
    return (Floats)((which & (Ints)yes) | (~which & (Ints)no));
}

HB_INLINE double sum(Floats x) {
    double total = 0.0;
    for (int i = 0; i < kLanes; ++i) total += double(x[i]);
    return total;
}

// e^x to 2 units in the last place for x in [-87.3, 88.3]; beyond, the value at that end. NaN stays NaN.
// x = n ln 2 + r, |r| <= ln 2 / 2, and e^r by the polynomial of Cephes' expf.
HB_INLINE Floats exponential(Floats x) {
    const Floats low = all(-87.3f), high = all(88.3f);
    x = choose(x < low, low, choose(x > high, high, x));
    const float round = 12582912.0f;  // 1.5 * 2^23: adding and taking it away leaves the nearest integer
    const Floats n = (x * 1.44269504f + round) - round;
    const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + r + 1.0f;
    // In float first, so that NaN is never converted to an integer.
    const Ints exponent = __builtin_convertvector(choose(n == n, n, Floats{}), Ints) + 127;
    return p * (Floats)(exponent << 23);
}

}  // namespace
}  // namespace halfbyte
