// What a decoder computes between its products, for one row or one head at a time: norms, the rotation, attention over
// the cache, gates. All of it is float32.
#pragma once

#include "vectors.h"

namespace halfbyte {
namespace {

constexpr int64_t kKeyBlock = 16;             // positions side by side in the key cache
constexpr int kParts = kKeyBlock / kLanes;    // registers that they fill
constexpr int64_t kAttendAtOnce = 4 * kKeyBlock;

void rms_norm(const float *x, const float *weight, int64_t n, float eps, float *y) {
    Floats squares{};
    for (int64_t i = 0; i < n; i += kLanes) {
        const Floats v = load(x + i, n - i);
        squares += v * v;
    }
    const float scale = float(1.0 / std::sqrt(sum(squares) / double(n) + double(eps)));
    for (int64_t i = 0; i < n; i += kLanes) store(y + i, n - i, load(weight + i, n - i) * (load(x + i, n - i) * scale));
}

void round_row(const float *x, int64_t n, uint16_t *out) {
    bfloat16 *const to = reinterpret_cast<bfloat16 *>(out);
    for (int64_t i = 0; i < n; i += kLanes) store(to + i, n - i, load(x + i, n - i));
}

void widen_row(const uint16_t *x, int64_t n, float *out) {
    const bfloat16 *const from = reinterpret_cast<const bfloat16 *>(x);
    for (int64_t i = 0; i < n; i += kLanes) store(out + i, n - i, load(from + i, n - i));
}

void add_row(const float *x, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i += kLanes) store(out + i, n - i, load(out + i, n - i) + load(x + i, n - i));
}

// Dot products of R rows of W with one x: R sums hide the latency of each other's additions.
template <class T, int R>
HB_INLINE void dot_rows(const T *w, int64_t k, const float *x, float *out) {
    Floats total[R] = {};
    int64_t i = 0;
    for (; i + kLanes <= k; i += kLanes) {
        const Floats v = load_whole(x + i);
        for (int r = 0; r < R; ++r) total[r] += load_whole(w + r * k + i) * v;
    }
    if (i < k) {
        const Floats v = load(x + i, k - i);
        for (int r = 0; r < R; ++r) total[r] += load(w + r * k + i, k - i) * v;
    }
    for (int r = 0; r < R; ++r) out[r] = float(sum(total[r]));
}

template <class T>
void dot_all(const T *w, int64_t k, const float *x, int64_t count, float *out) {
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) dot_rows<T, 4>(w + r * k, k, x, out + r);
    for (; r < count; ++r) dot_rows<T, 1>(w + r * k, k, x, out + r);
}

// Four rows of W are read once from memory and met by every row of x while they are in the first-level cache.
template <class T>
void dense_of(const T *w, int64_t n, int64_t k, const float *x, int64_t rows, int64_t first, int64_t last, float *out) {
    for (int64_t column = first; column < last; column += 4) {
        const int64_t count = std::min<int64_t>(4, last - column);
        for (int64_t row = 0; row < rows; ++row) dot_all(w + column * k, k, x + row * k, count, out + row * n + column);
    }
}

void dense(const hb_matrix &w, const float *x, int64_t rows, int64_t first, int64_t last, float *out) {
    if (w.dense_dtype == HB_FLOAT32) return dense_of(static_cast<const float *>(w.dense), w.n, w.k, x, rows, first, last, out);
    dense_of(static_cast<const bfloat16 *>(w.dense), w.n, w.k, x, rows, first, last, out);
}

// gate(g) u, where gate(g) = g sigmoid(g), or gelu's approximation by tanh, which is g sigmoid(2 sqrt(2 / pi) (g + 0.044715 g^3)).
void gate(int activation, const float *gates, const float *up, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i += kLanes) {
        const Floats g = load(gates + i, n - i);
        const Floats inner = activation == HB_SILU ? g : 1.5957691216f * (g + 0.044715f * (g * g * g));
        store(out + i, n - i, g / (1.0f + exponential(-inner)) * load(up + i, n - i));
    }
}

void rotate(const float *cosine, const float *sine, int64_t dim, float *x) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[half + i];
        x[i] = a * cosine[i] - b * sine[i];
        x[half + i] = b * cosine[half + i] + a * sine[half + i];
    }
}

