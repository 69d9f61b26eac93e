// Products of rows that are sorted by expert, each with its expert's matrix of one packed weight.
//
// The arithmetic is that of hb_linear and hb_linear_grad_input. What is done here is the loop over the experts: those with
// few rows share one parallel region, in which the pieces of all of their matrices are one queue of work. A decoded token
// is sent to eight experts, say, of which each is a small product: a region for each would wait eight times for the
// slower thread, and a call from Python for each costs more than the product.
#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace {

using halfbyte::kernels;

// Bytes of prepared activations that a region works on: a part of the second-level cache.
constexpr int64_t kMostScratch = 1 << 20;

// Bytes of activations whose preparing pays for another thread.
constexpr int64_t kPreparePiece = 1 << 16;

// The matrix of one expert: [n, k] from element expert * n * k on, which is a whole number of blocks.
hb_weight matrix(const hb_weight &w, int64_t expert, int64_t n, int64_t k) {
    hb_weight part = w;
    const int64_t first = expert * n * k, block = first / w.block_size;
    part.codes += first / 2;
    if (w.scale_bits == 0) {
        part.scales = static_cast<const float *>(w.scales) + block;
    } else {
        part.scale_start += block;
    }
    return part;
}

// Rows [first, first + rows) of the activations, all of one expert, and where they lie once they are prepared.
struct Pass {
    hb_weight w;
    int64_t first, rows, scratch;
};

// The two ways through an expert's matrix. Both take rows of `length` numbers and give rows of `outputs`.
struct Forward {
    const halfbyte::Linear &kernel = kernels().linear;
    const hb_weight &w;
    int64_t n, k;
    int dtype;

    int64_t length() const { return k; }
    int64_t outputs() const { return n; }
    int64_t piece() const { return halfbyte::kLinearRows; }
    int64_t most_rows() const { return halfbyte::kPassRows; }
    int64_t scratch_size(int64_t rows) const { return kernel.scratch_size(w, rows, k); }
    void prepare(const hb_weight &part, const void *x, int64_t rows, void *scratch) const {
        kernel.prepare(part, x, dtype, rows, k, scratch);
    }
    bool run(const hb_weight &part, const void *scratch, int64_t rows, void *out, int64_t first, int64_t last) const {
        return kernel.run(part, n, k, scratch, rows, dtype, nullptr, out, first, last);
    }
    int many(int threads, const hb_weight &part, const void *x, int64_t rows, void *out) const {
        return hb_linear(threads, &part, n, k, x, rows, dtype, nullptr, out);
    }
    bool has_gemm() const { return kernels().linear_gemm && dtype == HB_BFLOAT16; }
};

struct Backward {
    const halfbyte::GradInput &kernel = kernels().grad_input;
    const hb_weight &w;
    int64_t n, k;
    int dtype;

    int64_t length() const { return n; }
    int64_t outputs() const { return k; }
    int64_t piece() const { return halfbyte::kGradColumns; }
    int64_t most_rows() const { return kernel.most_rows[dtype]; }
    int64_t scratch_size(int64_t rows) const { return kernel.scratch_size(rows, n); }
    void prepare(const hb_weight &, const void *grad, int64_t rows, void *scratch) const {
        kernel.prepare(grad, dtype, rows, n, scratch);
    }
    bool run(const hb_weight &part, const void *scratch, int64_t rows, void *out, int64_t first, int64_t last) const {
        return kernel.run(part, n, k, scratch, rows, dtype, out, first, last);
    }
    int many(int threads, const hb_weight &part, const void *grad, int64_t rows, void *out) const {
        return hb_linear_grad_input(threads, &part, n, k, grad, rows, dtype, out);
    }
    bool has_gemm() const { return kernels().grad_input_gemm && dtype == HB_BFLOAT16; }
};

// Computes some passes together, and forgets them.
template <class Product>
int run_passes(int threads, const Product &product, const char *x, char *out, std::vector<Pass> &passes) {
    if (passes.empty()) return 0;
    const int64_t size = product.dtype == HB_FLOAT32 ? 4 : 2;
    const int64_t pieces = (product.outputs() + product.piece() - 1) / product.piece();
    const halfbyte::Scratch scratch(passes.back().scratch + product.scratch_size(passes.back().rows));
    if (!scratch.data()) return 1;
    char *const prepared = static_cast<char *>(scratch.data());
    const int64_t most = std::max_element(passes.begin(), passes.end(), [](const Pass &a, const Pass &b) {
                             return a.rows < b.rows;
                         })->rows;
    const int64_t together = std::max<int64_t>(1, kPreparePiece / (most * product.length() * size));
    halfbyte::parallel_for(threads, int64_t(passes.size()), together, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const Pass &pass = passes[size_t(i)];
            product.prepare(pass.w, x + pass.first * product.length() * size, pass.rows, prepared + pass.scratch);
        }
    });
    std::atomic<int> failed{0};
    halfbyte::parallel_for(threads, int64_t(passes.size()) * pieces, 1, [&](int64_t at, int64_t) {
        const Pass &pass = passes[size_t(at / pieces)];
        const int64_t first = at % pieces * product.piece();
        const int64_t last = std::min(first + product.piece(), product.outputs());
        char *const to = out + pass.first * product.outputs() * size;
        if (!product.run(pass.w, prepared + pass.scratch, pass.rows, to, first, last)) failed = 1;
    });
    passes.clear();
    return failed;
}

template <class Product>
int multiply(int threads, const Product &product, int64_t experts, const void *x, const int32_t *ends, int64_t most,
             void *out) {
    const int64_t size = product.dtype == HB_FLOAT32 ? 4 : 2;
    const char *const from = static_cast<const char *>(x);
    char *const to = static_cast<char *>(out);
    std::vector<Pass> passes;
    int64_t used = 0;
    for (int64_t expert = 0, row = 0; expert < experts; ++expert) {
        const int64_t rows = ends[expert] - row;
        const hb_weight part = matrix(product.w, expert, product.n, product.k);
        if (rows >= halfbyte::kGemmRows && rows <= most && product.has_gemm()) {
            if (product.many(threads, part, from + row * product.length() * size, rows,
                             to + row * product.outputs() * size)) {
                return 1;
            }
        } else if (rows <= most) {
            for (int64_t first = row; first < ends[expert]; first += product.most_rows()) {
                const int64_t some = std::min(product.most_rows(), ends[expert] - first);
                const int64_t bytes = (product.scratch_size(some) + 63) & ~int64_t(63);
                if (used + bytes > kMostScratch) {
                    if (run_passes(threads, product, from, to, passes)) return 1;
                    used = 0;
                }
                passes.push_back({part, first, some, used});
                used += bytes;
            }
        }
        row = ends[expert];
    }
    return run_passes(threads, product, from, to, passes);
}

}  // namespace

int hb_grouped_linear(int threads, const hb_weight *w, int64_t experts, int64_t n, int64_t k, const void *x,
                      const int32_t *ends, int64_t most, int dtype, void *out) try {
    return multiply(threads, Forward{kernels().linear, *w, n, k, dtype}, experts, x, ends, most, out);
} catch (const std::bad_alloc &) {
    return 1;
}

int hb_grouped_linear_grad_input(int threads, const hb_weight *w, int64_t experts, int64_t n, int64_t k,
                                 const void *grad, const int32_t *ends, int64_t most, int dtype, void *out) try {
    return multiply(threads, Backward{kernels().grad_input, *w, n, k, dtype}, experts, grad, ends, most, out);
} catch (const std::bad_alloc &) {
    return 1;
}
