// A few-row product with its LoRA branch: y = x W^T + bias + s (x A^T) B^T in one parallel region.
//
// Written as three products this is three regions, and waking the threads three times costs a decoded token more than
// the branch's arithmetic. Here pieces of x A^T come first in the one queue of work and pieces of y after them. A piece
// of y computes its part of x W^T, by then x A^T is complete (or all but: it waits for the pieces that others still have
// in hand), and adds the branch to outputs that are still in the first-level cache.
#include <algorithm>
#include <thread>

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

using halfbyte::kLoraRanks;

namespace {

int64_t pieces_of(const hb_lora &lora) { return (lora.rank + kLoraRanks - 1) / kLoraRanks; }
int64_t floats_of(const hb_lora &lora) { return lora.rows * halfbyte::lora_width(lora.rank); }

}  // namespace

int hb_linear_lora(int threads, const hb_weight *w, int64_t n, int64_t k, const void *x, int64_t rows, int dtype,
                   const void *bias, const hb_lora *adapters, int64_t count, void *out) {
    const halfbyte::Linear &linear = halfbyte::kernels().linear;
    const halfbyte::Lora &branch = *halfbyte::kernels().lora;
    int64_t downs = 0, floats = 0;
    for (int64_t i = 0; i < count; ++i) downs += pieces_of(adapters[i]), floats += floats_of(adapters[i]);
    const int64_t packed_size = (linear.scratch_size(*w, rows, k) + 63) & ~int64_t(63);
    const halfbyte::Scratch scratch(packed_size + floats * int64_t(sizeof(float)));
    if (!scratch.data()) return 1;
    float *const products = reinterpret_cast<float *>(static_cast<char *>(scratch.data()) + packed_size);
    std::fill(products, products + floats, 0.0f);  // the rank is padded to whole vectors, with terms of zero
    linear.prepare(*w, x, dtype, rows, k, scratch.data());

    const auto down = [&](int64_t piece) {
        const hb_lora *lora = adapters;
        float *t = products;
        for (; piece >= pieces_of(*lora); ++lora) piece -= pieces_of(*lora), t += floats_of(*lora);
        const int64_t first = piece * kLoraRanks;
        branch.down(*lora, x, dtype, k, t, first, std::min(first + kLoraRanks, lora->rank));
    };
    // Whoever took a piece of x A^T is computing it and waits for nothing, so waiting for it always ends.
    std::atomic<int64_t> missing{downs};
    std::atomic<int> failed{0};
    const auto outputs = [&](int64_t first) {
        const int64_t last = std::min(first + halfbyte::kLinearRows, n);
        if (!linear.run(*w, n, k, scratch.data(), rows, dtype, bias, out, first, last)) failed = 1;
        while (missing.load(std::memory_order_acquire)) std::this_thread::yield();
        const float *t = products;
        for (int64_t i = 0; i < count; t += floats_of(adapters[i++])) {
            branch.up(adapters[i], t, n, dtype, out, first, last);
        }
    };
    const int64_t pieces = downs + (n + halfbyte::kLinearRows - 1) / halfbyte::kLinearRows;
    halfbyte::parallel_for(threads, pieces, 1, [&](int64_t piece, int64_t) {
        if (piece >= downs) return outputs((piece - downs) * halfbyte::kLinearRows);
        down(piece);
        missing.fetch_sub(1, std::memory_order_release);
    });
    return failed;
}
