// What products share: activations and results of any element type, and g W row by row. See scalar.h for the namespace.
#pragma once

#include "kernels.h"
#include "scalar.h"

namespace halfbyte {
namespace {

inline float load(const void *x, int dtype, int64_t at) {
    switch (dtype) {
        case HB_FLOAT32: return static_cast<const float *>(x)[at];
        case HB_BFLOAT16: return to_float(static_cast<const bfloat16 *>(x)[at]);
        default: return to_float(static_cast<const float16 *>(x)[at]);
    }
}

// out[at] = sum + bias[column], rounded once.
inline void finish(float sum, int dtype, const void *bias, int64_t column, void *out, int64_t at) {
    if (bias) sum += load(bias, dtype, column);
    switch (dtype) {
        case HB_FLOAT32: return store(static_cast<float *>(out) + at, sum);
        case HB_BFLOAT16: return store(static_cast<bfloat16 *>(out) + at, sum);
        default: return store(static_cast<float16 *>(out) + at, sum);
    }
}

// What the vector kernels of g W share: 32 rows at a time, g as floats, transposed to [n, rows].
constexpr int64_t kGradRows = 32;

inline int64_t grad_scratch_size(int64_t rows, int64_t n) { return rows * n * int64_t(sizeof(float)); }

inline void prepare_grad(const void *grad, int dtype, int64_t rows, int64_t n, void *scratch) {
    float *const out = static_cast<float *>(scratch);
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < n; ++i) out[i * rows + r] = load(grad, dtype, r * n + i);
    }
}

// out[:, first .. last) of grad W: each row's piece is decoded into a buffer and added, scaled, to the sums.
inline void grad_input_by_rows(Dequantize decode, const hb_weight &w, int64_t n, int64_t k, const float *grad,
                               int64_t rows, int dtype, void *out, int64_t first, int64_t last) {
    float sums[kGradRows][kGradColumns];
    float weights[kGradColumns];
    const int64_t width = last - first;
    for (int64_t r = 0; r < rows; ++r) std::fill(sums[r], sums[r] + width, 0.0f);
    for (int64_t row = 0; row < n; ++row) {
        decode(w, row * k + first, width, HB_FLOAT32, weights);
        for (int64_t r = 0; r < rows; ++r) {
            const float g = grad[row * rows + r];
            for (int64_t i = 0; i < width; ++i) sums[r][i] += g * weights[i];
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < width; ++i) finish(sums[r][i], dtype, nullptr, 0, out, r * k + first + i);
    }
}

}  // namespace
}  // namespace halfbyte
