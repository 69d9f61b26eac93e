// Many-row products with AMX: what y = x W^T and g W share. See scalar.h for the unnamed namespace.
//
// Both are out [rows, outputs] = the sum over `length` terms of an activation times a weight. The matrix unit is faster
// than the second-level cache can bring two operands, so one of them has to come from the first level:
//
//   for 512 rows (a pass)                            their activations are laid out in tiles, once
//     for a panel of 256 outputs (one thread's)      sums take 512 KiB of the second-level cache
//       for 512 terms of the sum                     the panel is decoded into tiles, 256 KiB, once
//         for 32 rows of the activations             32 KiB, which stay in the first-level cache
//           for 32 outputs: 16 steps of 4 products   W's tiles stream by, loaded with the hint that they come once:
//                                                    without it they push the activations out
//
// While one piece of a panel is multiplied the next one is decoded, a few rows after each block: the vector units are
// idle then, and the CPU overlaps the two by itself. Measured on two cores of a Xeon with 48 KiB and 2 MiB of cache a
// core, random bf16: the multiplications alone reach 4,700 GFLOP/s, 3,700 without the hint and without asking for the
// sums ahead, and 4,800 when both operands lie in the first-level cache.
#pragma once

#include <atomic>
#include <utility>

#include "amx.h"
#include "kernels.h"

namespace halfbyte {
namespace {

constexpr int64_t kBlockRows = 2 * kTile;         // rows, and outputs, that four sums cover
constexpr int64_t kStep = 32;                     // terms that one tile product sums over
// Two tiles side by side, one step of one operand, and a cache line: decoding writes the same line of many steps at
// once, which would all lie in the same two sets of the cache.
constexpr int64_t kStepWords = 2 * kTileWords + 32;
constexpr int64_t kBlockSums = 4 * kSum;
constexpr int64_t kPanel = 256, kChunk = 512;     // outputs and terms of a decoded panel
constexpr int64_t kMostRows = 512;                // of a pass
constexpr int64_t kPanelWords = kPanel / kBlockRows * (kChunk / kStep) * kStepWords;

constexpr TileConfig kTileConfig;

inline int64_t round_up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

// A panel's part that is decoded at a time: outputs [first, last), terms [at, at + width).
struct Piece {
    int64_t first, last, at, width;
};

// 16 x 16 dwords.
inline void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; ++j) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    }
    for (int i = 0; i < 16; i += 8) {
        for (int j = 0; j < 4; ++j) {
            t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0x88);
            t[i + 4 + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0xdd);
        }
    }
    for (int j = 0; j < 8; ++j) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
    }
}

// The 16 weights of two blocks in bf16: the first one's in the lower half of the register.
inline __m512i two_tables(__m512 values, float scale, float upper_scale) {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(values, _mm512_set1_ps(upper_scale)),
                                        _mm512_mul_ps(values, _mm512_set1_ps(scale)));
}

// Packed rows that will be decoded soon: `rows` of `bytes` bytes, `stride` apart.
struct Codes {
    const uint8_t *first;
    int64_t stride, bytes, rows;
};

// to [left tile][right tile] = from (zeros if null) + the product over `steps` steps. `next` will be needed soon, as
// will `codes`: they are asked for a few at each step, since a whole row of requests at once fills the queue to the
// memory and stops everything behind it.
template <bool WeightsLeft>
inline void multiply(const uint16_t *weights, const uint16_t *rows, int64_t steps, const float *from, float *to,
                     const float *next, Codes codes) {
    const int64_t rows_a_step = (codes.rows + steps - 1) / steps;
    if (from) {
        _tile_loadd(0, from, kRowBytes);
        _tile_loadd(1, from + kSum, kRowBytes);
        _tile_loadd(2, from + 2 * kSum, kRowBytes);
        _tile_loadd(3, from + 3 * kSum, kRowBytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; ++step, weights += kStepWords, rows += kStepWords) {
        if (WeightsLeft) {
            _tile_stream_loadd(4, weights, kRowBytes);
            _tile_loadd(6, rows, kRowBytes);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, rows + kTileWords, kRowBytes);
            _tile_dpbf16ps(1, 4, 7);
            _tile_stream_loadd(5, weights + kTileWords, kRowBytes);
            _tile_dpbf16ps(2, 5, 6);
        } else {
            _tile_loadd(4, rows, kRowBytes);
            _tile_stream_loadd(6, weights, kRowBytes);
            _tile_dpbf16ps(0, 4, 6);
            _tile_stream_loadd(7, weights + kTileWords, kRowBytes);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, rows + kTileWords, kRowBytes);
            _tile_dpbf16ps(2, 5, 6);
        }
        // 64 lines of sums in 16 steps.
        for (int line = 0; line < 4; ++line) _mm_prefetch(next + line * 16, _MM_HINT_T0);
        next += 64;
        const int64_t some = std::min(rows_a_step, codes.rows);
        for (int64_t row = 0; row < some; ++row, codes.first += codes.stride) {
            for (int64_t at = 0; at < codes.bytes; at += 64) _mm_prefetch(codes.first + at, _MM_HINT_T0);
        }
        codes.rows -= some;
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, to, kRowBytes);
    _tile_stored(1, to + kSum, kRowBytes);
    _tile_stored(2, to + 2 * kSum, kRowBytes);
    _tile_stored(3, to + 3 * kSum, kRowBytes);
}

