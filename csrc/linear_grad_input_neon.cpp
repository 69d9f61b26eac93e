// g W for few rows with NEON: the design of linear_grad_input_avx512.cpp.
//
// Four rows of W are decoded at a time, 16 columns each in 16 registers, so that a partial sum is loaded and stored
// once for four multiplications. The four scaled tables do not fit beside them and are read again for each 16 columns.
#include "kernels.h"
#include "neon.h"
#include "product.h"

namespace halfbyte {
namespace {

constexpr int kRowsOfW = 4;
constexpr int64_t kMostScales = kGradColumns / 32;

// sums += grad [R, rows]^T W[row .. row + R, first .. first + width).
template <int R>
inline void accumulate(const hb_weight &w, int64_t k, int64_t row, int64_t first, int64_t width, const float *grad,
                       int64_t rows, float (*sums)[kGradColumns]) {
    const float *const values = kCodebooks[w.format].values;
    const int64_t span = std::min(w.block_size, width);  // both are powers of two or whole blocks
    float scales[R][kMostScales];
    for (int r = 0; r < R; ++r) {
        const int64_t block = ((row + r) * k + first) / w.block_size;
        decode_scales(w, block, (first + width - 1) / w.block_size - first / w.block_size + 1, scales[r]);
    }
    for (int64_t at = 0; at < width; at += span) {
        FloatTable table[R];
        for (int r = 0; r < R; ++r) table[r] = FloatTable(values, scales[r][at / span]);
        for (int64_t column = at; column < at + span; column += 16) {
            float32x4_t weights[R][4];
            for (int r = 0; r < R; ++r) table[r](codes16(w.codes + ((row + r) * k + first + column) / 2), weights[r]);
            for (int64_t m = 0; m < rows; ++m) {
                for (int i = 0; i < 4; ++i) {
                    float *const at_sum = &sums[m][column + 4 * i];
                    float32x4_t sum = vld1q_f32(at_sum);
                    for (int r = 0; r < R; ++r) sum = vfmaq_n_f32(sum, weights[r][i], grad[r * rows + m]);
                    vst1q_f32(at_sum, sum);
                }
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

const GradInput grad_input_neon = {{kGradRows, kGradRows, kGradRows}, grad_scratch_size, prepare_grad, run};

}  // namespace halfbyte
