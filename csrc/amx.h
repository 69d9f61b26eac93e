// What the AMX kernels share: tiles, their configuration, tables of two halves. See scalar.h for the unnamed namespace.
#pragma once

#include <immintrin.h>

#include "scalar.h"

namespace halfbyte {
namespace {

constexpr int64_t kTile = 16;               // rows of a tile
constexpr int64_t kTileWords = kTile * 32;  // bf16 elements of a tile
constexpr int64_t kSum = kTile * kTile;     // float elements of a tile of sums
constexpr int64_t kRowBytes = 64;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "the unit reads 64 bytes");

// A block's 16 weights in bf16, for vpermw: twice, or the tables of two blocks in the halves of a register.
inline __m512i full_table(__m512 values, float scale) {
    return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(values, _mm512_set1_ps(scale))));
}
inline __m512i half_table(__m512 values, float scale, float upper_scale) {
    const __m256i upper = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(values, _mm512_set1_ps(upper_scale)));
    return _mm512_inserti64x4(full_table(values, scale), upper, 1);
}

}  // namespace
}  // namespace halfbyte
