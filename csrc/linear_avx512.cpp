// Few-row products with AVX512: weights are decoded into registers, never into memory.
//
// As in dequantize_avx512.cpp the table is scaled, once a block, and a weight is a lookup in it; the products are exact
// float32 weights whatever the activations are. 16 bytes of codes, widened to 32 bits each, hold 32 weights: the high
// nibbles (even columns) after a shift, the low nibbles (odd columns) as they are, because the lookup reads 4 bits. So x
// is laid out once a call as groups of 32 columns, the 16 even ones first, and nothing has to be interleaved.
#include <immintrin.h>

#include "tiles.h"

namespace halfbyte {
namespace {

struct Kernel {
    using Element = float;
    static constexpr int64_t kGroup = 32;

    template <int M>
    static constexpr int rows_of_w() {
        return M == 8 ? 2 : 4;
    }

    template <int R, int M>
    static void tile(const hb_weight &w, int64_t k, int64_t column, const float *x, int64_t stride,
                     float (&sums)[R][M]) {
        constexpr int64_t kScales = 256;
        const __m512 values = _mm512_load_ps(kCodebooks[w.format].values);
        const int64_t blocks = k / w.block_size, groups = w.block_size / kGroup;
        float scales[R][kScales];
        __m512 even[R][M], odd[R][M];
        for (auto &row : even) std::fill(row, row + M, _mm512_setzero_ps());
        for (auto &row : odd) std::fill(row, row + M, _mm512_setzero_ps());
        for (int64_t block = 0; block < blocks; ++block) {
            if (block % kScales == 0) {
                const int64_t count = std::min(kScales, blocks - block);
                for (int r = 0; r < R; ++r) decode_scales(w, (column + r) * blocks + block, count, scales[r]);
            }
            __m512 table[R];
            for (int r = 0; r < R; ++r) table[r] = _mm512_mul_ps(values, _mm512_set1_ps(scales[r][block % kScales]));
            const uint8_t *codes = w.codes + (column * k + block * w.block_size) / 2;
            for (int64_t group = 0; group < groups; ++group, codes += kGroup / 2, x += stride) {
                for (int r = 0; r < R; ++r) {
                    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i *>(codes + r * k / 2));
                    const __m512i bytes = _mm512_cvtepu8_epi32(packed);
                    const __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table[r]);
                    const __m512 low = _mm512_permutexvar_ps(bytes, table[r]);
                    for (int m = 0; m < M; ++m) {
                        even[r][m] = _mm512_fmadd_ps(high, _mm512_load_ps(x + m * kGroup), even[r][m]);
                        // With many accumulators one chain each is enough to keep the multipliers busy.
                        __m512 &second = R * M > 8 ? even[r][m] : odd[r][m];
                        second = _mm512_fmadd_ps(low, _mm512_load_ps(x + m * kGroup + 16), second);
                    }
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int m = 0; m < M; ++m) sums[r][m] = _mm512_reduce_add_ps(_mm512_add_ps(even[r][m], odd[r][m]));
        }
    }
};

void prepare(const void *x, int dtype, int64_t rows, int64_t k, void *scratch) {
    const int64_t padded = padded_rows(rows);
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    for (int64_t at = 0; at < k; at += Kernel::kGroup) {
        for (int64_t row = 0; row < padded; ++row) {
            float *out = static_cast<float *>(scratch) + at * padded + row * Kernel::kGroup;
            __m512 a = _mm512_setzero_ps(), b = a;
            if (row < rows && dtype == HB_FLOAT32) {
                const float *from = static_cast<const float *>(x) + row * k + at;
                a = _mm512_loadu_ps(from), b = _mm512_loadu_ps(from + 16);
            } else if (row < rows) {
                const auto *from = reinterpret_cast<const __m256i *>(static_cast<const uint16_t *>(x) + row * k + at);
                const __m256i first = _mm256_loadu_si256(from), second = _mm256_loadu_si256(from + 1);
                if (dtype == HB_FLOAT16) {
                    a = _mm512_cvtph_ps(first), b = _mm512_cvtph_ps(second);
                } else {
                    a = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(first), 16));
                    b = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
                }
            }
            _mm512_store_ps(out, _mm512_permutex2var_ps(a, evens, b));
            _mm512_store_ps(out + 16, _mm512_permutex2var_ps(a, odds, b));
        }
    }
}

}  // namespace

const Linear linear_avx512 = {scratch_size<Kernel>, prepare, run_tiles<Kernel>};

}  // namespace halfbyte
