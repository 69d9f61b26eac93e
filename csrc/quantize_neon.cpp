// Encoding with NEON: bisection as a tree of selects.
//
// A table of 16 thresholds is four registers, and a lookup in it by 32-bit lanes costs more than the choice it makes.
// So each of the four rounds of the search selects its threshold by the answers of the rounds before: 11 selects and
// four comparisons for 4 weights, where counting all comparisons would take 15 and as many additions. The answers are
// the bits of the rank. GCC 12 makes 283 instructions of 32 float32 weights, 72 of them copies of a register, because a
// select overwrites one of its operands. No ARM machine has been timed.
#include <arm_neon.h>

#include "encode.h"
#include "kernels.h"

namespace halfbyte {
namespace {

inline float32x4_t load4(const float *w) { return vld1q_f32(w); }
inline float32x4_t load4(const bfloat16 *w) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t *>(w)), 16));
}
inline float32x4_t load4(const float16 *w) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t *>(w))));
}

struct Search {
    float32x4_t threshold[15];
    uint8x16_t ascending;

    explicit Search(const Codebook &book) : ascending(vld1q_u8(book.ascending)) {
        for (int i = 0; i < 15; ++i) threshold[i] = vdupq_n_f32(book.thresholds[i]);
    }

    // The rank of each of 4 weights in the low four bits of its lane; the other bits are not zero.
    uint32x4_t rank4(float32x4_t x) const {
        const float32x4_t *const t = threshold;
        const uint32x4_t a = vcgtq_f32(x, t[7]);
        const uint32x4_t b = vcgtq_f32(x, vbslq_f32(a, t[11], t[3]));
        const uint32x4_t c = vcgtq_f32(x, vbslq_f32(a, vbslq_f32(b, t[13], t[9]), vbslq_f32(b, t[5], t[1])));
        const float32x4_t upper = vbslq_f32(b, vbslq_f32(c, t[14], t[12]), vbslq_f32(c, t[10], t[8]));
        const float32x4_t lower = vbslq_f32(b, vbslq_f32(c, t[6], t[4]), vbslq_f32(c, t[2], t[0]));
        const uint32x4_t d = vcgtq_f32(x, vbslq_f32(a, upper, lower));
        return vsliq_n_u32(d, vsliq_n_u32(c, vsliq_n_u32(b, a, 1), 1), 1);
    }

    // Codes of 16 weights.
    template <class T>
    uint8x16_t operator()(const T *w, float reciprocal) const {
        uint16x8_t rank[4];
        for (int i = 0; i < 4; ++i) {
            rank[i] = vreinterpretq_u16_u32(rank4(vmulq_n_f32(load4(w + 4 * i), reciprocal)));
        }
        const uint8x16_t first = vreinterpretq_u8_u16(vuzp1q_u16(rank[0], rank[1]));
        const uint8x16_t second = vreinterpretq_u8_u16(vuzp1q_u16(rank[2], rank[3]));
        return vqtbl1q_u8(ascending, vandq_u8(vuzp1q_u8(first, second), vdupq_n_u8(15)));
    }
};

template <class T>
float encode_whole(const Search &search, const T *w, int64_t size, uint8_t *codes) {
    uint32x4_t largest = vdupq_n_u32(0);
    for (int64_t i = 0; i < size; i += 4) {
        largest = vmaxq_u32(largest, vandq_u32(vreinterpretq_u32_f32(load4(w + i)), vdupq_n_u32(0x7fffffff)));
    }
    const float absmax = float_of(vmaxvq_u32(largest)), reciprocal = 1.0f / held(absmax);
    for (int64_t i = 0; i < size; i += 32) {
        const uint8x16_t first = search(w + i, reciprocal), second = search(w + i + 16, reciprocal);
        const uint8x16_t earlier = vuzp1q_u8(first, second), later = vuzp2q_u8(first, second);
        vst1q_u8(codes + i / 2, vsliq_n_u8(later, earlier, 4));
    }
    return absmax;
}

template <class T>
void quantize(const T *w, int64_t count, const Codebook &book, int64_t block_size, uint8_t *codes, float *scales) {
    const Search search(book);
    for_each_block(w, count, block_size, book.bits, codes, scales,
                   [&](const T *x, int64_t size, bool whole, uint8_t *out) {
                       return whole && book.bits == 4 ? encode_whole(search, x, size, out)
                                                      : encode_block(book, x, size, whole, out);
                   });
}

}  // namespace

void quantize_neon(const void *w, int dtype, int64_t count, int64_t format, int64_t block_size, uint8_t *codes,
                   float *scales) {
    with_weights(w, dtype, [&](const auto *typed) {
        quantize(typed, count, kCodebooks[format], block_size, codes, scales);
    });
}

}  // namespace halfbyte