// Which vector of the cache [layers, slots, kv_heads, positions] comes first for a head.
int64_t first_vector(const HeadAt &at) {
    const hb_decoder &d = at.decoder;
    return ((at.number * d.slots + at.slot) * d.kv_heads + at.head) * d.positions;
}

void put(float x, float, float *to) { *to = x; }
void put(float x, float, bfloat16 *to) { store(to, x); }
void put(float x, float inverse, int8_t *to) { *to = int8_t(std::lrintf(x * inverse)); }

// The largest magnitude over 127, or 1 for a vector of zeros, which then is coded exactly.
float byte_scale(const float *x, int64_t n) {
    float most = 0.0f;
    for (int64_t i = 0; i < n; ++i) most = std::max(most, std::fabs(x[i]));
    return most > 0.0f ? most / 127.0f : 1.0f;
}

template <class T>
void enter_of(const HeadAt &at, const float *key, const float *value) {
    const hb_decoder &d = at.decoder;
    const int64_t first = first_vector(at), vector = first + at.position;
    float key_inverse = 1.0f, value_inverse = 1.0f;
    if (d.key_scales) {
        const float key_scale = byte_scale(key, d.head_dim), value_scale = byte_scale(value, d.head_dim);
        d.key_scales[vector] = key_scale, d.value_scales[vector] = value_scale;
        key_inverse = 1.0f / key_scale, value_inverse = 1.0f / value_scale;
    }
    T *const keys = static_cast<T *>(d.keys) + (first + at.position / kKeyBlock * kKeyBlock) * d.head_dim + at.position % kKeyBlock;
    T *const values = static_cast<T *>(d.values) + vector * d.head_dim;
    for (int64_t i = 0; i < d.head_dim; ++i) {
        put(key[i], key_inverse, keys + i * kKeyBlock);
        put(value[i], value_inverse, values + i);
    }
}

void enter(const HeadAt &at, float *queries, float *key, const float *value) {
    const hb_decoder &d = at.decoder;
    const float *const cosine = d.cosine + at.position * d.head_dim, *const sine = d.sine + at.position * d.head_dim;
    for (int64_t head = 0; head < d.heads / d.kv_heads; ++head) {
        float *const q = queries + head * d.head_dim;
        if (at.layer.query_norm) rms_norm(q, at.layer.query_norm, d.head_dim, d.eps, q);
        rotate(cosine, sine, d.head_dim, q);
        for (int64_t i = 0; i < d.head_dim; ++i) q[i] *= d.attention_scale;
    }
    if (at.layer.key_norm) rms_norm(key, at.layer.key_norm, d.head_dim, d.eps, key);
    rotate(cosine, sine, d.head_dim, key);
    switch (d.cache_dtype) {
        case HB_FLOAT32: return enter_of<float>(at, key, value);
        case HB_BFLOAT16: return enter_of<bfloat16>(at, key, value);
        default: return enter_of<int8_t>(at, key, value);
    }
}

// Scores of G queries with `blocks` blocks of 16 keys.
template <class T, int G>
HB_INLINE void score(const T *keys, int64_t blocks, int64_t dim, const float *queries, float (*scores)[kAttendAtOnce]) {
    for (int64_t block = 0; block < blocks; ++block, keys += kKeyBlock * dim) {
        Floats total[G][kParts] = {};
        for (int64_t i = 0; i < dim; ++i) {
            Floats key[kParts];
            for (int part = 0; part < kParts; ++part) key[part] = load_whole(keys + i * kKeyBlock + part * kLanes);
            for (int g = 0; g < G; ++g) {
                for (int part = 0; part < kParts; ++part) total[g][part] += key[part] * queries[g * dim + i];
            }
        }
        for (int g = 0; g < G; ++g) {
            for (int part = 0; part < kParts; ++part) {
                store_whole(scores[g] + block * kKeyBlock + part * kLanes, total[g][part]);
            }
        }
    }
}

