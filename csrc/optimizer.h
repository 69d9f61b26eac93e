// What an instruction set implements for the optimizer, and what all of them share.
#pragma once

#include <cstdint>

#include "halfbyte.h"

namespace halfbyte {

// Elements that share a scale in 8-bit states, as in bitsandbytes' files; also what is updated at a time.
constexpr int64_t kAdamWBlock = 256;
// The same in 4-bit states (arXiv 2309.01507, B128).
constexpr int64_t kAdamWBlock4 = 128;

// What finds the nearest entry of a dynamic map without a search, from the bits of a float as an integer that compares as
// the float does. Numbers whose bits above kShift are equal form a bucket, which is narrower than the gap between two
// thresholds: it holds at most one. buckets[x >> kShift] has the count of thresholds below the bucket in its upper 8
// bits and, below those, the number that carries into them when the lower bits of a number above the threshold are
// added; the bucket itself is subtracted. So the code of every float is (buckets[x >> kShift] + x) >> 24, modulo 2^32,
// without a comparison.
constexpr int kSignedShift = 17, kUnsignedShift = 16;
const int32_t *signed_buckets();    // of kScaleTable8 [2^(32 - kSignedShift)]
const int32_t *unsigned_buckets();  // of kUnsignedDynamic

// New scales of a matrix's second moment while the old ones are still read, as the bits of floats: those of numbers that
// are not negative compare as integers, and an integer can be raised atomically.
struct RankOne {
    uint32_t *rows, *columns;
};

// Elements [at, at + count) of a tensor; `at` is a multiple of kAdamWBlock.
struct AdamW {
    void (*run)(const hb_adamw_tensor &t, const hb_adamw_options &o, const RankOne &next, int64_t at, int64_t count);
    // Raises `next` to the largest second moments after this step of each row and column; several threads may call it.
    void (*rank_one)(const hb_adamw_tensor &t, const hb_adamw_options &o, const RankOne &next, int64_t at,
                     int64_t count);
    double (*sum_of_squares)(const hb_adamw_tensor &t, int64_t at, int64_t count);
};

extern const AdamW adamw_generic;
#ifdef HB_X86
extern const AdamW adamw_avx2;
extern const AdamW adamw_avx512;
#endif

}  // namespace halfbyte
