// g W with AMX for 3 to 32 rows, the counterpart of linear_amx.cpp.
//
// The sum runs over the rows of W, so W is the right operand here, which the unit wants in pairs of rows: a 32-bit lane
// holds one column's weights of rows 2i and 2i + 1. One lookup gives both: the first row's table lies in the lower half
// of the register and the second row's in the upper, and the upper words of the index have 16 added. The columns of a
// tile are again the even or the odd ones of a group of 32; they are put back in order when sums are written.
//
//   for 512 columns (one thread's)           sums [group][tile of g][even, odd] stay in the cache
//     for 128 rows, 128 columns of W         32 KiB of weights are decoded; a row's piece is one cache line of codes
//       for 32 columns                       4 sums in tile registers, 16 tile products between loading and storing
#include "amx.h"
#include "product.h"

namespace halfbyte {

extern const GradInput grad_input_avx512;

namespace {

constexpr int64_t kGroup = 32;                             // columns whose even and odd halves make two tiles
constexpr int64_t kStepRows = 32;                          // rows of W that a tile product sums over
constexpr int64_t kChunkRows = 128, kChunkColumns = 128;   // of W, decoded at a time
constexpr int64_t kBlockRows = 2 * kTile;                  // rows of g that four sums cover
constexpr int64_t kChunkGroups = kChunkColumns / kGroup, kPieceGroups = kGradColumns / kGroup;
constexpr int64_t kVectorRows = 2;  // up to here the vector kernel is as fast

bool on_vectors(int64_t rows, int dtype) { return dtype != HB_BFLOAT16 || rows <= kVectorRows; }
int64_t steps_of(int64_t n) { return (n + kStepRows - 1) / kStepRows; }

int64_t scratch_bytes(int64_t rows, int64_t n) {
    return std::max(grad_input_avx512.scratch_size(rows, n), steps_of(n) * 2 * kTileWords * 2);
}

// g -> [step of 32 columns][tile of 16 rows][16][32], padded with zeros.
void prepare(const void *grad, int dtype, int64_t rows, int64_t n, void *scratch) {
    if (on_vectors(rows, dtype)) return grad_input_avx512.prepare(grad, dtype, rows, n, scratch);
    for (int64_t row = 0; row < kBlockRows; ++row) {
        uint16_t *out = static_cast<uint16_t *>(scratch) + row / kTile * kTileWords + row % kTile * 32;
        const uint16_t *from = static_cast<const uint16_t *>(grad) + row * n;
        for (int64_t at = 0; at < n; at += kStepRows, out += 2 * kTileWords) {
            const __mmask32 some = row >= rows ? 0 : n - at >= 32 ? ~0u : (1u << (n - at)) - 1;
            _mm512_store_si512(out, _mm512_maskz_loadu_epi16(some, from + at));
        }
    }
}

// `width` columns of rows a and b of W -> one row of the tiles [group][even, odd][16][32].
inline void decode_pair(__m512 values, const uint8_t *a, const uint8_t *b, const float *a_scales,
                        const float *b_scales, int64_t width, int64_t block_size, uint16_t *out) {
    const __m512i second = _mm512_set1_epi32(16 << 16), nibbles = _mm512_set1_epi16(15);
    const auto widen = [](const uint8_t *from) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
    };
    const int64_t groups = std::min(block_size, width) / kGroup;
    for (const uint8_t *end = a + width / 2; a < end; ++a_scales, ++b_scales) {
        const __m512i table = half_table(values, *a_scales, *b_scales);
        for (int64_t group = 0; group < groups; ++group, a += kGroup / 2, b += kGroup / 2, out += 2 * kTileWords) {
            const __m512i bytes = _mm512_or_si512(widen(a), _mm512_slli_epi32(widen(b), 16));
            const __m512i even = _mm512_or_si512(_mm512_srli_epi16(bytes, 4), second);
            const __m512i odd = _mm512_or_si512(_mm512_and_si512(bytes, nibbles), second);
            _mm512_store_si512(out, _mm512_permutexvar_epi16(even, table));
            _mm512_store_si512(out + kTileWords, _mm512_permutexvar_epi16(odd, table));
        }
    }
}

// sums [tile of g][even, odd] += g's tiles times W's, over `steps` steps.
inline void multiply(const uint16_t *grad, const uint16_t *tiles, int64_t steps, float *sums) {
    _tile_loadd(0, sums, kRowBytes);
    _tile_loadd(1, sums + kSum, kRowBytes);
    _tile_loadd(2, sums + 2 * kSum, kRowBytes);
    _tile_loadd(3, sums + 3 * kSum, kRowBytes);
    for (int64_t step = 0; step < steps; ++step, grad += 2 * kTileWords, tiles += kChunkGroups * 2 * kTileWords) {
        _tile_loadd(4, grad, kRowBytes);
        _tile_loadd(6, tiles, kRowBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, tiles + kTileWords, kRowBytes);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, grad + kTileWords, kRowBytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, kRowBytes);
    _tile_stored(1, sums + kSum, kRowBytes);
    _tile_stored(2, sums + 2 * kSum, kRowBytes);
    _tile_stored(3, sums + 3 * kSum, kRowBytes);
}

// sums -> out[:, first .. first + width): even and odd columns interleaved, rounded once.
void write(const float *sums, int64_t rows, int64_t k, int64_t first, int64_t width, uint16_t *out) {
    const __m512i lower = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(8));
    for (int64_t row = 0; row < rows; ++row) {
        const float *from = sums + row / kTile * 2 * kSum + row % kTile * kTile;
        uint16_t *to = out + row * k + first;
        for (int64_t group = 0; group < width / kGroup; ++group, from += 4 * kSum, to += kGroup) {
            const __m512 even = _mm512_load_ps(from), odd = _mm512_load_ps(from + kSum);
            const __m512bh words = _mm512_cvtne2ps_pbh(_mm512_permutex2var_ps(even, upper, odd),
                                                       _mm512_permutex2var_ps(even, lower, odd));
            _mm512_storeu_si512(to, (__m512i)words);
        }
    }
}

