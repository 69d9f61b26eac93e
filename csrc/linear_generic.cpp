// Few-row products in plain C++.
//
// A row of W is decoded a block at a time into a small buffer that stays in the first-level cache, and multiplied with
// each row of x from there. Sums run in 16 lanes, which the compiler may hold in vector registers and which fixes the
// order of the sum whatever it does.
#include "product.h"

namespace halfbyte {
namespace {

int64_t scratch_size(const hb_weight &, int64_t rows, int64_t k) { return rows * k * int64_t(sizeof(float)); }

void prepare(const hb_weight &, const void *x, int dtype, int64_t rows, int64_t k, void *scratch) {
    float *const out = static_cast<float *>(scratch);
    for (int64_t i = 0; i < rows * k; ++i) out[i] = load(x, dtype, i);
}

bool run(const hb_weight &w, int64_t n, int64_t k, const void *scratch, int64_t rows, int dtype, const void *bias,
         void *out, int64_t first, int64_t last) {
    constexpr int kLanes = 16;
    constexpr int64_t kRows = 4, kChunk = 512;
    const float *const x = static_cast<const float *>(scratch);
    float weights[kChunk];
    for (int64_t column = first; column < last; ++column) {
        for (int64_t row = 0; row < rows; row += kRows) {
            const int64_t height = std::min(kRows, rows - row);
            float sums[kRows][kLanes] = {};
            for (int64_t at = 0; at < k; at += kChunk) {
                const int64_t size = std::min(kChunk, k - at);
                dequantize_generic(w, column * k + at, size, HB_FLOAT32, weights);
                for (int64_t r = 0; r < height; ++r) {
                    const float *const xr = x + (row + r) * k + at;
                    for (int64_t i = 0; i < size; i += kLanes) {
                        for (int lane = 0; lane < kLanes; ++lane) sums[r][lane] += weights[i + lane] * xr[i + lane];
                    }
                }
            }
            for (int64_t r = 0; r < height; ++r) {
                float total = 0;
                for (const float sum : sums[r]) total += sum;
                finish(total, dtype, bias, column, out, (row + r) * n + column);
            }
        }
    }
    return true;
}

bool grad_input(const hb_weight &w, int64_t n, int64_t k, const void *scratch, int64_t rows, int dtype, void *out,
                int64_t first, int64_t last) {
    grad_input_by_rows(dequantize_generic, w, n, k, static_cast<const float *>(scratch), rows, dtype, out, first, last);
    return true;
}

}  // namespace

const Linear linear_generic = {scratch_size, prepare, run};
const GradInput grad_input_generic = {{kGradRows, kGradRows, kGradRows}, grad_scratch_size, prepare_grad, grad_input};

}  // namespace halfbyte
