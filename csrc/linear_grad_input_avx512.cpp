// g W for few rows with AVX512.
//
// The sum runs over the rows of W, the outputs lie along its columns: a thread owns a range of columns and walks down
// all rows, so that no sum is shared. Four rows of W are decoded at a time, so that a partial sum is loaded and stored
// once for four multiplications.
#include <immintrin.h>

#include "kernels.h"
#include "product.h"

namespace halfbyte {
namespace {

constexpr int kRowsOfW = 4;
constexpr int64_t kMostScales = kGradColumns / 32;

// 16 weights in their order, as in dequantize_avx512.cpp.
inline __m512 decode16(const uint8_t *codes, __m512 table) {
    const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(codes)));
    return _mm512_permutexvar_ps(_mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32)), table);
}

// sums += grad [R, rows]^T W[row .. row + R, first .. first + width).
template <int R>
inline void accumulate(const hb_weight &w, int64_t k, int64_t row, int64_t first, int64_t width, const float *grad,
                       int64_t rows, float (*sums)[kGradColumns]) {
    const __m512 values = _mm512_load_ps(kCodebooks[w.format].values);
    const int64_t span = std::min(w.block_size, width);  // both are powers of two or whole blocks
    float scales[R][kMostScales];
    for (int r = 0; r < R; ++r) {
        const int64_t block = ((row + r) * k + first) / w.block_size;
        decode_scales(w, block, (first + width - 1) / w.block_size - first / w.block_size + 1, scales[r]);
    }
    for (int64_t at = 0; at < width; at += span) {
        __m512 table[R];
        for (int r = 0; r < R; ++r) table[r] = _mm512_mul_ps(values, _mm512_set1_ps(scales[r][at / span]));
        for (int64_t column = at; column < at + span; column += 16) {
            __m512 weights[R];
            for (int r = 0; r < R; ++r) {
                weights[r] = decode16(w.codes + ((row + r) * k + first + column) / 2, table[r]);
            }
            for (int64_t m = 0; m < rows; ++m) {
                __m512 sum = _mm512_load_ps(&sums[m][column]);
                for (int r = 0; r < R; ++r) sum = _mm512_fmadd_ps(weights[r], _mm512_set1_ps(grad[r * rows + m]), sum);
                _mm512_store_ps(&sums[m][column], sum);
            }
        }
    }
}

bool run(const hb_weight &w, int64_t n, int64_t k, const void *scratch, int64_t rows, int dtype, void *out,
         int64_t first, int64_t last) {
    alignas(64) float sums[kGradRows][kGradColumns];
    const float *const grad = static_cast<const float *>(scratch);
    const int64_t width = last - first;
    for (int64_t m = 0; m < rows; ++m) std::fill(sums[m], sums[m] + width, 0.0f);
    int64_t row = 0;
    for (; row + kRowsOfW <= n; row += kRowsOfW) {
        accumulate<kRowsOfW>(w, k, row, first, width, grad + row * rows, rows, sums);
    }
    for (; row < n; ++row) accumulate<1>(w, k, row, first, width, grad + row * rows, rows, sums);
    for (int64_t m = 0; m < rows; ++m) {
        for (int64_t i = 0; i < width; ++i) finish(sums[m][i], dtype, nullptr, 0, out, m * k + first + i);
    }
    return true;
}

}  // namespace

const GradInput grad_input_avx512 = {{kGradRows, kGradRows, kGradRows}, grad_scratch_size, prepare_grad, run};

}  // namespace halfbyte
