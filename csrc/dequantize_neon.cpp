// Decoding with NEON: the scaled table of dequantize_avx512.cpp, in byte lookups.
//
// The tables and their lookups are in neon.h. The inner loop over 32 weights is, as GCC 12 makes it, 22 instructions
// for 16-bit outputs and 40 for float32. No ARM machine has been timed.
#include "kernels.h"
#include "neon.h"

namespace halfbyte {
namespace {

template <class T>
struct Table : WordTable<T> {  // 16-bit outputs
    using WordTable<T>::WordTable;

    void decode(uint8x16_t codes, T *out) const {
        uint16x8_t words[2];
        (*this)(codes, words);
        vst1q_u16(reinterpret_cast<uint16_t *>(out), words[0]);
        vst1q_u16(reinterpret_cast<uint16_t *>(out + 8), words[1]);
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
