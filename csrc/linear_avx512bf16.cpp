// Few-row products with AVX512-BF16: 32 multiplications an instruction, float32 sums.
//
// 32 bytes of codes, widened to 16 bits each, hold 64 weights: the high nibbles (even columns) after a shift, the low
// nibbles (odd columns) as they are, because vpermw reads 5 bits and the table of 16 values is stored twice. x is laid
// out once a call as groups of 64 columns, the 32 even ones first.
//
// The table is scaled and rounded to bf16 once a block, which makes the weights those of the reference, and costs
// nothing for each row of x: this is the kernel of more than 8 rows. On a CPU with AMX vdpbf16ps has half the rate of
// float32 multiply-adds, so fewer rows, which only pay for decoding, go to linear_avx512.cpp. (vcvtneps2bf16 and vdpbf16ps take subnormals for zero: an error below
// 2**-126 for each product.)
//
// Blocks of 32 share a register by twos: its two halves have tables of their own.
#include <immintrin.h>

#include "tiles.h"

namespace halfbyte {

extern const Linear linear_avx512;

namespace {

inline __m512i half_table(__m512 values, float scale, float upper_scale) {
    const __m256bh lower = _mm512_cvtneps_pbh(_mm512_mul_ps(values, _mm512_set1_ps(scale)));
    const __m256bh upper = _mm512_cvtneps_pbh(_mm512_mul_ps(values, _mm512_set1_ps(upper_scale)));
    return _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)lower), (__m256i)upper, 1);
}
inline __m512i full_table(__m512 values, float scale) {
    return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(values, _mm512_set1_ps(scale))));
}

template <bool Halves>  // Halves: blocks of 32
struct Kernel {
    using Element = uint16_t;
    static constexpr int64_t kGroup = 64;
    static constexpr int64_t kScales = 256;

    template <int M>
    static constexpr int rows_of_w() {
        return M == 8 ? 2 : 4;
    }

    template <int R, int M>
    static void tile(const hb_weight &w, int64_t k, int64_t column, const uint16_t *x, int64_t stride,
                     float (&sums)[R][M]) {
        constexpr int64_t kBlocks = Halves ? 2 : 1;  // blocks that the step below takes at once
        const __m512 values = _mm512_load_ps(kCodebooks[w.format].values);
        const int64_t blocks = k / w.block_size, groups = Halves ? 1 : w.block_size / kGroup;
        float scales[R][kScales];
        __m512 total[R][M];
        for (auto &row : total) std::fill(row, row + M, _mm512_setzero_ps());
        for (int64_t block = 0; block < blocks; block += kBlocks) {
            if (block % kScales == 0) {
                const int64_t count = std::min(kScales, blocks - block);
                for (int r = 0; r < R; ++r) decode_scales(w, (column + r) * blocks + block, count, scales[r]);
            }
            const int64_t at = block % kScales;
            __m512i table[R];
            for (int r = 0; r < R; ++r) {
                table[r] = Halves ? half_table(values, scales[r][at], scales[r][at + 1])
                                  : full_table(values, scales[r][at]);
            }
            const uint8_t *codes = w.codes + (column * k + block * w.block_size) / 2;
            for (int64_t group = 0; group < groups; ++group, codes += kGroup / 2, x += stride) {
                for (int r = 0; r < R; ++r) multiply_group<M>(codes + r * k / 2, table[r], x, total[r]);
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int m = 0; m < M; ++m) sums[r][m] = _mm512_reduce_add_ps(total[r][m]);
        }
    }

    // sums += 64 weights of one row times M rows of x.
    template <int M>
    static void multiply_group(const uint8_t *codes, __m512i table, const uint16_t *x, __m512 (&sums)[M]) {
        const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(codes)));
        __m512i high_index = _mm512_srli_epi16(bytes, 4), low_index = bytes;
        if (Halves) {  // the upper half's weights look into the upper half's table
            const __m512i upper = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
            high_index = _mm512_or_si512(high_index, upper);
            low_index = _mm512_or_si512(_mm512_and_si512(bytes, _mm512_set1_epi16(15)), upper);
        }
        const __m512bh high = (__m512bh)_mm512_permutexvar_epi16(high_index, table);
        const __m512bh low = (__m512bh)_mm512_permutexvar_epi16(low_index, table);
        for (int m = 0; m < M; ++m) {
            sums[m] = _mm512_dpbf16_ps(sums[m], high, (__m512bh)_mm512_load_si512(x + m * kGroup));
            sums[m] = _mm512_dpbf16_ps(sums[m], low, (__m512bh)_mm512_load_si512(x + m * kGroup + 32));
        }
    }
};

using Whole = Kernel<false>;

// Few rows, and activations of other types, go to the float32 kernel, whose scratch needs more room.
constexpr int64_t kFloatRows = 8;

bool on_floats(int64_t rows, int dtype) { return dtype != HB_BFLOAT16 || rows <= kFloatRows; }

int64_t scratch_bytes(const hb_weight &w, int64_t rows, int64_t k) { return linear_avx512.scratch_size(w, rows, k); }

void prepare(const hb_weight &w, const void *x, int dtype, int64_t rows, int64_t k, void *scratch) {
    if (on_floats(rows, dtype)) return linear_avx512.prepare(w, x, dtype, rows, k, scratch);
    const int64_t padded = padded_rows(rows);
    alignas(64) uint16_t order[64];
    for (int i = 0; i < 64; ++i) order[i] = uint16_t(i < 32 ? 2 * i : 2 * (i - 32) + 1);
    const __m512i evens = _mm512_load_si512(order), odds = _mm512_load_si512(order + 32);
    for (int64_t at = 0; at < k; at += Whole::kGroup) {
        for (int64_t row = 0; row < padded; ++row) {
            uint16_t *out = static_cast<uint16_t *>(scratch) + at * padded + row * Whole::kGroup;
            __m512i a = _mm512_setzero_si512(), b = a;
            if (row < rows) {
                const uint16_t *from = static_cast<const uint16_t *>(x) + row * k + at;
                a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + 32);
            }
            _mm512_store_si512(out, _mm512_permutex2var_epi16(a, evens, b));
            _mm512_store_si512(out + 32, _mm512_permutex2var_epi16(a, odds, b));
        }
    }
}

bool run(const hb_weight &w, int64_t n, int64_t k, const void *scratch, int64_t rows, int dtype, const void *bias,
         void *out, int64_t first, int64_t last) {
    const auto product = on_floats(rows, dtype) ? linear_avx512.run
                         : w.block_size == 32 ? run_tiles<Kernel<true>>
                                              : run_tiles<Whole>;
    return product(w, n, k, scratch, rows, dtype, bias, out, first, last);
}

}  // namespace

const Linear linear_avx512bf16 = {scratch_bytes, prepare, run};

}  // namespace halfbyte
