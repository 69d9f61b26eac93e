// The branch of LoRA adapters beside a few-row product, one source for every instruction set (vectors.h).
//
// An adapter of rank r adds s (x A^T) B^T, r (K + N) multiply-adds a row where W has K N. All that it costs is reading A
// and B, so both are read once, in the order in which they lie, in the adapter's own element type:
//
// - x A^T: a row of A is a row of the sum's terms. Four rows of A at a time share the loads of x.
// - (x A^T) B^T: a row of B has only r terms, one or a few vectors, and ends in a sum *across* a vector's lanes. One by one
//   those would cost more than the products. So a vector of outputs is summed as a tree, which halves the number of
//   vectors at each level: kLanes - 1 additions and twice as many shuffles for kLanes outputs.
//
// Products are float32's. A sum's order depends on the vectors' width only. See scalar.h for the namespace.
#pragma once

#include <utility>

#include "kernels.h"
#include "vectors.h"

namespace halfbyte {
namespace {

// Lane i is lane index[i] of the 2 kLanes lanes of a and b.
#ifdef __clang__
#define HB_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define HB_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

// Lanes whose number has the bit `Step` are b's, the others a's: each plus the lane of the same vector at distance Step.
template <int Step, int... I>
HB_INLINE Floats fold(Floats a, Floats b, std::integer_sequence<int, I...>) {
    return HB_SHUFFLE(a, b, (I & Step ? kLanes + I : I)...) + HB_SHUFFLE(a, b, (I & Step ? kLanes : 0) + (I ^ Step)...);
}

// Lane i of the result is the sum of the lanes of x[i].
template <int Step = 1>
HB_INLINE Floats sum_each(Floats (&x)[kLanes]) {
    if constexpr (Step == kLanes) {
        return x[0];
    } else {
        for (int i = 0; i < kLanes; i += 2 * Step) {
            x[i] = fold<Step>(x[i], x[i + Step], std::make_integer_sequence<int, kLanes>());
        }
        return sum_each<2 * Step>(x);
    }
}

// The first `count` elements, zeros after them. Where `end` allows it a whole vector is read and the rest of it dropped.
template <class T>
HB_INLINE Floats load_before(const T *p, int64_t count, const T *end) {
    if (count >= kLanes) return load_whole(p);
    if (end - p < kLanes) return load(p, count);
    Ints lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    return choose(lane < int32_t(count), load_whole(p), Floats{});
}

// t [M][.. width] of R rows of A and M rows of x.
template <int R, int M, class A, class X>
HB_INLINE void dots(const A *a, const X *x, int64_t k, float scaling, float *t, int64_t width) {
    Floats sums[R][M] = {};
    const int64_t whole = k / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
        Floats xs[M];
        for (int m = 0; m < M; ++m) xs[m] = load_whole(x + m * k + i);
        for (int r = 0; r < R; ++r) {
            const Floats weights = load_whole(a + r * k + i);
            for (int m = 0; m < M; ++m) sums[r][m] += weights * xs[m];
        }
    }
    if (whole < k) {  // beside a dense matrix, which may have any number of columns
        for (int m = 0; m < M; ++m) {
            const Floats rest = load(x + m * k + whole, k - whole);
            for (int r = 0; r < R; ++r) sums[r][m] += load(a + r * k + whole, k - whole) * rest;
        }
    }
    for (int m = 0; m < M; ++m) {
        for (int r = 0; r < R; ++r) t[m * width + r] = float(sum(sums[r][m])) * scaling;
    }
}

template <int R, class A, class X>
void rows_of_a(const A *a, const X *x, int64_t rows, int64_t k, float scaling, float *t, int64_t width) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) dots<R, 4>(a, x + row * k, k, scaling, t + row * width, width);
    for (; row < rows; ++row) dots<R, 1>(a, x + row * k, k, scaling, t + row * width, width);
}

template <class A, class X>
void down(const hb_lora &lora, const X *x, int64_t k, float *t, int64_t first, int64_t last) {
    const A *const a = static_cast<const A *>(lora.a);
    const int64_t width = lora_width(lora.rank);
    if (last - first == kLoraRanks) {
        return rows_of_a<kLoraRanks>(a + first * k, x, lora.rows, k, lora.scaling, t + first, width);
    }
    for (; first < last; ++first) rows_of_a<1>(a + first * k, x, lora.rows, k, lora.scaling, t + first, width);
}

template <class B, class Y>
void up(const hb_lora &lora, const float *t, int64_t n, Y *out, int64_t first, int64_t last) {
    constexpr int64_t kChunk = 64;  // of the rank: its part of kLanes rows of B is at most 4 KiB of floats
    const B *const b = static_cast<const B *>(lora.b), *const end = b + n * lora.rank;
    const int64_t width = lora_width(lora.rank);
    for (int64_t column = first; column < last; column += kLanes) {
        const int64_t columns = std::min<int64_t>(kLanes, last - column);
        Floats y[kFewRows] = {};
        for (int64_t from = 0; from < lora.rank; from += kChunk) {
            const int64_t size = std::min(kChunk, lora.rank - from), vectors = (size + kLanes - 1) / kLanes;
            Floats weights[kChunk / kLanes][kLanes];
            for (int i = 0; i < kLanes; ++i) {  // rows past the end repeat the last one and are not written
                const B *const row = b + (column + std::min<int64_t>(i, columns - 1)) * lora.rank + from;
                for (int64_t v = 0; v < vectors; ++v) {
                    weights[v][i] = load_before(row + v * kLanes, size - v * kLanes, end);
                }
            }
            for (int64_t m = 0; m < lora.rows; ++m) {
                Floats sums[kLanes] = {};
                for (int64_t v = 0; v < vectors; ++v) {
                    const Floats some = load_whole(t + m * width + from + v * kLanes);
                    for (int i = 0; i < kLanes; ++i) sums[i] += weights[v][i] * some;
                }
                y[m] += sum_each(sums);
            }
        }
        for (int64_t m = 0; m < lora.rows; ++m) {
            Y *const to = out + m * n + column;
            store(to, columns, load(to, columns) + y[m]);
        }
    }
}

// body(a null pointer to the element type)
template <class Body>
HB_INLINE void with_type(int dtype, Body body) {
    switch (dtype) {
        case HB_FLOAT32: return body(static_cast<const float *>(nullptr));
        case HB_BFLOAT16: return body(static_cast<const bfloat16 *>(nullptr));
        default: return body(static_cast<const float16 *>(nullptr));
    }
}

template <class T>
using Plain = std::remove_const_t<std::remove_pointer_t<T>>;

void run_down(const hb_lora &lora, const void *x, int dtype, int64_t k, float *t, int64_t first, int64_t last) {
    with_type(lora.dtype, [&](auto a) {
        with_type(dtype, [&](auto of_x) {
            down<Plain<decltype(a)>>(lora, static_cast<decltype(of_x)>(x) + lora.first * k, k, t, first, last);
        });
    });
}

void run_up(const hb_lora &lora, const float *t, int64_t n, int dtype, void *out, int64_t first, int64_t last) {
    with_type(lora.dtype, [&](auto b) {
        with_type(dtype, [&](auto of_y) {
            using Y = Plain<decltype(of_y)>;
            up<Plain<decltype(b)>>(lora, t, n, static_cast<Y *>(out) + lora.first * n, first, last);
        });
    });
}

#undef HB_SHUFFLE

}  // namespace
}  // namespace halfbyte
