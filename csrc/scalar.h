// Element by element: what every instruction set shares, and falls back to at ragged ends.
//
// Everything lies in an unnamed namespace on purpose. Each file that includes this is compiled with its own flags; with
// ordinary inline functions the linker would keep one copy for all, perhaps the one that needs AVX512.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "halfbyte.h"
#include "tables.h"

namespace halfbyte {
namespace {

constexpr int64_t kScaleBlock = 256;  // scales that share a second-level scale; formats.SCALE_BLOCK

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

inline uint32_t bits_of(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return u;
}
inline float float_of(uint32_t u) {
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return float_of(uint32_t(x.bits) << 16); }
inline float to_float(float16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
    if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | magnitude << 13);
    // The exponent is rebased by a product, which is exact and brings subnormals into the normal range.
    return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

inline void store(float *out, float x) { *out = x; }
inline void store(bfloat16 *out, float x) {  // to nearest, ties to even; subnormals kept; NaN as torch writes it
    const uint32_t u = bits_of(x);
    out->bits = x != x ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline void store(float16 *out, float x) {
    const uint32_t u = bits_of(x), magnitude = u & 0x7fffffff;
    const uint16_t sign = uint16_t(u >> 16 & 0x8000);
    if (magnitude > 0x7f800000) {
        out->bits = sign | 0x7e00;
    } else if (magnitude >= 0x477ff000) {  // rounds to 65536 or more
        out->bits = sign | 0x7c00;
    } else if (magnitude < 0x38800000) {  // subnormal: 0.5 has ulp 2^-24, so the addition rounds where fp16 would
        out->bits = sign | uint16_t(bits_of(float_of(magnitude) + 0.5f) - 0x3f000000);
    } else {
        out->bits = sign | uint16_t((magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13);
    }
}

// Scales [block, block + count) as floats: a copy, or the second level's table[code] * absmax + offset. The product
// and the sum are rounded one by one, as torch does; the build forbids contraction into a fused multiply-add.
inline void decode_scales(const hb_weight &w, int64_t block, int64_t count, float *out) {
    if (w.scale_bits == 0) {
        std::memcpy(out, static_cast<const float *>(w.scales) + block, count * sizeof(float));
        return;
    }
    const uint8_t *codes = static_cast<const uint8_t *>(w.scales);
    const float offset = *w.scale_offset;
    for (int64_t at = w.scale_start + block, end = at + count; at < end;) {
        const int64_t stop = std::min(end, (at / kScaleBlock + 1) * kScaleBlock);
        const float absmax = w.scale_absmax[at / kScaleBlock];
        if (w.scale_bits == 8) {
#ifdef __AVX512F__
            for (; at + 16 <= stop; at += 16, out += 16) {
                const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i *>(codes + at));
                const __m512 values = _mm512_i32gather_ps(_mm512_cvtepu8_epi32(sixteen), kScaleTable8, 4);
                const __m512 scaled = _mm512_mul_ps(values, _mm512_set1_ps(absmax));
                _mm512_storeu_ps(out, _mm512_add_ps(scaled, _mm512_set1_ps(offset)));
            }
#elif defined(__AVX2__)
            for (; at + 8 <= stop; at += 8, out += 8) {
                const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(codes + at));
                const __m256 values = _mm256_i32gather_ps(kScaleTable8, _mm256_cvtepu8_epi32(eight), 4);
                const __m256 scaled = _mm256_mul_ps(values, _mm256_set1_ps(absmax));
                _mm256_storeu_ps(out, _mm256_add_ps(scaled, _mm256_set1_ps(offset)));
            }
#endif
            for (; at < stop; ++at) *out++ = kScaleTable8[codes[at]] * absmax + offset;
        } else if (w.scale_bits == 4) {
            for (; at < stop; ++at) *out++ = kScaleTable4[codes[at / 2] >> (at & 1 ? 0 : 4) & 15] * absmax + offset;
        } else {
            for (; at < stop; ++at) {  // four codes in three bytes, most significant first
                const uint8_t *group = codes + at / 4 * 3;
                const uint32_t word = uint32_t(group[0]) << 16 | uint32_t(group[1]) << 8 | group[2];
                *out++ = kScaleTable6[word >> (18 - 6 * (at & 3)) & 63] * absmax + offset;
            }
        }
    }
}

// Elements [first, last) of one block of 4-bit codes, counted from the weight's first code.
template <class T>
inline void decode_nibbles(const uint8_t *codes, const float *values, int64_t first, int64_t last, float scale, T *out) {
    for (int64_t at = first; at < last; ++at) {
        store(out++, values[codes[at / 2] >> (at & 1 ? 0 : 4) & 15] * scale);
    }
}

template <class T>
inline void decode_bytes(const uint8_t *codes, const float *values, int64_t first, int64_t last, float scale, T *out) {
    for (int64_t at = first; at < last; ++at) store(out++, values[codes[at]] * scale);
}

// Cuts elements [first, first + count) of a weight at the borders of blocks and calls segment(from, to, scale, out)
// for each piece. Scales are decoded 256 at a time: they stay in the first-level cache, and each is decoded once.
template <class T, class Segment>
inline void for_each_segment(const hb_weight &w, int64_t first, int64_t count, T *out, Segment segment) {
    constexpr int64_t kScales = 256;
    float scales[kScales];
    int64_t at = w.start + first;
    const int64_t end = at + count;
    const int shift = __builtin_ctzll(uint64_t(w.block_size));
    while (at < end) {
        const int64_t block = at >> shift, blocks = std::min(kScales, ((end - 1) >> shift) - block + 1);
        decode_scales(w, block, blocks, scales);
        for (int64_t i = 0; i < blocks; ++i) {
            const int64_t stop = std::min((block + i + 1) << shift, end);
            segment(at, stop, scales[i], out);
            out += stop - at;
            at = stop;
        }
    }
}

}  // namespace
}  // namespace halfbyte
