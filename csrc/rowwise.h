// What a training step computes between its products, row by row: softmax with its loss, norms, gates, rotations.
//
// All of it is bound by memory once it is vectorised, so there is one source for every instruction set (vectors.h).
// Elements are read once or twice, computed in float32 and rounded once. See scalar.h for the namespace.
#pragma once

#include <cmath>

#include "kernels.h"
#include "vectors.h"

namespace halfbyte {
namespace {

// A row's log-sum-exp is max + log(sum e^(x - max)); sums of kBlock vectors are float32, their total is float64.
template <class T>
void cross_entropy(void *data, int64_t first, int64_t last, int64_t vocabulary, const int64_t *labels, bool gradient,
                   float *losses) {
    constexpr int64_t kBlock = 128 * kLanes;
    for (int64_t row = first; row < last; ++row) {
        T *const x = static_cast<T *>(data) + row * vocabulary;
        Floats largest = all(-INFINITY);
        for (int64_t i = 0; i < vocabulary; i += kLanes) {
            const Floats v = load(x + i, vocabulary - i, -INFINITY);
            largest = choose(v > largest, v, largest);
        }
        float most = -INFINITY;
        for (int i = 0; i < kLanes; ++i) most = largest[i] > most ? largest[i] : most;
        double total = 0.0;
        for (int64_t begin = 0; begin < vocabulary; begin += kBlock) {
            const int64_t end = std::min(begin + kBlock, vocabulary);
            Floats even{}, odd{};
            int64_t i = begin;
            for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
                even += exponential(load_whole(x + i) - most);
                odd += exponential(load_whole(x + i + kLanes) - most);
            }
            total += sum(even + odd);
            for (; i < end; ++i) total += std::exp(to_float(x[i]) - most);
        }
        const float target = to_float(x[labels[row]]);
        losses[row] = float(double(most) - double(target) + std::log(total));
        if (!gradient) continue;
        const float share = float(1.0 / total);
        for (int64_t i = 0; i < vocabulary; i += kLanes) {
            store(x + i, vocabulary - i, exponential(load(x + i, vocabulary - i) - most) * share);
        }
        store(x + labels[row], std::exp(target - most) * share - 1.0f);
    }
}

// y = w x / sqrt(mean(x^2) + eps)
template <class T>
void rms_norm(const void *x_data, const void *w_data, int64_t first, int64_t last, int64_t n, float eps, void *y_data,
              float *rstd) {
    const T *const w = static_cast<const T *>(w_data);
    for (int64_t row = first; row < last; ++row) {
        const T *const x = static_cast<const T *>(x_data) + row * n;
        T *const y = static_cast<T *>(y_data) + row * n;
        Floats squares{};
        for (int64_t i = 0; i < n; i += kLanes) {
            const Floats v = load(x + i, n - i);
            squares += v * v;
        }
        const float scale = float(1.0 / std::sqrt(sum(squares) / double(n) + double(eps)));
        rstd[row] = scale;
        for (int64_t i = 0; i < n; i += kLanes) store(y + i, n - i, load(w + i, n - i) * (load(x + i, n - i) * scale));
    }
}

// grad x = r (g w - x r^2 mean(g w x)), r = rstd
template <class T>
void rms_norm_grad(const void *g_data, const void *x_data, const void *w_data, const float *rstd, int64_t first,
                   int64_t last, int64_t n, void *out_data) {
    const T *const w = static_cast<const T *>(w_data);
    for (int64_t row = first; row < last; ++row) {
        const T *const g = static_cast<const T *>(g_data) + row * n, *const x = static_cast<const T *>(x_data) + row * n;
        T *const out = static_cast<T *>(out_data) + row * n;
        Floats products{};
        for (int64_t i = 0; i < n; i += kLanes) {
            products += load(g + i, n - i) * load(w + i, n - i) * load(x + i, n - i);
        }
        const float scale = rstd[row];
        const float along = float(sum(products) / double(n)) * scale * scale;
        for (int64_t i = 0; i < n; i += kLanes) {
            const int64_t left = n - i;
            store(out + i, left, (load(g + i, left) * load(w + i, left) - load(x + i, left) * along) * scale);
        }
    }
}

// y = gate sigmoid(gate) up
template <class T>
void swiglu(const void *gate_data, const void *up_data, int64_t first, int64_t last, void *y_data) {
    const T *const gate = static_cast<const T *>(gate_data), *const up = static_cast<const T *>(up_data);
    T *const y = static_cast<T *>(y_data);
    for (int64_t i = first; i < last; i += kLanes) {
        const Floats g = load(gate + i, last - i);
        store(y + i, last - i, g / (1.0f + exponential(-g)) * load(up + i, last - i));
    }
}

template <class T>
void swiglu_grad(const void *grad_data, const void *gate_data, const void *up_data, int64_t first, int64_t last,
                 void *grad_gate_data, void *grad_up_data) {
    const T *const grad = static_cast<const T *>(grad_data), *const gate = static_cast<const T *>(gate_data);
    const T *const up = static_cast<const T *>(up_data);
    T *const grad_gate = static_cast<T *>(grad_gate_data), *const grad_up = static_cast<T *>(grad_up_data);
    for (int64_t i = first; i < last; i += kLanes) {
        const int64_t left = last - i;
        const Floats g = load(gate + i, left), dy = load(grad + i, left), u = load(up + i, left);
        const Floats sigmoid = 1.0f / (1.0f + exponential(-g));
        store(grad_up + i, left, dy * (g * sigmoid));
        store(grad_gate + i, left, dy * u * (sigmoid * (1.0f + g * (1.0f - sigmoid))));
    }
}

// Each token's heads [heads, dim] turned by that token's angles: out = x cos + (-x2, x1) sin, x1 and x2 the halves of a
// head. `inverse` is the transposed map, the gradient's way back.
template <class T>
void rotary(const void *x_data, const void *cos_data, const void *sin_data, int64_t first, int64_t last, int64_t angles,
            int64_t heads, int64_t dim, bool inverse, void *out_data) {
    const int64_t half = dim / 2;
    for (int64_t token = first; token < last; ++token) {
        const T *const cosine = static_cast<const T *>(cos_data) + token % angles * dim;
        const T *const sine = static_cast<const T *>(sin_data) + token % angles * dim;
        for (int64_t head = 0; head < heads; ++head) {
            const T *const x = static_cast<const T *>(x_data) + (token * heads + head) * dim;
            T *const out = static_cast<T *>(out_data) + (token * heads + head) * dim;
            for (int64_t i = 0; i < half; i += kLanes) {
                const int64_t left = half - i;
                const Floats a = load(x + i, left), b = load(x + half + i, left);
                const Floats s = load(sine + i, left), t = load(sine + half + i, left);
                const Floats from_b = inverse ? b * t : -(b * s), from_a = inverse ? -(a * s) : a * t;
                store(out + i, left, a * load(cosine + i, left) + from_b);
                store(out + half + i, left, b * load(cosine + half + i, left) + from_a);
            }
        }
    }
}

template <class T>
constexpr RowwiseOf kRowwiseOf = {cross_entropy<T>, rms_norm<T>, rms_norm_grad<T>, swiglu<T>, swiglu_grad<T>, rotary<T>};

}  // namespace
}  // namespace halfbyte
