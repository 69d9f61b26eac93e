// How a few-row product is cut into register tiles; shared by the vector kernels. See scalar.h for the namespace.
//
// A tile is R rows of W times M rows of x, with one accumulator register for each pair. More rows of x share one decoded
// weight, more rows of W share one load of x; R * M accumulators and the decoded weights have to fit the registers.
#pragma once

#include "kernels.h"
#include "product.h"

namespace halfbyte {
namespace {

// Rows of x are padded with zeros to a whole tile: 1, 2, 4, or a multiple of 8.
inline int64_t tile_rows(int64_t rows) { return rows <= 2 ? rows : rows <= 4 ? 4 : 8; }
inline int64_t padded_rows(int64_t rows) {
    const int64_t tile = tile_rows(rows);
    return (rows + tile - 1) / tile * tile;
}

// Kernel::tile<R, M>(w, k, column, x, stride, sums): the product of rows [column, column + R) of W with M rows of x,
// where `x` points at the first row's first group and `stride` is the distance of two groups; sums [R][M].
template <class Kernel, int R, int M>
inline void run_tile(const hb_weight &w, int64_t n, int64_t k, const typename Kernel::Element *x, int64_t rows,
                     int dtype, const void *bias, void *out, int64_t column) {
    const int64_t padded = padded_rows(rows);
    for (int64_t row = 0; row < rows; row += M) {
        float sums[R][M];
        Kernel::template tile<R, M>(w, k, column, x + row * Kernel::kGroup, padded * Kernel::kGroup, sums);
        for (int64_t m = 0; m < std::min<int64_t>(M, rows - row); ++m) {
            for (int r = 0; r < R; ++r) finish(sums[r][m], dtype, bias, column + r, out, (row + m) * n + column + r);
        }
    }
}

// The most rows of W a tile takes for M rows of x: measured on a 2-core Sapphire Rapids at K = N = 4096.
template <class Kernel, int M>
inline void run_rows(const hb_weight &w, int64_t n, int64_t k, const typename Kernel::Element *x, int64_t rows,
                     int dtype, const void *bias, void *out, int64_t first, int64_t last) {
    constexpr int R = Kernel::template rows_of_w<M>();
    int64_t column = first;
    for (; column + R <= last; column += R) run_tile<Kernel, R, M>(w, n, k, x, rows, dtype, bias, out, column);
    for (; column < last; ++column) run_tile<Kernel, 1, M>(w, n, k, x, rows, dtype, bias, out, column);
}

template <class Kernel>
inline bool run_tiles(const hb_weight &w, int64_t n, int64_t k, const void *scratch, int64_t rows, int dtype,
                      const void *bias, void *out, int64_t first, int64_t last) {
    const auto *x = static_cast<const typename Kernel::Element *>(scratch);
    const int64_t tile = tile_rows(rows);
    const auto run = tile == 1   ? run_rows<Kernel, 1>
                     : tile == 2 ? run_rows<Kernel, 2>
                     : tile == 4 ? run_rows<Kernel, 4>
                                 : run_rows<Kernel, 8>;
    run(w, n, k, x, rows, dtype, bias, out, first, last);
    return true;
}

template <class Kernel>
inline int64_t scratch_size(const hb_weight &, int64_t rows, int64_t k) {
    const int64_t groups = (k + Kernel::kGroup - 1) / Kernel::kGroup;
    return padded_rows(rows) * groups * Kernel::kGroup * int64_t(sizeof(typename Kernel::Element));
}

}  // namespace
}  // namespace halfbyte
