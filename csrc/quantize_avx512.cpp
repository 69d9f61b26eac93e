// Encoding with AVX512: 16 weights search the thresholds at once.
//
// The 15 thresholds fit one register, so a search by bisection is four rounds of (look up the threshold in the middle,
// compare, step), with no memory access. Counting all 15 comparisons instead gives the same rank with twice the
// instructions. A block is read twice, for absmax and for the codes; the second time it comes from the first-level
// cache, so memory is passed over once.
#include <immintrin.h>

#include "encode.h"
#include "kernels.h"

namespace halfbyte {
namespace {

inline __m512 load16(const float *w) { return _mm512_loadu_ps(w); }
inline __m512 load16(const bfloat16 *w) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(w));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline __m512 load16(const float16 *w) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(w)));
}

struct Search {
    __m512 thresholds;
    __m512i ascending;

    explicit Search(const Codebook &book)
        : thresholds(_mm512_load_ps(book.thresholds)),
          ascending(_mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i *>(book.ascending)))) {}

    // Codes of 16 weights, one in each 32-bit lane.
    __m512i operator()(__m512 x) const {
        __m512i rank = _mm512_setzero_si512();
        for (int step = 8; step; step /= 2) {
            const __m512i middle = _mm512_add_epi32(rank, _mm512_set1_epi32(step - 1));
            const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_permutexvar_ps(middle, thresholds), _CMP_GT_OQ);
            rank = _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(step));
        }
        return _mm512_permutexvar_epi32(rank, ascending);
    }
};

template <class T>
float encode_whole(const Search &search, const T *w, int64_t size, uint8_t *codes) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i largest = _mm512_setzero_si512();
    for (int64_t i = 0; i < size; i += 16) {
        largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(load16(w + i)), magnitude));
    }
    const float absmax = float_of(uint32_t(_mm512_reduce_max_epi32(largest)));
    const __m512 reciprocal = _mm512_set1_ps(1.0f / held(absmax));
    for (int64_t i = 0; i < size; i += 32) {
        for (int half = 0; half < 2; ++half) {
            const __m512i code = search(_mm512_mul_ps(load16(w + i + 16 * half), reciprocal));
            // A 64-bit lane holds two neighbours; the earlier one, in its low half, becomes the high nibble.
            const __m512i pair = _mm512_or_si512(_mm512_slli_epi64(code, 4), _mm512_srli_epi64(code, 32));
            _mm_storel_epi64(reinterpret_cast<__m128i *>(codes + i / 2 + 8 * half), _mm512_cvtepi64_epi8(pair));
        }
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

void quantize_avx512(const void *w, int dtype, int64_t count, int64_t format, int64_t block_size, uint8_t *codes,
                     float *scales) {
    with_weights(w, dtype, [&](const auto *typed) {
        quantize(typed, count, kCodebooks[format], block_size, codes, scales);
    });
}

}  // namespace halfbyte
