// Lookups with NEON, for the decoder and the product kernels. See scalar.h for the namespace.
//
// NEON looks up bytes (tbl), 16 at a time in a register. So the 16 products value * scale of a block are kept as four
// planes: their first bytes, their second, and so on. 16 weights are a lookup in each plane and eight zips that put
// the bytes together. Scaling the table instead of the weights is exact: the same product is rounded in the same way.
#pragma once

#include <arm_neon.h>

#include "scalar.h"

namespace halfbyte {
namespace {

struct FloatTable {
    uint8x16_t plane[4];

    FloatTable() = default;
    FloatTable(const float *values, float scale) {
        uint16x8_t products[4];
        for (int i = 0; i < 4; ++i) products[i] = vreinterpretq_u16_f32(vmulq_n_f32(vld1q_f32(values + 4 * i), scale));
        const uint8x16_t low1 = vreinterpretq_u8_u16(vuzp1q_u16(products[0], products[1]));
        const uint8x16_t low2 = vreinterpretq_u8_u16(vuzp1q_u16(products[2], products[3]));
        const uint8x16_t high1 = vreinterpretq_u8_u16(vuzp2q_u16(products[0], products[1]));
        const uint8x16_t high2 = vreinterpretq_u8_u16(vuzp2q_u16(products[2], products[3]));
        plane[0] = vuzp1q_u8(low1, low2), plane[1] = vuzp2q_u8(low1, low2);
        plane[2] = vuzp1q_u8(high1, high2), plane[3] = vuzp2q_u8(high1, high2);
    }

    // The weights of 16 codes, in the codes' order.
    void operator()(uint8x16_t codes, float32x4_t (&out)[4]) const {
        const uint8x16_t b0 = vqtbl1q_u8(plane[0], codes), b1 = vqtbl1q_u8(plane[1], codes);
        const uint8x16_t b2 = vqtbl1q_u8(plane[2], codes), b3 = vqtbl1q_u8(plane[3], codes);
        const uint16x8_t low1 = vreinterpretq_u16_u8(vzip1q_u8(b0, b1)), low2 = vreinterpretq_u16_u8(vzip2q_u8(b0, b1));
        const uint16x8_t high1 = vreinterpretq_u16_u8(vzip1q_u8(b2, b3));
        const uint16x8_t high2 = vreinterpretq_u16_u8(vzip2q_u8(b2, b3));
        out[0] = vreinterpretq_f32_u16(vzip1q_u16(low1, high1));
        out[1] = vreinterpretq_f32_u16(vzip2q_u16(low1, high1));
        out[2] = vreinterpretq_f32_u16(vzip1q_u16(low2, high2));
        out[3] = vreinterpretq_f32_u16(vzip2q_u16(low2, high2));
    }
};

// 8 products rounded to 16 bits as store() in scalar.h does, NaN included.
inline uint16x8_t rounded(float32x4_t lower, float32x4_t upper, bfloat16 *) {
    const auto round = [](float32x4_t x) {
        const uint32x4_t u = vreinterpretq_u32_f32(x);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
        const uint32x4_t up = vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd);
        const uint16x4_t number = vmovn_u32(vceqq_f32(x, x));
        return vbsl_u16(number, vshrn_n_u32(up, 16), vdup_n_u16(0x7fc0));
    };
    return vcombine_u16(round(lower), round(upper));
}
inline uint16x8_t rounded(float32x4_t lower, float32x4_t upper, float16 *) {
    const float16x8_t words = vcvt_high_f16_f32(vcvt_f16_f32(lower), upper);
    const uint16x8_t u = vreinterpretq_u16_f16(words), magnitude = vandq_u16(u, vdupq_n_u16(0x7fff));
    // The conversion keeps bits of a NaN's payload; they are dropped.
    return vbslq_u16(vcgtq_u16(magnitude, vdupq_n_u16(0x7c00)), vandq_u16(u, vdupq_n_u16(0xfe00)), u);
}

// The same for 16-bit weights, in two planes: each product is rounded once a block.
template <class T>
struct WordTable {
    uint8x16_t low, high;

    WordTable() = default;
    WordTable(const float *values, float scale) {
        float32x4_t product[4];
        for (int i = 0; i < 4; ++i) product[i] = vmulq_n_f32(vld1q_f32(values + 4 * i), scale);
        const uint8x16_t first = vreinterpretq_u8_u16(rounded(product[0], product[1], static_cast<T *>(nullptr)));
        const uint8x16_t second = vreinterpretq_u8_u16(rounded(product[2], product[3], static_cast<T *>(nullptr)));
        low = vuzp1q_u8(first, second), high = vuzp2q_u8(first, second);
    }

    void operator()(uint8x16_t codes, uint16x8_t (&out)[2]) const {
        const uint8x16_t l = vqtbl1q_u8(low, codes), h = vqtbl1q_u8(high, codes);
        out[0] = vreinterpretq_u16_u8(vzip1q_u8(l, h)), out[1] = vreinterpretq_u16_u8(vzip2q_u8(l, h));
    }
};

inline uint8x16_t high_nibbles(uint8x16_t bytes) { return vshrq_n_u8(bytes, 4); }
inline uint8x16_t low_nibbles(uint8x16_t bytes) { return vandq_u8(bytes, vdupq_n_u8(15)); }

// 8 bytes -> their 16 codes in order.
inline uint8x16_t codes16(const uint8_t *packed) {
    const uint8x16_t bytes = vcombine_u8(vld1_u8(packed), vdup_n_u8(0));
    return vzip1q_u8(high_nibbles(bytes), low_nibbles(bytes));
}

}  // namespace
}  // namespace halfbyte