// Bytes that a thread needs: two panels and the sums of all rows.
inline int64_t workspace_bytes(int64_t rows) {
    return 2 * kPanelWords * int64_t(sizeof(uint16_t)) +
           round_up(rows, kBlockRows) * kPanel * int64_t(sizeof(float));
}

// Computes panels of `panel` outputs, taken from `next` until there are none. An Op has
//   kWeightsLeft                 whether W is the left operand of the unit
//   units(piece)                 how many times decode has to be called for a piece
//   codes(piece, unit, count)    what decode will read for `count` units
//   decode(piece, unit, tiles)   tiles [32 outputs][step][2 tiles]
//   write(sums, row, output)     32 x 32 finished sums to their place
template <class Op>
void run_panels(const Op &op, int64_t outputs, int64_t panel, int64_t length, const uint16_t *x, int64_t rows,
                std::atomic<int64_t> &next, void *workspace) {
    uint16_t *tiles = static_cast<uint16_t *>(workspace), *tiles_ahead = tiles + kPanelWords;
    float *const sums = reinterpret_cast<float *>(tiles + 2 * kPanelWords);
    alignas(64) float finished[kBlockSums];
    const auto take = [&]() -> Piece {
        const int64_t first = next.fetch_add(panel, std::memory_order_relaxed);
        return {first, std::min(first + panel, outputs), 0, std::min(kChunk, length)};
    };
    Piece piece = take();
    if (piece.first >= outputs) return;
    _tile_loadconfig(&kTileConfig);
    for (int64_t unit = 0, units = op.units(piece); unit < units; ++unit) op.decode(piece, unit, tiles);
    const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows, steps_of_x = round_up(length, kStep) / kStep;
    while (piece.first < outputs) {
        const bool last = piece.at + piece.width == length;
        const int64_t rest = length - piece.at - piece.width;
        const Piece ahead = last ? take() : Piece{piece.first, piece.last, length - rest, std::min(kChunk, rest)};
                const int64_t units = ahead.first < outputs ? op.units(ahead) : 0;
        const int64_t steps = round_up(piece.width, kStep) / kStep;
        const int64_t groups = round_up(piece.last - piece.first, kBlockRows) / kBlockRows;
        int64_t unit = 0, done = 0;
        const auto due_after = [&](int64_t calls) { return std::min(units, units * calls / (blocks * groups)); };
        for (int64_t block = 0; block < blocks; ++block) {
            const uint16_t *const block_x = x + (block * steps_of_x + piece.at / kStep) * kStepWords;
            for (int64_t group = 0; group < groups; ++group) {
                const int64_t due = due_after(++done), later = due_after(done + 1);
                float *const at = sums + (block * groups + group) * kBlockSums;
                multiply<Op::kWeightsLeft>(tiles + group * steps * kStepWords, block_x, steps, piece.at ? at : nullptr,
                                           last ? finished : at, at + kBlockSums,
                                           op.codes(ahead, due, later - due));
                if (last) op.write(finished, block * kBlockRows, piece.first + group * kBlockRows, piece.last);
                for (; unit < due; ++unit) op.decode(ahead, unit, tiles_ahead);
            }
        }
        std::swap(tiles, tiles_ahead);
        piece = ahead;
    }
    _tile_release();
}

}  // namespace
}  // namespace halfbyte
