// The C interface: cuts each op into independent pieces and hands them to threads.
#include <algorithm>
#include <atomic>

#include "kernels.h"
#include "parallel.h"
#include "product.h"
#include "scratch.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

using halfbyte::kernels;
using halfbyte::parallel_for;
using halfbyte::Scratch;

namespace {

// Weights a thread takes at once: 64 K take a few microseconds, many times the price of taking a piece, and 16 K bytes
// of codes and 128 K of bf16 stay in the second-level cache. A multiple of every block size.
constexpr int64_t kPiece = 1 << 16;

constexpr int64_t kLargePage = 1 << 21;

// Asks for large pages under a buffer that is about to be written for the first time. A fresh 32 MiB result costs 8192
// page faults of 4 KiB, ten times what decoding it takes; with pages of 2 MiB it costs 16. A hint: failing changes
// nothing.
void advise_large_pages(void *data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t mask = ~uintptr_t(kLargePage - 1);
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kLargePage - 1) & mask;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) & mask;
    if (begin < end) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

// The panel of a Gemm: the widest that gives every thread equally many.
int64_t panel_size(int threads, int64_t outputs, int64_t most, int64_t block_size) {
    const int64_t unit = std::min(std::max<int64_t>(block_size, 64), most);
    const int64_t rounds = std::max<int64_t>(1, (outputs + threads * most - 1) / (threads * most));
    const int64_t even = (outputs + threads * rounds - 1) / (threads * rounds);
    return (even + unit - 1) / unit * unit;
}

// A product by a Gemm. Passes have nearly equal numbers of rows; neither they nor the order of any sum depend on the
// threads.
int multiply(int threads, const halfbyte::Gemm &gemm, const hb_weight *w, int64_t n, int64_t k, const void *x,
             int64_t rows, int64_t outputs, int64_t length, const void *bias, void *out) {
    const int64_t passes = (rows + gemm.most_rows - 1) / gemm.most_rows, step = (rows + passes - 1) / passes;
    const int64_t panel = panel_size(threads, outputs, gemm.most_outputs, w->block_size);
    threads = int(std::min<int64_t>(threads, (outputs + panel - 1) / panel));
    const int64_t packed_size = gemm.packed_size(step, length), workspace_size = gemm.workspace_size(step);
    const Scratch scratch(packed_size + threads * workspace_size);
    if (!scratch.data()) return 1;
    advise_large_pages(out, rows * outputs * 2);
    char *const workspaces = static_cast<char *>(scratch.data()) + packed_size;
    for (int64_t row = 0; row < rows; row += step) {
        const int64_t some = std::min(step, rows - row);
        const char *const from = static_cast<const char *>(x) + row * length * 2;
        char *const to = static_cast<char *>(out) + row * outputs * 2;
        parallel_for(threads, gemm.pieces(some, length), 1, [&](int64_t first, int64_t last) {
            gemm.pack(from, some, length, scratch.data(), first, last);
        });
        std::atomic<int64_t> next{0};
        parallel_for(threads, threads, 1, [&](int64_t thread, int64_t) {
            gemm.run(*w, n, k, scratch.data(), some, bias, to, panel, next, workspaces + thread * workspace_size);
        });
    }
    return 0;
}

int64_t element_size(int dtype) { return dtype == HB_FLOAT32 ? 4 : 2; }

}  // namespace

void hb_dequantize(int threads, const hb_weight *w, int64_t width, int64_t row, int64_t rows, int64_t column,
                   int64_t columns, int dtype, void *out) {
    const auto decode = kernels().dequantize;
    char *const bytes = static_cast<char *>(out);
    const int64_t size = element_size(dtype);
    if (columns == width) {
        const int64_t count = rows * width;
        advise_large_pages(out, count * size);
        // A large result is cut at its large pages: two threads that touch the same fresh one would both clear it.
        const int64_t piece = count * size < 4 * kLargePage ? kPiece : kLargePage / size;
        const int64_t shift = piece == kPiece ? 0 : int64_t(reinterpret_cast<uintptr_t>(out) % kLargePage) / size;
        parallel_for(threads, count + shift, piece, [=](int64_t first, int64_t last) {
            const int64_t from = std::max<int64_t>(first - shift, 0), to = last - shift;
            decode(*w, row * width + from, to - from, dtype, bytes + from * size);
        });
        return;
    }
    parallel_for(threads, rows, std::max<int64_t>(1, kPiece / columns), [=](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) {
            decode(*w, (row + r) * width + column, columns, dtype, bytes + r * columns * size);
        }
    });
}

