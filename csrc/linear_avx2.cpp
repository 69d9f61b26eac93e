// Few-row products with AVX2: weights are decoded into registers, never into memory.
//
// A lookup by vpermps reads 8 values, and 16 would take two and a choice: vpshufb reads 16 values of one byte, 32 at a
// time, and runs on two ports. So the floats of the codebook are looked up byte by byte, in four tables, and woven
// together: 12 instructions for 32 weights where there were 20. The even columns are the high nibbles, the odd ones the
// low; x is laid out once a call to match, as groups of 64 columns.
//
// The tables hold the bare values; the sums of 64 columns, or the weights, are multiplied by their blocks' scales. Weaving
// keeps to halves of 128 bits, and so the halves are the two blocks where blocks are of 32.
#include <immintrin.h>

#include "tiles.h"

namespace halfbyte {
namespace {

inline float total(__m256 x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// Byte b of each of the 16 values, in both halves.
struct Planes {
    __m256i byte[4];

    explicit Planes(const float *values) {
        for (int b = 0; b < 4; ++b) {
            alignas(16) uint8_t table[16];
            for (int i = 0; i < 16; ++i) table[i] = uint8_t(bits_of(values[i]) >> (8 * b));
            byte[b] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i *>(table)));
        }
    }

    // 32 codes -> their values: weights[q] holds those of bytes 4 q .. 4 q + 3 of each half.
    void decode(__m256i codes, __m256 (&weights)[4]) const {
        const __m256i b0 = _mm256_shuffle_epi8(byte[0], codes), b1 = _mm256_shuffle_epi8(byte[1], codes);
        const __m256i b2 = _mm256_shuffle_epi8(byte[2], codes), b3 = _mm256_shuffle_epi8(byte[3], codes);
        const __m256i lower = _mm256_unpacklo_epi8(b0, b1), lower_end = _mm256_unpackhi_epi8(b0, b1);
        const __m256i upper = _mm256_unpacklo_epi8(b2, b3), upper_end = _mm256_unpackhi_epi8(b2, b3);
        weights[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(lower, upper));
        weights[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(lower, upper));
        weights[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(lower_end, upper_end));
        weights[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(lower_end, upper_end));
    }
};

struct Kernel {
    using Element = float;
    static constexpr int64_t kGroup = 64;

    template <int M>
    static constexpr int rows_of_w() {
        return M <= 2 ? 2 : 1;  // 16 registers
    }

    // Few registers: the sums of many rows have none beside them for their parts, and there eight products are little.
    template <int M>
    static constexpr bool kScaledWeights = M > 4;

    template <int R, int M>
    static void tile(const hb_weight &w, int64_t k, int64_t column, const float *x, int64_t stride,
                     float (&sums)[R][M]) {
        constexpr int64_t kScales = 256;
        const Planes planes(kCodebooks[w.format].values);
        const __m256i nibble = _mm256_set1_epi8(15);
        const int64_t blocks = k / w.block_size, groups = k / kGroup;
        const int shift = __builtin_ctzll(uint64_t(w.block_size)), second = w.block_size < kGroup ? 1 : 0;
        float scales[R][kScales];
        __m256 sum[R][M];
        for (auto &row : sum) std::fill(row, row + M, _mm256_setzero_ps());
        const uint8_t *codes = w.codes + column * k / 2;
        for (int64_t group = 0, done = 0; group < groups; ++group, codes += kGroup / 2, x += stride) {
            const int64_t block = group * kGroup >> shift;
            if (block >= done) {
                const int64_t count = std::min(kScales, blocks - block);
                for (int r = 0; r < R; ++r) decode_scales(w, (column + r) * blocks + block, count, scales[r]);
                done = block + kScales;
            }
            for (int r = 0; r < R; ++r) {
                // The next tile's rows: at K = 4096 a row's codes are half a page, where the hardware's prefetch stops.
                _mm_prefetch(reinterpret_cast<const char *>(codes + (R + r) * k / 2), _MM_HINT_T0);
                const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(codes + r * k / 2));
                const float *const scale = scales[r] + block % kScales;
                const __m256 factor = _mm256_set_m128(_mm_set1_ps(scale[second]), _mm_set1_ps(scale[0]));
                __m256 even[4], odd[4];
                planes.decode(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble), even);
                planes.decode(_mm256_and_si256(bytes, nibble), odd);
                for (int q = 0; q < 4 && kScaledWeights<M>; ++q) {
                    even[q] = _mm256_mul_ps(even[q], factor);
                    odd[q] = _mm256_mul_ps(odd[q], factor);
                }
                for (int m = 0; m < M; ++m) {
                    const float *const from = x + m * kGroup;
                    __m256 part = kScaledWeights<M> ? sum[r][m] : _mm256_setzero_ps();
                    for (int q = 0; q < 4; ++q) part = _mm256_fmadd_ps(even[q], _mm256_load_ps(from + q * 8), part);
                    for (int q = 0; q < 4; ++q) {
                        part = _mm256_fmadd_ps(odd[q], _mm256_load_ps(from + 32 + q * 8), part);
                    }
                    sum[r][m] = kScaledWeights<M> ? part : _mm256_fmadd_ps(part, factor, sum[r][m]);
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int m = 0; m < M; ++m) sums[r][m] = total(sum[r][m]);
        }
    }
};

// x -> [group][row][even, odd][4][8], in the order of Planes::decode.
void prepare(const hb_weight &, const void *x, int dtype, int64_t rows, int64_t k, void *scratch) {
    const int64_t padded = padded_rows(rows);
    for (int64_t row = 0; row < padded; ++row) {
        float *out = static_cast<float *>(scratch) + row * Kernel::kGroup;
        for (int64_t at = 0; at < k; at += Kernel::kGroup, out += padded * Kernel::kGroup) {
            for (int64_t i = 0; i < Kernel::kGroup; ++i) {
                const int64_t column = i % 8 / 4 * 32 + i % 32 / 8 * 8 + i % 4 * 2 + i / 32;
                out[i] = row < rows ? load(x, dtype, row * k + at + column) : 0.0f;
            }
        }
    }
}

bool grad_input(const hb_weight &w, int64_t n, int64_t k, const void *scratch, int64_t rows, int dtype, void *out,
                int64_t first, int64_t last) {
    grad_input_by_rows(dequantize_avx2, w, n, k, static_cast<const float *>(scratch), rows, dtype, out, first, last);
    return true;
}

}  // namespace

const Linear linear_avx2 = {scratch_size<Kernel>, prepare, run_tiles<Kernel>};
const GradInput grad_input_avx2 = {{kGradRows, kGradRows, kGradRows}, grad_scratch_size, prepare_grad, grad_input};

}  // namespace halfbyte
