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

// Rows of W that a thread takes at once in a few-row product: a multiple of every kernel's tile, 128 KiB of codes at
// K = 4096.
constexpr int64_t kLinearRows = 64;

// Asks for large pages under a buffer that is about to be written for the first time. A fresh 32 MiB result costs 8192
// page faults of 4 KiB, ten times what decoding it takes; with pages of 2 MiB it costs 16. A hint: failing changes
// nothing.
void advise_large_pages(void *data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t kLargePage = 1 << 21;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kLargePage - 1) & ~(kLargePage - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) & ~(kLargePage - 1);
    if (begin < end) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

int64_t element_size(int dtype) { return dtype == HB_FLOAT32 ? 4 : 2; }

}  // namespace

void hb_dequantize(int threads, const hb_weight *w, int64_t width, int64_t row, int64_t rows, int64_t column,
                   int64_t columns, int dtype, void *out) {
    const auto decode = kernels().dequantize;
    char *const bytes = static_cast<char *>(out);
    const int64_t size = element_size(dtype);
    if (columns == width) {
        advise_large_pages(out, rows * width * size);
        parallel_for(threads, rows * width, kPiece, [=](int64_t first, int64_t last) {
            decode(*w, row * width + first, last - first, dtype, bytes + first * size);
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
    const halfbyte::Linear &linear = kernels().linear;
    const Scratch scratch(linear.scratch_size(*w, std::min(rows, halfbyte::kPassRows), k));
    if (!scratch.data()) return 1;
    const int64_t size = element_size(dtype);
    std::atomic<int> failed{0};
    for (int64_t row = 0; row < rows; row += halfbyte::kPassRows) {
        const int64_t some = std::min(halfbyte::kPassRows, rows - row);
        char *const target = static_cast<char *>(out) + row * n * size;
        linear.prepare(*w, static_cast<const char *>(x) + row * k * size, dtype, some, k, scratch.data());
        parallel_for(threads, n, kLinearRows, [&](int64_t first, int64_t last) {
            if (!linear.run(*w, n, k, scratch.data(), some, dtype, bias, target, first, last)) failed = 1;
        });
    }
    return failed;
}

int hb_linear_grad_input(int threads, const hb_weight *w, int64_t n, int64_t k, const void *grad, int64_t rows,
                         int dtype, void *out) {
    const halfbyte::GradInput &product = kernels().grad_input;
    const Scratch scratch(product.scratch_size(std::min(rows, product.most_rows), n));
    if (!scratch.data()) return 1;
    const int64_t size = element_size(dtype);
    std::atomic<int> failed{0};
    for (int64_t row = 0; row < rows; row += product.most_rows) {
        const int64_t some = std::min(product.most_rows, rows - row);
        char *const target = static_cast<char *>(out) + row * k * size;
        product.prepare(static_cast<const char *>(grad) + row * n * size, dtype, some, n, scratch.data());
        parallel_for(threads, k, halfbyte::kGradColumns, [&](int64_t first, int64_t last) {
            if (!product.run(*w, n, k, scratch.data(), some, dtype, target, first, last)) failed = 1;
        });
    }
    return failed;
}
