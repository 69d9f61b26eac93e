// Few-row products with AVX2: the design of linear_avx512.cpp in registers of 8 floats.
//
// A lookup in 16 values is two lookups in 8 and a choice by the code's top bit. Groups are 16 columns: 8 bytes of codes
// widened to 32 bits each, the 8 even columns in the high nibbles, the 8 odd ones in the low.
#include <immintrin.h>

#include "tiles.h"

namespace halfbyte {
namespace {

struct Table {
    __m256 lower, upper;

    // `index` holds a code in its low 4 bits; `top` has the code's bit 3 as its sign. Other bits are ignored.
    __m256 operator()(__m256i index, __m256i top) const {
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(lower, index), _mm256_permutevar8x32_ps(upper, index),
                                _mm256_castsi256_ps(top));
    }
};

inline float total(__m256 x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

struct Kernel {
    using Element = float;
    static constexpr int64_t kGroup = 16;

    template <int M>
    static constexpr int rows_of_w() {
        return M <= 2 ? 2 : 1;  // 16 registers: two for each table, one for each sum
    }

    template <int R, int M>
    static void tile(const hb_weight &w, int64_t k, int64_t column, const float *x, int64_t stride,
                     float (&sums)[R][M]) {
        constexpr int64_t kScales = 256;
        const float *const values = kCodebooks[w.format].values;
        const __m256 lower = _mm256_load_ps(values), upper = _mm256_load_ps(values + 8);
        const int64_t blocks = k / w.block_size, groups = w.block_size / kGroup;
        float scales[R][kScales];
        __m256 sum[R][M];
        for (auto &row : sum) std::fill(row, row + M, _mm256_setzero_ps());
        for (int64_t block = 0; block < blocks; ++block) {
            if (block % kScales == 0) {
                const int64_t count = std::min(kScales, blocks - block);
                for (int r = 0; r < R; ++r) decode_scales(w, (column + r) * blocks + block, count, scales[r]);
            }
            Table table[R];
            for (int r = 0; r < R; ++r) {
                const __m256 scale = _mm256_set1_ps(scales[r][block % kScales]);
                table[r] = {_mm256_mul_ps(lower, scale), _mm256_mul_ps(upper, scale)};
            }
            const uint8_t *codes = w.codes + (column * k + block * w.block_size) / 2;
            for (int64_t group = 0; group < groups; ++group, codes += kGroup / 2, x += stride) {
                for (int r = 0; r < R; ++r) {
                    const auto *from = reinterpret_cast<const __m128i *>(codes + r * k / 2);
                    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from));
                    const __m256 high = table[r](_mm256_srli_epi32(bytes, 4), _mm256_slli_epi32(bytes, 24));
                    const __m256 low = table[r](bytes, _mm256_slli_epi32(bytes, 28));
                    for (int m = 0; m < M; ++m) {
                        sum[r][m] = _mm256_fmadd_ps(high, _mm256_load_ps(x + m * kGroup), sum[r][m]);
                        sum[r][m] = _mm256_fmadd_ps(low, _mm256_load_ps(x + m * kGroup + 8), sum[r][m]);
                    }
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int m = 0; m < M; ++m) sums[r][m] = total(sum[r][m]);
        }
    }
};

void prepare(const hb_weight &, const void *x, int dtype, int64_t rows, int64_t k, void *scratch) {
    const int64_t padded = padded_rows(rows);
    for (int64_t row = 0; row < padded; ++row) {
        float *out = static_cast<float *>(scratch) + row * Kernel::kGroup;
        for (int64_t at = 0; at < k; at += Kernel::kGroup, out += padded * Kernel::kGroup) {
            for (int i = 0; i < 8; ++i) {
                out[i] = row < rows ? load(x, dtype, row * k + at + 2 * i) : 0.0f;
                out[i + 8] = row < rows ? load(x, dtype, row * k + at + 2 * i + 1) : 0.0f;
            }
        }
    }
}

bool grad_input(const hb_weight &w, int64_t n, int64_t k, const void *scratch, int64_t rows, int dtype, void *out,
                int64_t first, int64_t last) {
    grad_input_by_rows(dequantize_avx2, w, n, k, static_cast<const float *>(scratch), rows, dtype, out, first, last);
    return true;
}

}  // namespace

const Linear linear_avx2 = {scratch_size<Kernel>, prepare, run_tiles<Kernel>};
const GradInput grad_input_avx2 = {kGradRows, grad_scratch_size, prepare_grad, grad_input};

}  // namespace halfbyte
