// Products of up to 8 rows with AVX512: weights are decoded into registers, never into memory.
//
// Codes are not widened. 64 bytes of them, 128 weights, are 16 words of eight codes; a lookup in a register of 16
// floats reads the lowest 4 bits of a word, so eight lookups at shifts of 0, 4 .. 28 decode them all. Lookup `place`
// then holds column 8 j + (place ^ 1) in lane j, and x is laid out once a call to match. Shifts and lookups run on
// different ports, and a multiply-add of floats has twice the rate of vdpbf16ps where that was measured, so this is the
// kernel of few rows of bf16 as well.
//
// The table holds the bare values; the sums of 128 columns are multiplied by their blocks' scales, lane by lane, and
// added to the totals. The products are float32's whatever the activations are.
#include <immintrin.h>

#include "tiles.h"

namespace halfbyte {
namespace {

struct Kernel {
    using Element = float;
    static constexpr int64_t kGroup = 128;
    static constexpr int kPlaces = 8;

    template <int M>
    static constexpr int rows_of_w() {
        return 4;  // at 1, 2, 4 and 8 rows of x faster than 2: loads of x are shared, and spilled sums are not dear
    }

    template <int R, int M>
    static void tile(const hb_weight &w, int64_t k, int64_t column, const float *x, int64_t stride,
                     float (&sums)[R][M]) {
        constexpr int64_t kScales = 256;
        const __m512 table = _mm512_load_ps(kCodebooks[w.format].values);
        const int64_t blocks = k / w.block_size, groups = (k + kGroup - 1) / kGroup;
        const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        // Lane j holds columns 8 j .. 8 j + 7 of a group.
        const int shift = __builtin_ctzll(uint64_t(w.block_size));
        const __m512i block_of_lane = _mm512_srl_epi32(lanes, _mm_cvtsi32_si128(shift - 3));
        float scales[R][kScales + 16];
        __m512 total[R][M];
        for (auto &row : total) std::fill(row, row + M, _mm512_setzero_ps());
        const uint8_t *codes = w.codes + column * k / 2;
        for (int64_t group = 0, done = 0; group < groups; ++group, codes += kGroup / 2, x += stride) {
            const int64_t block = group * kGroup >> shift;
            if (block >= done) {
                const int64_t count = std::min(kScales, blocks - block);
                for (int r = 0; r < R; ++r) {
                    decode_scales(w, (column + r) * blocks + block, count, scales[r]);
                    std::fill(scales[r] + count, scales[r] + count + 16, 0.0f);
                }
                done = block + kScales;
            }
            const __mmask16 some = (group + 1) * kGroup > k ? 0x00ff : 0xffff;
            __m512 part[R][M];
            __m512i words[R];
            for (int r = 0; r < R; ++r) {
                words[r] = _mm512_maskz_loadu_epi32(some, codes + r * k / 2);
                // The next tile's rows: at K = 4096 a row's codes are half a page, where the hardware's prefetch stops.
                _mm_prefetch(reinterpret_cast<const char *>(codes + (R + r) * k / 2), _MM_HINT_T0);
            }
            multiply<0, R, M>(words, table, x, part);
            multiply<1, R, M>(words, table, x, part);
            multiply<2, R, M>(words, table, x, part);
            multiply<3, R, M>(words, table, x, part);
            multiply<4, R, M>(words, table, x, part);
            multiply<5, R, M>(words, table, x, part);
            multiply<6, R, M>(words, table, x, part);
            multiply<7, R, M>(words, table, x, part);
            for (int r = 0; r < R; ++r) {
                const __m512 scale = _mm512_permutexvar_ps(block_of_lane, _mm512_loadu_ps(scales[r] + block % kScales));
                for (int m = 0; m < M; ++m) total[r][m] = _mm512_fmadd_ps(part[r][m], scale, total[r][m]);
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int m = 0; m < M; ++m) sums[r][m] = _mm512_reduce_add_ps(total[r][m]);
        }
    }

    template <int Place, int R, int M>
    static inline void multiply(const __m512i (&words)[R], __m512 table, const float *x, __m512 (&part)[R][M]) {
        for (int r = 0; r < R; ++r) {
            const __m512i index = Place ? _mm512_srli_epi32(words[r], 4 * Place) : words[r];
            const __m512 weight = _mm512_permutexvar_ps(index, table);
            for (int m = 0; m < M; ++m) {
                const __m512 from = _mm512_load_ps(x + m * kGroup + Place * 16);
                part[r][m] = Place ? _mm512_fmadd_ps(weight, from, part[r][m]) : _mm512_mul_ps(weight, from);
            }
        }
    }
};

inline __m512 widen(__m256i bfloat16s) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloat16s), 16));
}

// x -> [group][row][place][16].
void prepare_tiles(const void *x, int dtype, int64_t rows, int64_t k, void *scratch) {
    const int64_t padded = padded_rows(rows);
    for (int64_t at = 0; at < k; at += Kernel::kGroup) {
        for (int64_t row = 0; row < padded; ++row) {
            alignas(64) float columns[Kernel::kGroup];
            for (int64_t i = 0; i < Kernel::kGroup; i += 16) {
                __m512 some = _mm512_setzero_ps();
                if (row < rows && at + i < k) {
                    const int64_t from = row * k + at + i;
                    const auto *const half = static_cast<const uint16_t *>(x) + from;
                    some = dtype == HB_FLOAT32 ? _mm512_loadu_ps(static_cast<const float *>(x) + from)
                           : dtype == HB_FLOAT16
                               ? _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(half)))
                               : widen(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(half)));
                }
                _mm512_store_ps(columns + i, some);
            }
            float *const out = static_cast<float *>(scratch) + at * padded + row * Kernel::kGroup;
            const __m512i eighths = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
            for (int64_t place = 0; place < Kernel::kPlaces; ++place) {  // the high nibble of a byte comes first
                _mm512_store_ps(out + place * 16, _mm512_i32gather_ps(eighths, columns + (place ^ 1), 4));
            }
        }
    }
}

constexpr int64_t kRows = 8;  // up to here; more go to linear_rows_avx512.cpp

int64_t scratch_bytes(const hb_weight &w, int64_t rows, int64_t k) {
    return rows <= kRows ? scratch_size<Kernel>(w, rows, k) : linear_rows_avx512.scratch_size(w, rows, k);
}

void prepare(const hb_weight &w, const void *x, int dtype, int64_t rows, int64_t k, void *scratch) {
    if (rows > kRows) return linear_rows_avx512.prepare(w, x, dtype, rows, k, scratch);
    prepare_tiles(x, dtype, rows, k, scratch);
}

bool run(const hb_weight &w, int64_t n, int64_t k, const void *scratch, int64_t rows, int dtype, const void *bias,
         void *out, int64_t first, int64_t last) {
    const auto product = rows > kRows ? linear_rows_avx512.run : run_tiles<Kernel>;
    return product(w, n, k, scratch, rows, dtype, bias, out, first, last);
}

}  // namespace

const Linear linear_avx512 = {scratch_bytes, prepare, run};

}  // namespace halfbyte
