// Few-row products of bfloat16 activations with NEON's bf16 dot product (ARMv8.6, bfdot).
//
// The layout of linear_neon.cpp with weights rounded to bfloat16, once a block: 16 weights are two lookups and two zips
// instead of 12 operations, and one instruction multiplies and adds eight of them. Products are exact, sums are float32
// rounded to odd, and subnormals count as zero. The inner loop over 4 rows of W, one row of x and 32 columns is 73
// instructions as GCC 12 makes it. Other activations go to linear_neon.cpp. No ARM machine has been timed.
#include "neon.h"
#include "tiles.h"

namespace halfbyte {

extern const Linear linear_neon;

namespace {

struct Kernel {
    using Element = uint16_t;
    static constexpr int64_t kGroup = 32;

    template <int M>
    static constexpr int rows_of_w() {
        return M <= 2 ? 4 : 2;  // 32 registers: two for each table, two for each row's weights, the sums
    }

    template <int R, int M>
    static void tile(const hb_weight &w, int64_t k, int64_t column, const uint16_t *x, int64_t stride,
                     float (&sums)[R][M]) {
        constexpr int64_t kScales = 256;
        constexpr int kChains = R * M >= 8 ? 1 : R * M >= 4 ? 2 : 4;  // as in linear_neon.cpp
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
            WordTable<bfloat16> table[R];
            for (int r = 0; r < R; ++r) table[r] = WordTable<bfloat16>(values, scales[r][block % kScales]);
            const uint8_t *codes = w.codes + (column * k + block * w.block_size) / 2;
            for (int64_t group = 0; group < groups; ++group, codes += kGroup / 2, x += stride) {
                uint8x16_t bytes[R];
                for (int r = 0; r < R; ++r) bytes[r] = vld1q_u8(codes + r * k / 2);
                for (int odd = 0; odd < 2; ++odd) {
                    uint16x8_t weights[R][2];
                    for (int r = 0; r < R; ++r) {
                        table[r](odd ? low_nibbles(bytes[r]) : high_nibbles(bytes[r]), weights[r]);
                    }
                    for (int m = 0; m < M; ++m) {
                        for (int i = 0; i < 2; ++i) {
                            const auto some = vreinterpretq_bf16_u16(vld1q_u16(x + m * kGroup + 16 * odd + 8 * i));
                            for (int r = 0; r < R; ++r) {
                                float32x4_t &chain = sum[r][m][(2 * odd + i) % kChains];
                                chain = vbfdotq_f32(chain, vreinterpretq_bf16_u16(weights[r][i]), some);
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

// The larger of the two.
int64_t scratch_bytes(const hb_weight &w, int64_t rows, int64_t k) { return linear_neon.scratch_size(w, rows, k); }

// x -> [group of 32 columns][row][the 16 even columns, the 16 odd ones].
void prepare(const hb_weight &w, const void *x, int dtype, int64_t rows, int64_t k, void *scratch) {
    if (dtype != HB_BFLOAT16) return linear_neon.prepare(w, x, dtype, rows, k, scratch);
    const int64_t padded = padded_rows(rows);
    uint16_t *out = static_cast<uint16_t *>(scratch);
    for (int64_t at = 0; at < k; at += Kernel::kGroup) {
        for (int64_t row = 0; row < padded; ++row, out += Kernel::kGroup) {
            uint16x8x2_t first = {{vdupq_n_u16(0), vdupq_n_u16(0)}}, second = first;
            if (row < rows) {
                const uint16_t *const from = static_cast<const uint16_t *>(x) + row * k + at;
                first = vld2q_u16(from), second = vld2q_u16(from + 16);
            }
            for (int odd = 0; odd < 2; ++odd) {
                vst1q_u16(out + 16 * odd, first.val[odd]);
                vst1q_u16(out + 16 * odd + 8, second.val[odd]);
            }
        }
    }
}

bool run(const hb_weight &w, int64_t n, int64_t k, const void *scratch, int64_t rows, int dtype, const void *bias,
         void *out, int64_t first, int64_t last) {
    const auto product = dtype == HB_BFLOAT16 ? run_tiles<Kernel> : linear_neon.run;
    return product(w, n, k, scratch, rows, dtype, bias, out, first, last);
}

}  // namespace

const Linear linear_neonbf16 = {scratch_bytes, prepare, run};

}  // namespace halfbyte
