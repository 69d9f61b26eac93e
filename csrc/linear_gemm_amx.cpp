// y = x W^T for many rows with AMX; gemm_amx.h has the plan.
//
// W is the left operand, row by row as it is stored; x^T is the right one, laid out once a call as the unit wants it
// (pairs of columns side by side, 16 rows of x). Weights are not put back into order: a group of 64 columns becomes a
// tile of its even and one of its odd columns (the high and the low nibbles, see linear_avx512bf16.cpp), and x follows.
// The unit's result is y^T, which is transposed when it is written, already rounded.
#include "gemm_amx.h"

namespace halfbyte {
namespace {

constexpr int64_t kGroup = 64;  // columns whose even and odd halves make two steps

// x -> [block of 32 rows][group of 64 columns][even, odd][tile of 16 rows][16 pairs][16 rows][2], padded with zeros.
// Piece p is the columns [512 (p % chunks), ...) of block p / chunks.
int64_t pack_pieces(int64_t rows, int64_t k) {
    return round_up(rows, kBlockRows) / kBlockRows * (round_up(k, kChunk) / kChunk);
}

void pack(const void *x, int64_t rows, int64_t k, void *packed, int64_t first, int64_t last) {
    alignas(64) uint16_t order[64];
    for (int i = 0; i < 64; ++i) order[i] = uint16_t(i < 32 ? 2 * i : 2 * (i - 32) + 1);
    const __m512i evens = _mm512_load_si512(order), odds = _mm512_load_si512(order + 32);
    const int64_t chunks = round_up(k, kChunk) / kChunk;
    for (int64_t piece = first; piece < last; ++piece) {
        const int64_t row = piece / chunks * kBlockRows, begin = piece % chunks * kChunk;
        for (int64_t at = begin; at < std::min(begin + kChunk, k); at += kGroup) {
            for (int64_t tile = 0; tile < 2; ++tile) {
                __m512i even[16], odd[16];
                for (int64_t r = 0; r < kTile; ++r) {
                    const int64_t from = row + tile * kTile + r;
                    even[r] = odd[r] = _mm512_setzero_si512();
                    if (from >= rows) continue;
                    const uint16_t *const columns = static_cast<const uint16_t *>(x) + from * k + at;
                    const __m512i a = _mm512_loadu_si512(columns), b = _mm512_loadu_si512(columns + 32);
                    even[r] = _mm512_permutex2var_epi16(a, evens, b);
                    odd[r] = _mm512_permutex2var_epi16(a, odds, b);
                }
                transpose(even);
                transpose(odd);
                const int64_t step = (row / kBlockRows * k + at) / kStep;
                uint16_t *const out = static_cast<uint16_t *>(packed) + step * kStepWords + tile * kTileWords;
                for (int64_t pair = 0; pair < kTile; ++pair) {
                    _mm512_store_si512(out + pair * 32, even[pair]);
                    _mm512_store_si512(out + kStepWords + pair * 32, odd[pair]);
                }
            }
        }
    }
}

struct Forward {
    static constexpr bool kWeightsLeft = true;
    const hb_weight &w;
    int64_t k, n, rows;
    const uint16_t *bias;
    uint16_t *out;
    __m512 values;

    int64_t units(const Piece &piece) const { return round_up(piece.last - piece.first, kBlockRows); }

    Codes codes(const Piece &piece, int64_t unit, int64_t count) const {
        return {w.codes + ((piece.first + unit) * k + piece.at) / 2, k / 2, piece.width / 2, count};
    }

    // One row of W.
    void decode(const Piece &piece, int64_t unit, uint16_t *tiles) const {
        uint16_t *to = tiles + unit / kBlockRows * (piece.width / kStep) * kStepWords +
                       unit % kBlockRows / kTile * kTileWords + unit % kTile * 32;
        if (piece.first + unit >= piece.last) {
            for (int64_t at = 0; at < piece.width; at += kStep, to += kStepWords) {
                _mm512_store_si512(to, _mm512_setzero_si512());
            }
        } else if (w.block_size < kGroup) {
            decode_row<true>(piece, piece.first + unit, to);
        } else {
            decode_row<false>(piece, piece.first + unit, to);
        }
    }

