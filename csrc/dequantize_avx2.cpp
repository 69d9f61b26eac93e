// Decoding with AVX2: the scaled table again (dequantize_avx512.cpp), in byte shuffles.
//
// AVX2 has no lookup in 16 words, only in 16 bytes (vpshufb). So the 16 products of a block, rounded to 16 bits, are kept
// as two tables, of their low and of their high bytes; a weight is two lookups whose results are interleaved. For float32
// outputs the table is two registers of 8 values, looked up in both and chosen by the code's top bit.
#include <immintrin.h>

#include "kernels.h"
#include "scalar.h"

namespace halfbyte {
namespace {

// 16 products value * scale as 16-bit words.
inline __m256i rounded(__m256 lower, __m256 upper, bfloat16 *) {  // as store() in scalar.h rounds, NaN included
    const auto round = [](__m256 x) {
        const __m256i u = _mm256_castps_si256(x);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
        const __m256i up = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
        const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q), quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc0));
        return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(_mm256_srli_epi32(up, 16)), quiet, nan));
    };
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(round(lower), round(upper)), 0xd8);
}
inline __m256i rounded(__m256 lower, __m256 upper, float16 *) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return _mm256_set_m128i(_mm256_cvtps_ph(upper, kNearest), _mm256_cvtps_ph(lower, kNearest));
}

template <class T>
struct Table {  // 16-bit outputs
    __m256i low, high;

    Table(const float *values, float scale) {
        const __m256 factor = _mm256_set1_ps(scale);
        const __m256i words = rounded(_mm256_mul_ps(_mm256_load_ps(values), factor),
                                      _mm256_mul_ps(_mm256_load_ps(values + 8), factor), static_cast<T *>(nullptr));
        const auto narrow = [](__m256i x) {
            const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
            return _mm256_broadcastsi128_si256(bytes);
        };
        low = narrow(_mm256_and_si256(words, _mm256_set1_epi16(0xff)));
        high = narrow(_mm256_srli_epi16(words, 8));
    }

    // 32 codes, in order -> 32 weights.
    void decode(__m256i codes, T *out) const {
        const __m256i l = _mm256_shuffle_epi8(low, codes), h = _mm256_shuffle_epi8(high, codes);
        const __m256i a = _mm256_unpacklo_epi8(l, h), b = _mm256_unpackhi_epi8(l, h);  // 0-7, 16-23 and 8-15, 24-31
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), _mm256_permute2x128_si256(a, b, 0x20));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + 16), _mm256_permute2x128_si256(a, b, 0x31));
    }
};

template <>
struct Table<float> {
    __m256 lower, upper;

    Table(const float *values, float scale)
        : lower(_mm256_mul_ps(_mm256_load_ps(values), _mm256_set1_ps(scale))),
          upper(_mm256_mul_ps(_mm256_load_ps(values + 8), _mm256_set1_ps(scale))) {}

    void decode(__m256i codes, float *out) const {
        alignas(32) uint8_t bytes[32];
        _mm256_store_si256(reinterpret_cast<__m256i *>(bytes), codes);
        for (int i = 0; i < 32; i += 8) {
            const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(bytes + i)));
            const __m256 top = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
            _mm256_storeu_ps(out + i, _mm256_blendv_ps(_mm256_permutevar8x32_ps(lower, index),
                                                       _mm256_permutevar8x32_ps(upper, index), top));
        }
    }
};

// 16 bytes -> their 32 nibbles in order.
inline __m256i nibbles(const uint8_t *codes) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(codes)), mask = _mm_set1_epi8(15);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask), low = _mm_and_si128(bytes, mask);
    return _mm256_set_m128i(_mm_unpackhi_epi8(high, low), _mm_unpacklo_epi8(high, low));
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
    for_each_segment(w, first, count, out, [&](int64_t from, int64_t to, float scale, T *at) {
        if (from % 2) decode_nibbles(w.codes, book.values, from, from + 1, scale, at++), ++from;
        const Table<T> table(book.values, scale);
        for (; from + 32 <= to; from += 32, at += 32) table.decode(nibbles(w.codes + from / 2), at);
        decode_nibbles(w.codes, book.values, from, to, scale, at);
    });
}

}  // namespace

void dequantize_avx2(const hb_weight &w, int64_t first, int64_t count, int dtype, void *out) {
    switch (dtype) {
        case HB_FLOAT32: return decode(w, first, count, static_cast<float *>(out));
        case HB_BFLOAT16: return decode(w, first, count, static_cast<bfloat16 *>(out));
        default: return decode(w, first, count, static_cast<float16 *>(out));
    }
}

}  // namespace halfbyte
