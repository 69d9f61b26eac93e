// Few-row products with NEON: the design of linear_avx512.cpp in registers of 4 floats.
//
// 16 bytes of codes are 32 weights: the high nibbles are the even columns, the low nibbles the odd ones, and x is laid
// out once a call in that order, so that nibbles need no zip. 16 weights are 12 operations (neon.h), and 4 fused
// multiply-adds for each row of x: decoding outweighs the product up to 3 rows. The inner loops are, as GCC 12 makes
// them, 89 instructions for 2 rows of W, one row of x and 32 columns, and 159 for 2 rows of W and 4 of x. No ARM
// machine has been timed.
#include "neon.h"
#include "tiles.h"

namespace halfbyte {
namespace {

struct Kernel {
    using Element = float;
    static constexpr int64_t kGroup = 32;

    template <int M>
    static constexpr int rows_of_w() {
        return M == 8 ? 1 : 2;  // 32 registers: four for each table, four for each row's weights, the sums
    }

    template <int R, int M>
    static void tile(const hb_weight &w, int64_t k, int64_t column, const float *x, int64_t stride,
                     float (&sums)[R][M]) {
        constexpr int64_t kScales = 256;
        // At least 8 sums that do not wait for each other, where the tile is large enough for it.
        constexpr int kChains = R * M >= 8 ? 1 : R * M >= 4 ? 2 : 4;
        const float *const values = kCodebooks[w.format].values;
        const int64_t blocks = k / w.block_size, groups = w.block_size / kGroup;
        float scales[R][kScales];
        float32x4_t sum[R][M][kChains];
        for (auto &row : sum) {
            for (auto &chains : row) std::fill(chains, chains + kChains, vdupq_n_f32(0.0f));
        }
        for (int64_t block = 0; block < blocks; ++block) {
            if (block % kScales == 0) {
                const int64_t count = std::min(kScales, blocks - block);
                for (int r = 0; r < R; ++r) decode_scales(w, (column + r) * blocks + block, count, scales[r]);
            }
            FloatTable table[R];
            for (int r = 0; r < R; ++r) table[r] = FloatTable(values, scales[r][block % kScales]);
            const uint8_t *codes = w.codes + (column * k + block * w.block_size) / 2;
            for (int64_t group = 0; group < groups; ++group, codes += kGroup / 2, x += stride) {
                uint8x16_t bytes[R];
                for (int r = 0; r < R; ++r) bytes[r] = vld1q_u8(codes + r * k / 2);
                for (int odd = 0; odd < 2; ++odd) {
                    float32x4_t weights[R][4];
                    for (int r = 0; r < R; ++r) {
                        table[r](odd ? low_nibbles(bytes[r]) : high_nibbles(bytes[r]), weights[r]);
                    }
                    for (int m = 0; m < M; ++m) {
                        for (int i = 0; i < 4; ++i) {
                            const float32x4_t some = vld1q_f32(x + m * kGroup + 16 * odd + 4 * i);
                            for (int r = 0; r < R; ++r) {
                                sum[r][m][i % kChains] = vfmaq_f32(sum[r][m][i % kChains], weights[r][i], some);
                            }
                        }
                    }
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int m = 0; m < M; ++m) {
                float32x4_t total = sum[r][m][0];
                for (int i = 1; i < kChains; ++i) total = vaddq_f32(total, sum[r][m][i]);
                sums[r][m] = vaddvq_f32(total);
            }
        }
    }
};

void prepare(const hb_weight &, const void *x, int dtype, int64_t rows, int64_t k, void *scratch) {
    const int64_t padded = padded_rows(rows);
    for (int64_t row = 0; row < padded; ++row) {
        float *out = static_cast<float *>(scratch) + row * Kernel::kGroup;
        for (int64_t at = 0; at < k; at += Kernel::kGroup, out += padded * Kernel::kGroup) {
            for (int i = 0; i < 16; ++i) {
                out[i] = row < rows ? load(x, dtype, row * k + at + 2 * i) : 0.0f;
                out[i + 16] = row < rows ? load(x, dtype, row * k + at + 2 * i + 1) : 0.0f;
            }
        }
    }
}

}  // namespace

const Linear linear_neon = {scratch_size<Kernel>, prepare, run_tiles<Kernel>};

}  // namespace halfbyte