    // Blocks of 32 share a register by twos, whose halves have tables of their own.
    template <bool Halves>
    void decode_row(const Piece &piece, int64_t row, uint16_t *to) const {
        float scales[kChunk / 32];
        const int64_t block = (row * k + piece.at) / w.block_size;
        decode_scales(w, block, std::max<int64_t>(1, piece.width / w.block_size), scales);
        const __m512i upper = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
        const __m512i nibble = _mm512_set1_epi16(15);
        const int64_t groups = Halves ? 1 : std::min(w.block_size, piece.width) / kGroup;
        const uint8_t *codes = w.codes + (row * k + piece.at) / 2;
        const float *scale = scales;
        for (const uint8_t *const end = codes + piece.width / 2; codes < end; scale += Halves ? 2 : 1) {
            const __m512i tables = two_tables(values, scale[0], scale[Halves]);
            for (int64_t group = 0; group < groups; ++group, codes += kGroup / 2, to += 2 * kStepWords) {
                const __m512i low = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(codes)));
                __m512i low_index = low, high_index = _mm512_srli_epi16(low, 4);
                if (Halves) {
                    low_index = _mm512_ternarylogic_epi64(low, nibble, upper, 0xea);  // low & nibble | upper
                    high_index = _mm512_or_si512(high_index, upper);
                }
                _mm512_store_si512(to, _mm512_permutexvar_epi16(high_index, tables));
                _mm512_store_si512(to + kStepWords, _mm512_permutexvar_epi16(low_index, tables));
            }
        }
    }

    // sums [tile of W][tile of x][16 rows of W][16 rows of x] -> out[row .., column .. last).
    void write(const float *sums, int64_t row, int64_t column, int64_t last) const {
        alignas(64) uint16_t order[32];
        for (int i = 0; i < 32; ++i) order[i] = uint16_t(i / 2 + i % 2 * 16);
        const __m512i side_by_side = _mm512_load_si512(order);
        const __mmask32 some = last - column >= 32 ? ~0u : (1u << (last - column)) - 1;
        alignas(64) float shift[32] = {};
        if (bias) {
            const __m512i words = _mm512_maskz_loadu_epi16(some, bias + column);
            for (int half = 0; half < 2; ++half) {
                const __m256i part = half ? _mm512_extracti64x4_epi64(words, 1) : _mm512_castsi512_si256(words);
                _mm512_store_si512(shift + 16 * half, _mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16));
            }
        }
        for (int64_t tile = 0; tile < 2 && row + tile * kTile < rows; ++tile) {
            __m512i pairs[16];
            for (int64_t i = 0; i < 16; ++i) {  // rows 2i and 2i + 1 of W
                const float *const from = sums + (i / 8 * 2 + tile) * kSum + i % 8 * 2 * kTile;
                __m512 a = _mm512_load_ps(from), b = _mm512_load_ps(from + kTile);
                if (bias) a = a + _mm512_set1_ps(shift[2 * i]), b = b + _mm512_set1_ps(shift[2 * i + 1]);
                pairs[i] = _mm512_permutexvar_epi16(side_by_side, (__m512i)_mm512_cvtne2ps_pbh(b, a));
            }
            transpose(pairs);
            uint16_t *to = out + (row + tile * kTile) * n + column;
            for (int64_t m = 0; m < std::min(kTile, rows - row - tile * kTile); ++m, to += n) {
                _mm512_mask_storeu_epi16(to, some, pairs[m]);
            }
        }
    }
};

int64_t packed_bytes(int64_t rows, int64_t k) {
    return round_up(rows, kBlockRows) / kBlockRows * (k / kStep) * kStepWords * int64_t(sizeof(uint16_t));
}

void run(const hb_weight &w, int64_t n, int64_t k, const void *packed, int64_t rows, const void *bias, void *out,
         int64_t panel, std::atomic<int64_t> &next, void *workspace) {
    const Forward op{w, k, n, rows, static_cast<const uint16_t *>(bias), static_cast<uint16_t *>(out),
                     _mm512_load_ps(kCodebooks[w.format].values)};
    run_panels(op, n, panel, k, static_cast<const uint16_t *>(packed), rows, next, workspace);
}

}  // namespace

const Gemm linear_gemm_amx = {kMostRows, kPanel, packed_bytes, workspace_bytes, pack_pieces, pack, run};

}  // namespace halfbyte
