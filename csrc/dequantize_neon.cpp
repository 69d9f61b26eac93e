// Decoding with NEON: the scaled table of dequantize_avx512.cpp, in byte lookups.
//
// For 16-bit outputs the 16 rounded products of a block are two tables, of their low and of their high bytes; for
// float32 they are four (neon.h). The inner loop over 32 weights has, as GCC 12 makes it, 22 instructions for 16-bit
// outputs and 40 for float32. No ARM machine has been timed.
#include "kernels.h"
#include "neon.h"

namespace halfbyte {
namespace {

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

template <class T>
struct Table {  // 16-bit outputs
    uint8x16_t low, high;

    Table(const float *values, float scale) {
        float32x4_t product[4];
        for (int i = 0; i < 4; ++i) product[i] = vmulq_n_f32(vld1q_f32(values + 4 * i), scale);
        const uint8x16_t first = vreinterpretq_u8_u16(rounded(product[0], product[1], static_cast<T *>(nullptr)));
        const uint8x16_t second = vreinterpretq_u8_u16(rounded(product[2], product[3], static_cast<T *>(nullptr)));
        low = vuzp1q_u8(first, second), high = vuzp2q_u8(first, second);
    }

    // 16 codes, in order -> 16 weights.
    void decode(uint8x16_t codes, T *out) const {
        const uint8x16_t l = vqtbl1q_u8(low, codes), h = vqtbl1q_u8(high, codes);
        vst1q_u8(reinterpret_cast<uint8_t *>(out), vzip1q_u8(l, h));
        vst1q_u8(reinterpret_cast<uint8_t *>(out + 8), vzip2q_u8(l, h));
    }
};

template <>
struct Table<float> : FloatTable {
    using FloatTable::FloatTable;

    void decode(uint8x16_t codes, float *out) const {
        float32x4_t weights[4];
        (*this)(codes, weights);
        for (int i = 0; i < 4; ++i) vst1q_f32(out + 4 * i, weights[i]);
    }
};

template <class T>
void decode(const hb_weight &w, int64_t first, int64_t count, T *out) {
    const Codebook &book = kCodebooks[w.format];
    if (book.bits == 8) {
        for_each_segment(w, first, count, out, [&](int64_t from, int64_t to, float scale, T *at) {
            decode_bytes(w.codes, book.values, from, to, scale, at);
        });
        return;
    }
    for_each_segment(w, first, count, out, [&](int64_t from, int64_t to, float scale, T *at) {
        if (from % 2) decode_nibbles(w.codes, book.values, from, from + 1, scale, at++), ++from;
        const Table<T> table(book.values, scale);
        for (; from + 32 <= to; from += 32, at += 32) {
            const uint8x16_t bytes = vld1q_u8(w.codes + from / 2);
            const uint8x16_t high = high_nibbles(bytes), low = low_nibbles(bytes);
            table.decode(vzip1q_u8(high, low), at);
            table.decode(vzip2q_u8(high, low), at + 16);
        }
        decode_nibbles(w.codes, book.values, from, to, scale, at);
    });
}

}  // namespace

void dequantize_neon(const hb_weight &w, int64_t first, int64_t count, int dtype, void *out) {
    switch (dtype) {
        case HB_FLOAT32: return decode(w, first, count, static_cast<float *>(out));
        case HB_BFLOAT16: return decode(w, first, count, static_cast<bfloat16 *>(out));
        default: return decode(w, first, count, static_cast<float16 *>(out));
    }
}

}  // namespace halfbyte
