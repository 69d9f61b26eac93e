// Encoding with AVX2: a rank is the count of thresholds below, 8 weights at a time.
//
// Bisection as in quantize_avx512.cpp would need a lookup in 16 thresholds, which costs more here than it saves; 15
// comparisons, each a mask of -1 that is subtracted, do not depend on each other.
#include <immintrin.h>

#include "encode.h"
#include "kernels.h"

namespace halfbyte {
namespace {

inline __m256 load8(const float *w) { return _mm256_loadu_ps(w); }
inline __m256 load8(const bfloat16 *w) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i *>(w));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline __m256 load8(const float16 *w) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(w))); }

inline __m256i rank8(const Codebook &book, __m256 x) {
    __m256i rank = _mm256_setzero_si256();
    for (int i = 0; i < 15; ++i) {
        const __m256 above = _mm256_cmp_ps(x, _mm256_broadcast_ss(book.thresholds + i), _CMP_GT_OQ);
        rank = _mm256_sub_epi32(rank, _mm256_castps_si256(above));
    }
    return rank;
}

template <class T>
float encode_whole(const Codebook &book, const T *w, int64_t size, uint8_t *codes) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i largest = _mm256_setzero_si256();
    for (int64_t i = 0; i < size; i += 8) {
        largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(load8(w + i)), magnitude));
    }
    alignas(32) uint32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i *>(lanes), largest);
    const float absmax = float_of(*std::max_element(lanes, lanes + 8));
    const __m256 reciprocal = _mm256_set1_ps(1.0f / held(absmax));
    const __m128i to_code = _mm_load_si128(reinterpret_cast<const __m128i *>(book.ascending));
    const __m256i ascending = _mm256_broadcastsi128_si256(to_code);
    for (int64_t i = 0; i < size; i += 32) {
        __m256i rank[4];
        for (int j = 0; j < 4; ++j) rank[j] = rank8(book, _mm256_mul_ps(load8(w + i + 8 * j), reciprocal));
        // Packing works within halves of a register: the 32 bytes come out in groups of four, put in order at the end.
        const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(rank[0], rank[1]),
                                                  _mm256_packs_epi32(rank[2], rank[3]));
        const __m256i ordered = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        const __m256i code = _mm256_shuffle_epi8(ascending, ordered);
        const __m256i pair = _mm256_maddubs_epi16(code, _mm256_set1_epi16(0x0110));  // earlier * 16 + later
        const __m128i packed = _mm_packus_epi16(_mm256_castsi256_si128(pair), _mm256_extracti128_si256(pair, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(codes + i / 2), packed);
    }
    return absmax;
}

template <class T>
void quantize(const T *w, int64_t count, const Codebook &book, int64_t block_size, uint8_t *codes, float *scales) {
    for_each_block(w, count, block_size, book.bits, codes, scales,
                   [&](const T *x, int64_t size, bool whole, uint8_t *out) {
                       return whole && book.bits == 4 ? encode_whole(book, x, size, out)
                                                      : encode_block(book, x, size, whole, out);
                   });
}

}  // namespace

void quantize_avx2(const void *w, int dtype, int64_t count, int64_t format, int64_t block_size, uint8_t *codes,
                   float *scales) {
    with_weights(w, dtype, [&](const auto *typed) {
        quantize(typed, count, kCodebooks[format], block_size, codes, scales);
    });
}

}  // namespace halfbyte
