// Products of 9 to kPassRows rows in float32 with AVX512: lanes are rows of x, weights are broadcast.
//
// linear_avx512.cpp keeps weights in registers, and beside more than eight rows of x its sums do not fit. Here a sum's 16
// lanes are 16 rows of x, so a weight is one float that a multiply-add reads from the first-level cache, by itself:
//
//   for 2,048 columns                   x: 1 MiB at 128 rows, which the second-level cache holds
//     for 16 rows of W
//       for 128 columns (a group)       decoded and scaled: 8 KiB
//         for 32 rows of x              16 KiB; 8 rows of W by 2 vectors, or, where 16 rows are all, 16 by 1: 16 sums
//
// Decoded weights stay in the order of their lookups (see linear_avx512.cpp), and x is laid out to match.
#include <immintrin.h>

#include "product.h"

namespace halfbyte {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kGroup = 128;                // columns decoded at a time
constexpr int64_t kPlaces = 8;                 // lookups of a group
constexpr int64_t kTile = 16;                  // rows of W decoded at a time
constexpr int64_t kChunk = 2048;               // columns whose x stays close
constexpr int64_t kMostScales = kChunk / 32;   // of a row of W in a chunk
constexpr int64_t kBlockRows = 2 * kLanes;     // rows of x that share a pass over decoded weights
static_assert(kLinearRows % kTile == 0);

int64_t padded(int64_t rows) { return (rows + kLanes - 1) / kLanes * kLanes; }
int64_t groups_of(int64_t k) { return (k + kGroup - 1) / kGroup; }
// Vectors of x that a block of rows has: 2, or 1 where no more rows are left.
int64_t vectors(int64_t rows, int64_t row) { return rows - row > kLanes ? 2 : 1; }

int64_t scratch_bytes(const hb_weight &, int64_t rows, int64_t k) {
    return padded(rows) * groups_of(k) * kGroup * int64_t(sizeof(float));
}

// The lanes of a vector, `stride` apart.
__m512i apart(int64_t stride) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_mullo_epi32(lanes, _mm512_set1_epi32(int(stride)));
}

// One column of 16 rows of x, of which the first `count` are there.
template <class T>
__m512 column_of(const T *x, int64_t k, int64_t count) {
    alignas(64) float lanes[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = to_float(x[i * k]);
    return _mm512_load_ps(lanes);
}
template <>
__m512 column_of(const float *x, int64_t k, int64_t count) {
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), __mmask16((1u << count) - 1), apart(k), x, 4);
}

// x -> [block of rows][group][place][lane of the lookup][rows of the block].
template <class T>
void prepare_of(const T *x, int64_t rows, int64_t k, float *scratch) {
    for (int64_t row = 0; row < rows; row += kLanes) {
        const int64_t block = row / kBlockRows * kBlockRows, width = vectors(rows, block) * kLanes;
        float *const out = scratch + block * groups_of(k) * kGroup + row % kBlockRows;
        const int64_t count = std::min(kLanes, rows - row);
        for (int64_t at = 0; at < groups_of(k) * kGroup; ++at) {  // a word of 8: lane at / 8 of its group
            const int64_t place = at % kPlaces ^ 1;               // the high nibble of a byte comes first
            float *const to = out + (at / kGroup * kGroup + place * kLanes + at % kGroup / kPlaces) * width;
            _mm512_store_ps(to, at < k ? column_of(x + row * k + at, k, count) : _mm512_setzero_ps());
        }
    }
}

void prepare(const hb_weight &, const void *x, int dtype, int64_t rows, int64_t k, void *scratch) {
    float *const out = static_cast<float *>(scratch);
    switch (dtype) {
        case HB_FLOAT32: return prepare_of(static_cast<const float *>(x), rows, k, out);
        case HB_BFLOAT16: return prepare_of(static_cast<const bfloat16 *>(x), rows, k, out);
        default: return prepare_of(static_cast<const float16 *>(x), rows, k, out);
    }
}

// One group of one row of W -> weights [place][16], from the scales of its blocks.
void decode(__m512 table, const uint8_t *codes, __mmask16 some, __m512 scale, float *weights) {
    const __m512i words = _mm512_maskz_loadu_epi32(some, codes);
    for (int place = 0; place < kPlaces; ++place) {
        const __m512i index = _mm512_srlv_epi32(words, _mm512_set1_epi32(4 * place));
        _mm512_store_ps(weights + place * kLanes, _mm512_mul_ps(_mm512_permutexvar_ps(index, table), scale));
    }
}

