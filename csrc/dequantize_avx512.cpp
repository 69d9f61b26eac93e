// Decoding with AVX512: the table is scaled instead of the weights.
//
// A block of 64 weights has one scale and only 16 different values. So the 16 products value * scale are computed and
// rounded once a block, in one register, and each weight is then a lookup in it (vpermw for 16-bit outputs, vpermps for
// float32). That is exact: the same product is rounded in the same way, only not as often.
//
// Nibbles come out in order without a shuffle: a byte widened to the size of *two* outputs, b, becomes
// (b >> 4) | (b << width), which has the first weight's code in the low bits of its first half and the second weight's
// in the low bits of its second half. The lookups ignore higher bits (vpermps reads 4, vpermw reads 5 of a table that
// is stored twice). Per 32 weights: one widening load, two shifts, one lookup, one store.
#include <immintrin.h>

#include "kernels.h"
#include "scalar.h"

namespace halfbyte {
namespace {

// The block's table, rounded to the output's type and laid out for its lookup.
inline __m512i scaled_table(__m512 values, float scale, float *) {
    return _mm512_castps_si512(_mm512_mul_ps(values, _mm512_set1_ps(scale)));
}
inline __m512i scaled_table(__m512 values, float scale, bfloat16 *) {
    // By hand: vcvtneps2bf16 takes subnormals for zero, and torch keeps them.
    const __m512 product = _mm512_mul_ps(values, _mm512_set1_ps(scale));
    const __m512i u = _mm512_castps_si512(product);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(product, product, _CMP_UNORD_Q);
    return _mm512_broadcast_i64x4(
        _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0))));
}
inline __m512i scaled_table(__m512 values, float scale, float16 *) {
    const __m512 product = _mm512_mul_ps(values, _mm512_set1_ps(scale));
    return _mm512_broadcast_i64x4(_mm512_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// The next 32 weights.
template <class T>
inline void decode32(const uint8_t *codes, __m512i table, T *out) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(codes)));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table));
}
template <>
inline void decode32(const uint8_t *codes, __m512i table, float *out) {
    for (int half = 0; half < 2; ++half) {
        const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(codes + 8 * half)));
        const __m512i index = _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
        _mm512_storeu_ps(out + 16 * half, _mm512_permutexvar_ps(index, _mm512_castsi512_ps(table)));
    }
}

template <class T>
void decode(const hb_weight &w, int64_t first, int64_t count, T *out) {
    const Codebook &book = kCodebooks[w.format];
    if (book.bits == 8) {
        for_each_segment(w, first, count, out, [&](int64_t from, int64_t to, float scale, T *at) {
            decode_bytes(w.codes, book.values, from, to, scale, at);
        });
        return;
    }
    const __m512 values = _mm512_load_ps(book.values);
    for_each_segment(w, first, count, out, [&](int64_t from, int64_t to, float scale, T *at) {
        if (from % 2) decode_nibbles(w.codes, book.values, from, from + 1, scale, at++), ++from;
        const __m512i table = scaled_table(values, scale, at);
        for (; from + 32 <= to; from += 32, at += 32) decode32(w.codes + from / 2, table, at);
        decode_nibbles(w.codes, book.values, from, to, scale, at);
    });
}

}  // namespace

void dequantize_avx512(const hb_weight &w, int64_t first, int64_t count, int dtype, void *out) {
    switch (dtype) {
        case HB_FLOAT32: return decode(w, first, count, static_cast<float *>(out));
        case HB_BFLOAT16: return decode(w, first, count, static_cast<bfloat16 *>(out));
        default: return decode(w, first, count, static_cast<float16 *>(out));
    }
}

}  // namespace halfbyte
