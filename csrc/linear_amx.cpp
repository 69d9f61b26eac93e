// Products with AMX: tiles of 16 x 32 bf16 weights, decoded into the first-level cache and multiplied by the matrix unit.
//
// For 17 to kPassRows rows of x: fewer go to linear_few_amx.cpp and to the vector kernels. hb_linear gives more than 32 to
// linear_gemm_amx.cpp; a decoder's step brings them here.
//
// W is the left operand, decoded row by row; x^T is the right one, laid out once a call as the unit wants it (pairs of
// columns side by side). Weights are not put back into order: a group of 64 columns becomes a tile of its even and one
// of its odd columns (the high and the low nibbles, see linear_avx512bf16.cpp), and x follows.
//
//   for 32 rows of W (two tiles)            4 sums, [tile of x][tile of W]: the unit's pipeline needs independent ones
//     for 512 columns                       32 KiB of weights are decoded: what the first-level cache holds beside x
//       for 32 rows of x
//         for 64 columns: 8 tile products
#include "amx.h"
#include "scratch.h"
#include "tiles.h"

namespace halfbyte {
namespace {

constexpr int64_t kGroup = 64;                   // columns whose even and odd halves make two tiles
constexpr int64_t kBlockRows = 2 * kTile;        // rows of W, and of x, that four sums cover
constexpr int64_t kChunk = 512;                  // columns decoded at a time
constexpr int64_t kVectorRows = 2;               // up to here the vector kernel is faster
constexpr int64_t kFewRows = 16;                 // up to here linear_few_amx
constexpr int64_t kMostBlocks = kPassRows / kBlockRows;

int64_t row_blocks(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }

// The kernel for rows that are too few for this one, or null.
const Linear *other(int64_t rows, int dtype) {
    if (dtype != HB_BFLOAT16 || rows <= kVectorRows) return &linear_avx512bf16;
    return rows <= kFewRows ? &linear_few_amx : nullptr;
}

int64_t scratch_bytes(const hb_weight &w, int64_t rows, int64_t k) {
    // The type of x is not known here: room for the float32 kernel's copy, which needs the most.
    const int64_t few = rows <= kFewRows ? linear_few_amx.scratch_size(w, rows, k) : 0;
    return std::max({few, linear_avx512bf16.scratch_size(w, rows, k), row_blocks(rows) * kBlockRows * k * 2});
}

// x -> [block of 32 rows][group of 64 columns][tile of 16 rows][even, odd][16 pairs][16 rows][2].
void prepare(const hb_weight &w, const void *x, int dtype, int64_t rows, int64_t k, void *scratch) {
    if (const Linear *kernel = other(rows, dtype)) return kernel->prepare(w, x, dtype, rows, k, scratch);
    alignas(64) uint16_t order[64];
    for (int i = 0; i < 64; ++i) order[i] = uint16_t(i < 32 ? 2 * i : 2 * (i - 32) + 1);
    const __m512i evens = _mm512_load_si512(order), odds = _mm512_load_si512(order + 32);
    const __m512i pairs = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                             _mm512_set1_epi32(int(kRowBytes)));
    const int64_t step = kBlockRows * kGroup;
    for (int64_t row = 0; row < row_blocks(rows) * kBlockRows; ++row) {
        uint16_t *out = static_cast<uint16_t *>(scratch) + row / kBlockRows * kBlockRows * k +
                        row % kBlockRows / kTile * 2 * kTileWords + row % kTile * 2;
        for (int64_t at = 0; at < k; at += kGroup, out += step) {
            __m512i a = _mm512_setzero_si512(), b = a;
            if (row < rows) {
                const uint16_t *from = static_cast<const uint16_t *>(x) + row * k + at;
                a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + 32);
            }
            _mm512_i32scatter_epi32(out, pairs, _mm512_permutex2var_epi16(a, evens, b), 1);
            _mm512_i32scatter_epi32(out + kTileWords, pairs, _mm512_permutex2var_epi16(a, odds, b), 1);
        }
    }
}

// `width` columns of one row of W -> one row of the tiles [group][2][even, odd][16][32]. Blocks of 32 share a register
// by twos, whose halves have tables of their own.
template <bool Halves>
inline void decode_row(__m512 values, const uint8_t *codes, const float *scales, int64_t width, int64_t block_size,
                       uint16_t *out) {
    const __m512i upper = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    const int64_t groups = Halves ? 1 : std::min(block_size, width) / kGroup;
    for (const uint8_t *end = codes + width / 2; codes < end; scales += Halves ? 2 : 1) {
        const __m512i table = Halves ? half_table(values, scales[0], scales[1]) : full_table(values, scales[0]);
        for (int64_t group = 0; group < groups; ++group, codes += kGroup / 2, out += 4 * kTileWords) {
            const __m512i low = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(codes)));
            __m512i low_index = low, high_index = _mm512_srli_epi16(low, 4);
            if (Halves) {
                low_index = _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi16(15)), upper);
                high_index = _mm512_or_si512(high_index, upper);
            }
            _mm512_store_si512(out, _mm512_permutexvar_epi16(high_index, table));
            _mm512_store_si512(out + kTileWords, _mm512_permutexvar_epi16(low_index, table));
        }
    }
}

