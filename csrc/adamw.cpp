// AdamW over many tensors: cuts all of them into pieces and hands those to threads. Also the tables that every
// instruction set's kernel shares.
#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "scalar.h"

namespace halfbyte {
namespace {

// Elements of a piece, and pieces that a thread takes at once. One tensor may be smaller than a piece and another one
// thousands of them: pieces of all tensors are numbered through, so that the threads share all of the work evenly.
constexpr int64_t kPiece = 4096;
constexpr int64_t kPiecesAtOnce = 4;

int64_t pieces_of(const hb_adamw_tensor &t) { return (t.count + kPiece - 1) / kPiece; }

// Calls body(tensor number, piece number, first element, elements) for every piece of the tensors that `wanted` says.
template <class Wanted, class Body>
void for_each_piece(int threads, const hb_adamw_tensor *tensors, int64_t count, Wanted wanted, Body body) {
    std::vector<int64_t> first(size_t(count) + 1);  // piece number that each tensor begins with
    for (int64_t i = 0; i < count; ++i) first[i + 1] = first[i] + (wanted(tensors[i]) ? pieces_of(tensors[i]) : 0);
    const int64_t *const begins = first.data();
    parallel_for(threads, begins[count], kPiecesAtOnce, [=](int64_t piece, int64_t last) {
        int64_t tensor = std::upper_bound(begins, begins + count + 1, piece) - begins - 1;
        for (; piece < last; ++piece) {
            while (piece >= begins[tensor + 1]) ++tensor;
            const int64_t at = (piece - begins[tensor]) * kPiece;
            body(tensor, piece, at, std::min(kPiece, tensors[tensor].count - at));
        }
    });
}

bool has_rank_one(const hb_adamw_tensor &t) { return t.columns > 0; }
bool any_tensor(const hb_adamw_tensor &) { return true; }

// The bits of a float as an integer that compares as the float does.
int32_t ordered(float x) {
    const int32_t bits = int32_t(bits_of(x));
    return bits < 0 ? bits ^ 0x7fffffff : bits;
}

// A map's values [256], ascending -> its buckets. Second moments are never stored as zero unless they are: the first
// threshold of a map without negative values is zero. The nearest code of a second moment below half the smallest entry
// would be that of 0, and a gradient of 0 after that divides the first moment by eps alone.
std::vector<int32_t> buckets_of(const float *values, int shift) {
    std::vector<int32_t> buckets(size_t(1) << (32 - shift));
    uint32_t rank = 0;
    for (int64_t first = INT32_MIN; first <= INT32_MAX; first += int64_t(1) << shift) {
        uint32_t entry = rank << 24;
        if (rank < 255) {
            const float threshold = values[rank] == 0.0f && rank == 0 ? 0.0f : (values[rank] + values[rank + 1]) / 2;
            const int64_t inside = ordered(threshold) - first;
            if (inside < int64_t(1) << shift) {
                entry += 0xffffff - uint32_t(inside);
                ++rank;
            }
        }
        buckets[uint32_t(first) >> shift] = int32_t(entry - uint32_t(first));
    }
    return buckets;
}

}  // namespace

const int32_t *signed_buckets() {
    static const std::vector<int32_t> buckets = buckets_of(kScaleTable8, kSignedShift);
    return buckets.data();
}

const int32_t *unsigned_buckets() {
    static const std::vector<int32_t> buckets = buckets_of(kUnsignedDynamic, kUnsignedShift);
    return buckets.data();
}

}  // namespace halfbyte

using namespace halfbyte;

int hb_adamw(int threads, const hb_adamw_tensor *tensors, int64_t count, const hb_adamw_options *options) try {
    const AdamW &kernel = kernels().adamw;
    std::vector<RankOne> next(size_t(count), RankOne{nullptr, nullptr});
    int64_t size = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (has_rank_one(tensors[i])) size += tensors[i].count / tensors[i].columns + tensors[i].columns;
    }
    std::vector<uint32_t> scales(size_t(size), 0);
    uint32_t *free = scales.data();
    for (int64_t i = 0; i < count; ++i) {
        if (!has_rank_one(tensors[i])) continue;
        const int64_t rows = tensors[i].count / tensors[i].columns;
        next[i] = {free, free + rows};
        free += rows + tensors[i].columns;
    }
    const RankOne *const scale = next.data();
    for_each_piece(threads, tensors, count, has_rank_one, [=](int64_t i, int64_t, int64_t at, int64_t elements) {
        kernel.rank_one(tensors[i], options[tensors[i].options], scale[i], at, elements);
    });
    for_each_piece(threads, tensors, count, any_tensor, [=](int64_t i, int64_t, int64_t at, int64_t elements) {
        kernel.run(tensors[i], options[tensors[i].options], scale[i], at, elements);
    });
    for (int64_t i = 0; i < count; ++i) {
        if (!has_rank_one(tensors[i])) continue;
        std::memcpy(tensors[i].scale2, next[i].rows, size_t(tensors[i].count / tensors[i].columns) * sizeof(float));
        std::memcpy(tensors[i].scale2_columns, next[i].columns, size_t(tensors[i].columns) * sizeof(float));
    }
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}

int hb_adamw_norms(int threads, const hb_adamw_tensor *tensors, int64_t count, double *sums) try {
    const AdamW &kernel = kernels().adamw;
    int64_t pieces = 0;
    for (int64_t i = 0; i < count; ++i) pieces += pieces_of(tensors[i]);
    std::vector<double> parts(size_t(pieces), 0.0);
    double *const part = parts.data();
    for_each_piece(threads, tensors, count, any_tensor, [=](int64_t i, int64_t piece, int64_t at, int64_t elements) {
        part[piece] = kernel.sum_of_squares(tensors[i], at, elements);
    });
    for (int64_t i = 0, piece = 0; i < count; ++i) {
        sums[i] = 0;
        for (int64_t end = piece + pieces_of(tensors[i]); piece < end; ++piece) sums[i] += part[piece];
    }
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}
