// g W for many rows with AMX; gemm_amx.h has the plan.
//
// The sum runs over the rows of W, so W is the right operand here, which the unit wants in pairs of rows: a 32-bit lane
// holds one column's weights of rows 2i and 2i + 1. One lookup gives both, as in linear_grad_input_amx.cpp: the first
// row's table lies in the lower half of the register and the second row's in the upper, and the upper words of the
// index have 16 added. The columns of a tile are the even or the odd ones of a group of 32; they are put back in order
// when sums are written. g is the left operand, row by row.
#include "gemm_amx.h"

namespace halfbyte {
namespace {

// g -> [block of 32 rows][step of 32 columns][tile of 16 rows][16][32], padded with zeros. A piece is one block.
int64_t pack_pieces(int64_t rows, int64_t) { return round_up(rows, kBlockRows) / kBlockRows; }

void pack(const void *grad, int64_t rows, int64_t n, void *packed, int64_t first, int64_t last) {
    const int64_t steps = round_up(n, kStep) / kStep;
    for (int64_t row = first * kBlockRows; row < last * kBlockRows; ++row) {
        uint16_t *out = static_cast<uint16_t *>(packed) +
                        row / kBlockRows * steps * kStepWords + row % kBlockRows / kTile * kTileWords +
                        row % kTile * 32;
        const uint16_t *from = static_cast<const uint16_t *>(grad) + row * n;
        for (int64_t at = 0; at < n; at += kStep, out += kStepWords) {
            const __mmask32 some = row >= rows ? 0 : n - at >= kStep ? ~0u : (1u << (n - at)) - 1;
            _mm512_store_si512(out, _mm512_maskz_loadu_epi16(some, from + at));
        }
    }
}

struct Backward {
    static constexpr bool kWeightsLeft = false;
    const hb_weight &w;
    int64_t k, n, rows;
    uint16_t *out;
    __m512 values;

    int64_t units(const Piece &piece) const { return round_up(piece.width, kStep) / 2; }

    Codes codes(const Piece &piece, int64_t unit, int64_t count) const {
        const int64_t first = (piece.at + 2 * unit) * k + piece.first;
        return {w.codes + first / 2, k / 2, (piece.last - piece.first) / 2, 2 * count};
    }

    // Rows 2 * unit and 2 * unit + 1 of the piece; those past the end of W are zeros, as g's columns are there.
    void decode(const Piece &piece, int64_t unit, uint16_t *tiles) const {
        const int64_t row = piece.at + 2 * unit, stride = round_up(piece.width, kStep) / kStep * kStepWords;
        uint16_t *to = tiles + unit / kTile * kStepWords + unit % kTile * 32;
        const int64_t groups = (piece.last - piece.first) / kStep;
        if (row >= n) {
            for (int64_t group = 0; group < groups; ++group, to += stride) {
                _mm512_store_si512(to, _mm512_setzero_si512());
                _mm512_store_si512(to + kTileWords, _mm512_setzero_si512());
            }
            return;
        }
        const bool alone = row + 1 == n;
        const int64_t first_block = piece.first / w.block_size;
        const int64_t blocks = (piece.last - 1) / w.block_size - first_block + 1;
        float scales[2][kPanel / 32] = {};
        decode_scales(w, row * (k / w.block_size) + first_block, blocks, scales[0]);
        if (!alone) decode_scales(w, (row + 1) * (k / w.block_size) + first_block, blocks, scales[1]);
        const uint8_t *a = w.codes + (row * k + piece.first) / 2, *b = alone ? a : a + k / 2;
        const auto widen = [](const uint8_t *from) {
            return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
        };
        const __m512i second = _mm512_set1_epi32(16 << 16), nibble = _mm512_set1_epi16(15);
        const int64_t span = std::min(w.block_size / kStep, groups);
        for (int64_t block = 0, group = 0; group < groups; ++block) {
            const __m512i tables = two_tables(values, scales[0][block], scales[1][block]);
            const int64_t end = std::min(group + span, groups);
            for (; group < end; ++group, a += 16, b += 16, to += stride) {
                const __m512i bytes = _mm512_or_si512(widen(a), _mm512_slli_epi32(widen(b), 16));
                const __m512i even = _mm512_or_si512(_mm512_srli_epi16(bytes, 4), second);
                const __m512i odd = _mm512_ternarylogic_epi64(bytes, nibble, second, 0xea);  // bytes & nibble | second
                _mm512_store_si512(to, _mm512_permutexvar_epi16(even, tables));
                _mm512_store_si512(to + kTileWords, _mm512_permutexvar_epi16(odd, tables));
            }
        }
    }

    // sums [tile of g][even, odd][16 rows][16 columns] -> out[row .., column .. column + 32).
    void write(const float *sums, int64_t row, int64_t column, int64_t) const {
        alignas(64) uint16_t order[32];
        for (int i = 0; i < 32; ++i) order[i] = uint16_t(i / 2 + i % 2 * 16);
        const __m512i side_by_side = _mm512_load_si512(order);
        uint16_t *to = out + row * k + column;
        for (int64_t m = 0; m < std::min(kBlockRows, rows - row); ++m, to += k) {
            const float *const from = sums + m / kTile * 2 * kSum + m % kTile * kTile;
            const __m512bh words = _mm512_cvtne2ps_pbh(_mm512_load_ps(from + kSum), _mm512_load_ps(from));
            _mm512_storeu_si512(to, _mm512_permutexvar_epi16(side_by_side, (__m512i)words));
        }
    }
};

int64_t packed_bytes(int64_t rows, int64_t n) {
    const int64_t steps = round_up(n, kStep) / kStep;
    return round_up(rows, kBlockRows) / kBlockRows * steps * kStepWords * int64_t(sizeof(uint16_t));
}

void run(const hb_weight &w, int64_t n, int64_t k, const void *packed, int64_t rows, const void *, void *out,
         int64_t panel, std::atomic<int64_t> &next, void *workspace) {
    const Backward op{w, k, n, rows, static_cast<uint16_t *>(out), _mm512_load_ps(kCodebooks[w.format].values)};
    run_panels(op, k, panel, n, static_cast<const uint16_t *>(packed), rows, next, workspace);
}

}  // namespace

const Gemm grad_input_gemm_amx = {kMostRows, kPanel, packed_bytes, workspace_bytes, pack_pieces, pack, run};

}  // namespace halfbyte