bool run(const hb_weight &w, int64_t n, int64_t k, const void *scratch, int64_t rows, int dtype, void *out,
         int64_t first, int64_t last) {
    if (on_vectors(rows, dtype)) return grad_input_avx512.run(w, n, k, scratch, rows, dtype, out, first, last);
    constexpr int64_t kMostScales = kGradColumns / 32;
    alignas(64) uint16_t tiles[kChunkRows * kChunkColumns];
    float scales[kChunkRows][kMostScales];
    const __m512 values = _mm512_load_ps(kCodebooks[w.format].values);
    const uint16_t *const grad = static_cast<const uint16_t *>(scratch);
    const int64_t width = last - first, first_block = first / w.block_size;
    alignas(64) float sums[kPieceGroups * 4 * kSum] = {};
    const TileConfig config;
    _tile_loadconfig(&config);
    for (int64_t row = 0; row < n; row += kChunkRows) {
        // The last step is filled up with the last row, which meets zeros of g.
        const int64_t steps = steps_of(std::min(kChunkRows, n - row));
        for (int64_t r = 0; r < steps * kStepRows; ++r) {
            const int64_t block = std::min(row + r, n - 1) * (k / w.block_size) + first_block;
            decode_scales(w, block, (last - 1) / w.block_size - first_block + 1, scales[r]);
        }
        for (int64_t at = 0; at < width; at += kChunkColumns) {
            const int64_t columns = std::min(kChunkColumns, width - at);
            const int64_t block = (first + at) / w.block_size - first_block;
            for (int64_t r = 0; r < steps * kStepRows; r += 2) {
                const uint8_t *const a = w.codes + (std::min(row + r, n - 1) * k + first + at) / 2;
                const uint8_t *const b = w.codes + (std::min(row + r + 1, n - 1) * k + first + at) / 2;
                decode_pair(values, a, b, scales[r] + block, scales[r + 1] + block, columns, w.block_size,
                            tiles + r / kStepRows * kChunkGroups * 2 * kTileWords + r % kStepRows / 2 * 32);
            }
            const uint16_t *const from = grad + row / kStepRows * 2 * kTileWords;
            for (int64_t group = 0; group < columns / kGroup; ++group) {
                multiply(from, tiles + group * 2 * kTileWords, steps, sums + (at / kGroup + group) * 4 * kSum);
            }
        }
    }
    _tile_release();
    write(sums, rows, k, first, width, static_cast<uint16_t *>(out));
    return true;
}

}  // namespace

const GradInput grad_input_amx = {{kGradRows, kBlockRows, kGradRows}, scratch_bytes, prepare, run};

}  // namespace halfbyte