// sums += W's tiles times x's tiles, over `groups` groups. Four sums are independent, which the unit's pipeline needs:
// [tile of x][tile of W].
inline void multiply(const uint16_t *tiles, const uint16_t *x, int64_t groups, float *sums) {
    _tile_loadd(0, sums, kRowBytes);
    _tile_loadd(1, sums + kSum, kRowBytes);
    _tile_loadd(2, sums + 2 * kSum, kRowBytes);
    _tile_loadd(3, sums + 3 * kSum, kRowBytes);
    for (int64_t group = 0; group < groups; ++group, tiles += 4 * kTileWords, x += 4 * kTileWords) {
        _tile_loadd(4, tiles, kRowBytes);
        _tile_loadd(5, tiles + 2 * kTileWords, kRowBytes);
        _tile_loadd(6, x, kRowBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(7, x + 2 * kTileWords, kRowBytes);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(4, tiles + kTileWords, kRowBytes);
        _tile_loadd(5, tiles + 3 * kTileWords, kRowBytes);
        _tile_loadd(6, x + kTileWords, kRowBytes);
        _tile_loadd(7, x + 3 * kTileWords, kRowBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, kRowBytes);
    _tile_stored(1, sums + kSum, kRowBytes);
    _tile_stored(2, sums + 2 * kSum, kRowBytes);
    _tile_stored(3, sums + 3 * kSum, kRowBytes);
}

// sums [16 rows of W][16 rows of x] -> out[row .. , column ..], transposed by gathers, rounded once.
inline void write_tile(const float *sums, int64_t n, int64_t row, int64_t rows, int64_t column, int64_t last,
                       const uint16_t *bias, uint16_t *out) {
    const __m512i stride = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                              _mm512_set1_epi32(int(kTile)));
    if (column >= last) return;
    const __mmask16 some = __mmask16((1u << std::min(kTile, last - column)) - 1);
    __m512 shift = _mm512_setzero_ps();
    if (bias) {
        const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, bias + column));
        shift = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    }
    for (int64_t m = 0; m < std::min(kTile, rows - row); ++m) {
        const __m512 sum = _mm512_add_ps(_mm512_i32gather_ps(stride, sums + m, 4), shift);
        _mm256_mask_storeu_epi16(out + (row + m) * n + column, some, (__m256i)_mm512_cvtneps_pbh(sum));
    }
}

bool run_block(const hb_weight &w, int64_t n, int64_t k, const uint16_t *x, int64_t rows, const uint16_t *bias,
               uint16_t *out, int64_t first, int64_t last) {
    alignas(64) uint16_t tiles[kBlockRows * kChunk];
    alignas(64) float sums[kMostBlocks][4 * kSum];
    const __m512 values = _mm512_load_ps(kCodebooks[w.format].values);
    const auto decode = w.block_size < kGroup ? decode_row<true> : decode_row<false>;
    const int64_t blocks = k / w.block_size;
    const Scratch memory(kBlockRows * blocks * int64_t(sizeof(float)));
    if (!memory.data()) return false;
    float *const scales = static_cast<float *>(memory.data());
    for (int64_t column = first; column < last; column += kBlockRows) {
        std::memset(sums, 0, size_t(row_blocks(rows)) * sizeof *sums);
        for (int64_t r = 0; r < kBlockRows; ++r) {  // rows past the end repeat the last one and are not written
            decode_scales(w, std::min(column + r, last - 1) * blocks, blocks, scales + r * blocks);
        }
        for (int64_t at = 0; at < k; at += kChunk) {
            const int64_t width = std::min(kChunk, k - at), first_scale = at / w.block_size;
            for (int64_t r = 0; r < kBlockRows; ++r) {
                const uint8_t *const codes = w.codes + (std::min(column + r, last - 1) * k + at) / 2;
                decode(values, codes, scales + r * blocks + first_scale, width, w.block_size,
                       tiles + r / kTile * 2 * kTileWords + r % kTile * 32);
            }
            for (int64_t block = 0; block < row_blocks(rows); ++block) {
                multiply(tiles, x + (block * k + at) * kBlockRows, width / kGroup, sums[block]);
            }
        }
        for (int64_t tile = 0; tile < 4 * row_blocks(rows); ++tile) {
            write_tile(sums[tile / 4] + tile % 4 * kSum, n, tile / 2 * kTile, rows, column + tile % 2 * kTile, last, bias, out);
        }
    }
    return true;
}

bool run(const hb_weight &w, int64_t n, int64_t k, const void *scratch, int64_t rows, int dtype, const void *bias,
         void *out, int64_t first, int64_t last) {
    if (const Linear *kernel = other(rows, dtype)) {
        return kernel->run(w, n, k, scratch, rows, dtype, bias, out, first, last);
    }
    const TileConfig config;
    _tile_loadconfig(&config);
    const bool done = run_block(w, n, k, static_cast<const uint16_t *>(scratch), rows,
                                static_cast<const uint16_t *>(bias), static_cast<uint16_t *>(out), first, last);
    _tile_release();
    return done;
}

}  // namespace

const Linear linear_amx = {scratch_bytes, prepare, run};

}  // namespace halfbyte
