// The C interface of the row-wise kernels: cuts each op into rows and hands them to threads.
#include <algorithm>

#include "kernels.h"
#include "parallel.h"

using halfbyte::kernels;
using halfbyte::parallel_for;

namespace {

// Elements that a thread takes at once: tens of microseconds of work, many times the price of taking a piece.
constexpr int64_t kElements = 1 << 15;

int64_t rows_at_once(int64_t columns) { return std::max<int64_t>(1, kElements / std::max<int64_t>(columns, 1)); }

}  // namespace

void hb_cross_entropy(int threads, void *logits, int dtype, int64_t rows, int64_t vocabulary, const int64_t *labels,
                      int gradient, float *losses) {
    const auto run = kernels().rowwise->of[dtype].cross_entropy;
    parallel_for(threads, rows, rows_at_once(vocabulary), [=](int64_t first, int64_t last) {
        run(logits, first, last, vocabulary, labels, gradient != 0, losses);
    });
}

void hb_rms_norm(int threads, const void *x, const void *weight, int dtype, int64_t rows, int64_t n, float eps, void *y,
                 float *rstd) {
    const auto run = kernels().rowwise->of[dtype].rms_norm;
    parallel_for(threads, rows, rows_at_once(n),
                 [=](int64_t first, int64_t last) { run(x, weight, first, last, n, eps, y, rstd); });
}

void hb_rms_norm_grad(int threads, const void *grad, const void *x, const void *weight, const float *rstd, int dtype,
                      int64_t rows, int64_t n, void *out) {
    const auto run = kernels().rowwise->of[dtype].rms_norm_grad;
    parallel_for(threads, rows, rows_at_once(n),
                 [=](int64_t first, int64_t last) { run(grad, x, weight, rstd, first, last, n, out); });
}

void hb_swiglu(int threads, const void *gate, const void *up, int dtype, int64_t count, void *y) {
    const auto run = kernels().rowwise->of[dtype].swiglu;
    parallel_for(threads, count, kElements, [=](int64_t first, int64_t last) { run(gate, up, first, last, y); });
}

void hb_swiglu_grad(int threads, const void *grad, const void *gate, const void *up, int dtype, int64_t count,
                    void *grad_gate, void *grad_up) {
    const auto run = kernels().rowwise->of[dtype].swiglu_grad;
    parallel_for(threads, count, kElements,
                 [=](int64_t first, int64_t last) { run(grad, gate, up, first, last, grad_gate, grad_up); });
}

void hb_rotary(int threads, const void *x, const void *cosine, const void *sine, int dtype, int64_t tokens,
               int64_t angles, int64_t heads, int64_t dim, int inverse, void *out) {
    const auto run = kernels().rowwise->of[dtype].rotary;
    parallel_for(threads, tokens, rows_at_once(heads * dim), [=](int64_t first, int64_t last) {
        run(x, cosine, sine, first, last, angles, heads, dim, inverse != 0, out);
    });
}
