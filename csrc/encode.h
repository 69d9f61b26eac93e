// Encoding one block, element by element: what every instruction set falls back to. See scalar.h for the namespace.
//
// Three details decide whether files are equal to the bit (formats/blockwise.py): a whole block multiplies by the
// reciprocal of absmax, a partial last block divides; absmax is held at 1e-38 or above; an odd count is padded with
// the code of 0. Magnitudes are compared as integers, where NaN > Inf > finite: a NaN reaches the scale and is reported.
#pragma once

#include "scalar.h"

namespace halfbyte {
namespace {

constexpr float kTiny = 1e-38f;
constexpr int64_t kLargestBlock = 4096;

inline float held(float absmax) { return absmax < kTiny ? kTiny : absmax; }  // NaN stays NaN

// Count of thresholds below x, by bisection of a table of 2**bits entries, the last ones +inf.
inline int rank_of(const Codebook &book, float x) {
    int rank = 0;
    if (book.bits == 4) {
        for (int step = 8; step; step /= 2) rank += x > book.thresholds[rank + step - 1] ? step : 0;
        return rank;
    }
    // torch.bucketize, the reference for many thresholds, puts NaN above all.
    for (int step = 128; step; step /= 2) rank += x <= book.thresholds[rank + step - 1] ? 0 : step;
    return std::min(rank, book.threshold_count);
}

// x [count], already normalised -> packed codes.
inline void encode(const Codebook &book, const float *x, int64_t count, uint8_t *codes) {
    if (book.bits == 8) {
        for (int64_t i = 0; i < count; ++i) codes[i] = book.ascending[rank_of(book, x[i])];
        return;
    }
    for (int64_t i = 0; i < count; i += 2) {
        const int high = rank_of(book, x[i]), low = rank_of(book, i + 1 < count ? x[i + 1] : 0.0f);
        codes[i / 2] = uint8_t(book.ascending[high] << 4 | book.ascending[low]);
    }
}

// One block of `count` elements, whole or partial; returns its scale.
template <class T>
inline float encode_block(const Codebook &book, const T *w, int64_t count, bool whole, uint8_t *codes) {
    float x[kLargestBlock];
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        x[i] = to_float(w[i]);
        largest = std::max(largest, bits_of(x[i]) & 0x7fffffff);
    }
    const float absmax = float_of(largest);
    if (whole) {
        const float reciprocal = 1.0f / held(absmax);
        for (int64_t i = 0; i < count; ++i) x[i] *= reciprocal;
    } else {
        for (int64_t i = 0; i < count; ++i) x[i] /= held(absmax);
    }
    encode(book, x, count, codes);
    return whole ? absmax : held(absmax);
}

// Calls block(w, count, whole, codes), which returns the scale, for each block of `count` elements.
template <class T, class Block>
inline void for_each_block(const T *w, int64_t count, int64_t block_size, int bits, uint8_t *codes, float *scales,
                           Block block) {
    for (int64_t at = 0; at < count; at += block_size) {
        const int64_t size = std::min(block_size, count - at);
        *scales++ = block(w + at, size, size == block_size, codes + at * bits / 8);
    }
}

// Calls body(typed weights) with the pointer type that `dtype` says.
template <class Body>
inline void with_weights(const void *w, int dtype, Body body) {
    switch (dtype) {
        case HB_FLOAT32: return body(static_cast<const float *>(w));
        case HB_BFLOAT16: return body(static_cast<const bfloat16 *>(w));
        default: return body(static_cast<const float16 *>(w));
    }
}

}  // namespace
}  // namespace halfbyte