// sums [R][16 V] += weights [R][kGroup] times x [kGroup][16 V].
template <int R, int V>
inline void multiply(const float *weights, const float *x, float *sums) {
    __m512 total[R][V];
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) total[r][v] = _mm512_load_ps(sums + (r * V + v) * kLanes);
    }
    for (int64_t i = 0; i < kGroup; ++i, x += V * kLanes) {
        __m512 of_rows[V];
        for (int v = 0; v < V; ++v) of_rows[v] = _mm512_load_ps(x + v * kLanes);
        for (int r = 0; r < R; ++r) {
            const __m512 weight = _mm512_set1_ps(weights[r * kGroup + i]);
            for (int v = 0; v < V; ++v) total[r][v] = _mm512_fmadd_ps(weight, of_rows[v], total[r][v]);
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) _mm512_store_ps(sums + (r * V + v) * kLanes, total[r][v]);
    }
}

// One chunk [at, end) of columns: sums [block of rows of x][kTile][its rows] += W[column .. column + kTile) x^T.
void add_chunk(const hb_weight &w, int64_t k, int64_t column, int64_t last, const float *x, int64_t rows, int64_t at,
               int64_t end, float *sums) {
    alignas(64) float weights[kTile * kGroup];
    float scales[kTile][kMostScales + kLanes];
    const __m512 table = _mm512_load_ps(kCodebooks[w.format].values);
    const int shift = __builtin_ctzll(uint64_t(w.block_size));
    const int64_t blocks = k >> shift, first = at >> shift, count = ((end - 1) >> shift) - first + 1;
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i block_of_lane = _mm512_srl_epi32(lanes, _mm_cvtsi32_si128(shift - 3));
    for (int64_t r = 0; r < kTile; ++r) {  // rows past the end repeat the last one and are not written
        decode_scales(w, std::min(column + r, last - 1) * blocks + first, count, scales[r]);
        std::fill(scales[r] + count, scales[r] + count + kLanes, 0.0f);
    }
    for (; at < end; at += kGroup) {
        const __mmask16 some = at + kGroup > k ? 0x00ff : 0xffff;
        for (int64_t r = 0; r < kTile; ++r) {
            const __m512 of_group = _mm512_loadu_ps(scales[r] + (at >> shift) - first);
            const uint8_t *const codes = w.codes + (std::min(column + r, last - 1) * k + at) / 2;
            // The next tile's: sixteen rows are more streams than the hardware's prefetch follows.
            _mm_prefetch(reinterpret_cast<const char *>(codes + kTile * k / 2), _MM_HINT_T0);
            decode(table, codes, some, _mm512_permutexvar_ps(block_of_lane, of_group), weights + r * kGroup);
        }
        for (int64_t row = 0; row < rows; row += kBlockRows) {
            const bool wide = vectors(rows, row) == 2;
            const float *const from = x + row * groups_of(k) * kGroup + at * (wide ? 2 : 1) * kLanes;
            float *const to = sums + row * kTile;
            if (wide) {
                multiply<kTile / 2, 2>(weights, from, to);
                multiply<kTile / 2, 2>(weights + kTile / 2 * kGroup, from, to + kTile / 2 * kBlockRows);
            } else {
                multiply<kTile, 1>(weights, from, to);
            }
        }
    }
}

bool run(const hb_weight &w, int64_t n, int64_t k, const void *scratch, int64_t rows, int dtype, const void *bias,
         void *out, int64_t first, int64_t last) {
    alignas(64) float sums[kLinearRows / kTile][kTile * kPassRows];
    std::memset(sums, 0, sizeof sums);
    const float *const x = static_cast<const float *>(scratch);
    for (int64_t at = 0; at < k; at += kChunk) {
        for (int64_t column = first; column < last; column += kTile) {
            add_chunk(w, k, column, last, x, rows, at, std::min(at + kChunk, k), sums[(column - first) / kTile]);
        }
    }
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t block = row / kBlockRows * kBlockRows, width = vectors(rows, block) * kLanes;
        for (int64_t column = first; column < last; column += kTile) {
            alignas(64) float of_row[kTile];
            const float *const tile = sums[(column - first) / kTile] + block * kTile + row % kBlockRows;
            _mm512_store_ps(of_row, _mm512_i32gather_ps(apart(width), tile, 4));
            for (int64_t i = 0; i < std::min(kTile, last - column); ++i) {
                finish(of_row[i], dtype, bias, column + i, out, row * n + column + i);
            }
        }
    }
    return true;
}

}  // namespace

const Linear linear_rows_avx512 = {scratch_bytes, prepare, run};

}  // namespace halfbyte