void hb_dequantize_rows(int threads, const hb_weight *w, int64_t width, const int64_t *index, int64_t count, int dtype,
                        void *out) {
    const auto decode = kernels().dequantize;
    char *const bytes = static_cast<char *>(out);
    const int64_t size = element_size(dtype);
    parallel_for(threads, count, std::max<int64_t>(1, kPiece / std::max<int64_t>(width, 1)),
                 [=](int64_t first, int64_t last) {
                     for (int64_t i = first; i < last; ++i) {
                         decode(*w, index[i] * width, width, dtype, bytes + i * width * size);
                     }
                 });
}

void hb_quantize(int threads, const void *w, int dtype, int64_t count, int64_t format, int64_t block_size,
                 uint8_t *codes, float *scales) {
    const auto encode = kernels().quantize;
    const char *const bytes = static_cast<const char *>(w);
    const int64_t size = element_size(dtype), bits = halfbyte::kCodebooks[format].bits;
    parallel_for(threads, count, kPiece, [=](int64_t first, int64_t last) {
        encode(bytes + first * size, dtype, last - first, format, block_size, codes + first * bits / 8,
               scales + first / block_size);
    });
}

int hb_linear(int threads, const hb_weight *w, int64_t n, int64_t k, const void *x, int64_t rows, int dtype,
              const void *bias, void *out) {
    const halfbyte::Gemm *const gemm = kernels().linear_gemm;
    if (gemm && dtype == HB_BFLOAT16 && rows >= halfbyte::kGemmRows) {
        return multiply(threads, *gemm, w, n, k, x, rows, n, k, bias, out);
    }
    const halfbyte::Linear &linear = kernels().linear;
    const Scratch scratch(linear.scratch_size(*w, std::min(rows, halfbyte::kPassRows), k));
    if (!scratch.data()) return 1;
    const int64_t size = element_size(dtype);
    std::atomic<int> failed{0};
    for (int64_t row = 0; row < rows; row += halfbyte::kPassRows) {
        const int64_t some = std::min(halfbyte::kPassRows, rows - row);
        char *const target = static_cast<char *>(out) + row * n * size;
        linear.prepare(*w, static_cast<const char *>(x) + row * k * size, dtype, some, k, scratch.data());
        parallel_for(threads, n, halfbyte::kLinearRows, [&](int64_t first, int64_t last) {
            if (!linear.run(*w, n, k, scratch.data(), some, dtype, bias, target, first, last)) failed = 1;
        });
    }
    return failed;
}

int hb_linear_grad_input(int threads, const hb_weight *w, int64_t n, int64_t k, const void *grad, int64_t rows,
                         int dtype, void *out) {
    const halfbyte::Gemm *const gemm = kernels().grad_input_gemm;
    if (gemm && dtype == HB_BFLOAT16 && rows >= halfbyte::kGemmRows) {
        return multiply(threads, *gemm, w, n, k, grad, rows, k, n, nullptr, out);
    }
    const halfbyte::GradInput &product = kernels().grad_input;
    const int64_t most_rows = product.most_rows[dtype];
    const Scratch scratch(product.scratch_size(std::min(rows, most_rows), n));
    if (!scratch.data()) return 1;
    const int64_t size = element_size(dtype);
    std::atomic<int> failed{0};
    for (int64_t row = 0; row < rows; row += most_rows) {
        const int64_t some = std::min(most_rows, rows - row);
        char *const target = static_cast<char *>(out) + row * k * size;
        product.prepare(static_cast<const char *>(grad) + row * n * size, dtype, some, n, scratch.data());
        parallel_for(threads, k, halfbyte::kGradColumns, [&](int64_t first, int64_t last) {
            if (!product.run(*w, n, k, scratch.data(), some, dtype, target, first, last)) failed = 1;
        });
    }
    return failed;
}