// out [G, dim] = out * keep + p values, over positions [first, last) of the 64 at `values`.
template <class T, int G>
HB_INLINE void blend(const T *values, int64_t first, int64_t last, int64_t dim, const float (*p)[kAttendAtOnce],
                     const float *keep, float *out) {
    for (int64_t i = 0; i < dim; i += kLanes) {
        const int64_t left = dim - i;
        Floats total[G];
        for (int g = 0; g < G; ++g) total[g] = load(out + g * dim + i, left) * keep[g];
        for (int64_t at = first; at < last; ++at) {
            const Floats value = load(values + at * dim + i, left);
            for (int g = 0; g < G; ++g) total[g] += value * p[g][at];
        }
        for (int g = 0; g < G; ++g) store(out + g * dim + i, left, total[g]);
    }
}

// softmax(q K) V for G queries of one key head, 64 positions at a time with a running maximum (arXiv 2205.14135).
template <class T, int G>
void attend_group(const HeadAt &at, const float *queries, float *out) {
    const hb_decoder &d = at.decoder;
    const int64_t dim = d.head_dim, vector = first_vector(at), end = at.position + 1;
    const int64_t begin = at.layer.window ? std::max<int64_t>(0, end - at.layer.window) : 0;
    const T *const keys = static_cast<const T *>(d.keys) + vector * dim;
    const T *const values = static_cast<const T *>(d.values) + vector * dim;
    alignas(64) float scores[G][kAttendAtOnce];
    float most[G], total[G], keep[G];
    std::fill(most, most + G, -INFINITY);
    std::fill(total, total + G, 0.0f);
    std::fill(out, out + G * dim, 0.0f);
    for (int64_t base = begin / kAttendAtOnce * kAttendAtOnce; base < end; base += kAttendAtOnce) {
        const int64_t first = std::max<int64_t>(begin - base, 0), last = std::min(end - base, kAttendAtOnce);
        score<T, G>(keys + base * dim, (last + kKeyBlock - 1) / kKeyBlock, dim, queries, scores);
        for (int g = 0; g < G; ++g) {
            float *const s = scores[g];
            if (d.key_scales) {
                for (int64_t i = first; i < last; ++i) s[i] *= d.key_scales[vector + base + i];
            }
            float largest = most[g];
            for (int64_t i = first; i < last; ++i) largest = std::max(largest, s[i]);
            Floats sums{};
            float ragged = 0.0f;
            int64_t i = first;  // what comes before is not seen
            for (; i + kLanes <= last; i += kLanes) {
                const Floats e = exponential(load_whole(s + i) - largest);
                store_whole(s + i, e);
                sums += e;
            }
            for (; i < last; ++i) ragged += s[i] = std::exp(s[i] - largest);
            keep[g] = std::exp(most[g] - largest);
            total[g] = total[g] * keep[g] + float(sum(sums)) + ragged;
            most[g] = largest;
            if (d.value_scales) {
                for (int64_t j = first; j < last; ++j) s[j] *= d.value_scales[vector + base + j];
            }
        }
        blend<T, G>(values + base * dim, first, last, dim, scores, keep, out);
    }
    for (int g = 0; g < G; ++g) {
        for (int64_t i = 0; i < dim; ++i) out[g * dim + i] /= total[g];
    }
}

template <class T>
void attend_of(const HeadAt &at, const float *queries, float *out) {
    const int64_t group = at.decoder.heads / at.decoder.kv_heads, dim = at.decoder.head_dim;
    int64_t g = 0;
    for (; g + 4 <= group; g += 4) attend_group<T, 4>(at, queries + g * dim, out + g * dim);
    for (; g + 2 <= group; g += 2) attend_group<T, 2>(at, queries + g * dim, out + g * dim);
    for (; g < group; ++g) attend_group<T, 1>(at, queries + g * dim, out + g * dim);
}

void attend(const HeadAt &at, const float *queries, float *out) {
    switch (at.decoder.cache_dtype) {
        case HB_FLOAT32: return attend_of<float>(at, queries, out);
        case HB_BFLOAT16: return attend_of<bfloat16>(at, queries, out);
        default: return attend_of<int8_t>(at, queries, out);
    }
}

constexpr DecoderOps kDecoderOps = {rms_norm, round_row, widen_row, dense, add_row, gate, enter, attend};

}  // namespace
}  // namespace halfbyte
