// Decoding to float32 with NEON, for the product kernels and the decoder. See scalar.h for the namespace.
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

inline uint8x16_t high_nibbles(uint8x16_t bytes) { return vshrq_n_u8(bytes, 4); }
inline uint8x16_t low_nibbles(uint8x16_t bytes) { return vandq_u8(bytes, vdupq_n_u8(15)); }

// 8 bytes -> their 16 codes in order.
inline uint8x16_t codes16(const uint8_t *packed) {
    const uint8x16_t bytes = vcombine_u8(vld1_u8(packed), vdup_n_u8(0));
    return vzip1q_u8(high_nibbles(bytes), low_nibbles(bytes));
}

}  // namespace
}  // namespace halfbyte
