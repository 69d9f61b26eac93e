#include <algorithm>
#include <cmath>
#include <cstring>

#include "calls.h"

namespace {

// A weight of which a part is decoded: rows that are not whole blocks, and starts within a block, included.
Weight decoded_weight(Random &random, int64_t count) {
    const int64_t block = block_size(random);
    const int64_t start = random.one_in(2) ? 0 : random.below(random.one_in(3) ? 3 * block : block);
    return weight(random, random.below(kFormats), block, start, count, false);
}

// The exact product in float64 and its bound, as tests/kernels/test_cpu.py derives it: a weight may be rounded once to
// the dtype, a float32 sum of `length` terms errs by at most `length` float32 eps of the sum of magnitudes, and the
// result is rounded once; below the normal range a rounding errs by half the spacing of subnormals instead.
// Factor i of the sum lies at x[m][i] and at weights[first(j) + i * step].
void expect(Call &call, const Type &type, const void *x, const Guarded *bias, int64_t rows, int64_t length,
            int64_t outputs, const float *weights, int64_t first_step, int64_t step) {
    const double half = type.eps / 2, floor = std::max(type.smallest_normal * half, 0x1p-126);
    std::vector<double> factors(static_cast<size_t>(length));
    for (int64_t m = 0; m < rows; ++m) {
        double total = 0;
        for (int64_t i = 0; i < length; ++i) {
            total += std::fabs(factors[size_t(i)] = to_double(x, type.element, m * length + i));
        }
        for (int64_t j = 0; j < outputs; ++j) {
            double exact = bias ? to_double(bias->data(), type.element, j) : 0, magnitude = 0;
            const double of_bias = type.eps * std::fabs(exact);
            for (int64_t i = 0; i < length; ++i) {
                const double product = factors[size_t(i)] * double(weights[j * first_step + i * step]);
                exact += product, magnitude += std::fabs(product);
            }
            call.exact.push_back(exact);
            call.allowed.push_back((half + double(length) * 0x1p-23) * magnitude * (1 + type.eps) + half * magnitude +
                                   floor * (total + 1) + of_bias);
        }
    }
}

// Adapters for some of `rows`, one after the other; the exact branches are added to what `call` expects.
std::vector<hb_lora> adapters(Random &random, Call &call, std::vector<Buffer> &keep, const Type &type, const Guarded &x,
                              int64_t n, int64_t k, int64_t rows) {
    std::vector<hb_lora> made;
    for (int64_t first = random.below(2); first < rows && made.size() < 3; first += made.back().rows) {
        const Type &own = kTypes[random.below(3)];
        const int64_t rank = random.size(random.one_in(8) ? 8 : 5), count = random.between(1, rows - first);
        const Buffer a = floats(random, own, rank * k, Values::kSmooth, 0x1p-4f);
        const Buffer b = floats(random, own, n * rank, Values::kSmooth, 1);
        const float scaling = random.smooth();
        keep.push_back(a), keep.push_back(b);
        made.push_back({a->data(), b->data(), rank, first, count, own.number, scaling});
        call.text += described(", rank %d for rows %d of ", rank, count) + own.name;
        for (int64_t m = first; m < first + count; ++m) {
            std::vector<double> exact(static_cast<size_t>(n)), magnitude(static_cast<size_t>(n));
            for (int64_t j = 0; j < rank; ++j) {
                double t = 0, size = 0;
                for (int64_t i = 0; i < k; ++i) {
                    const double product =
                        to_double(x.data(), type.element, m * k + i) * to_double(a->data(), own.element, j * k + i);
                    t += product, size += std::fabs(product);
                }
                for (int64_t i = 0; i < n; ++i) {
                    const double factor = double(scaling) * to_double(b->data(), own.element, i * rank + j);
                    exact[size_t(i)] += factor * t, magnitude[size_t(i)] += std::fabs(factor) * size;
                }
            }
            for (int64_t i = 0; i < n; ++i) {
                // The sum's rounding, and the rounding of the product that came before it.
                const size_t at = size_t(m * n + i);
                const double sums = double(k + rank + 2) * 0x1p-23 * magnitude[size_t(i)];
                call.exact[at] += exact[size_t(i)];
                call.allowed[at] += (sums + call.allowed[at]) * type.eps + sums +
                                    type.eps / 2 * std::fabs(call.exact[at]) + type.smallest_normal * type.eps;
            }
        }
    }
    return made;
}

}  // namespace

Call quantize(Random &random) {
    const int64_t format = random.below(kFormats), block = block_size(random), bits = format == kInt8 ? 8 : 4;
    const int64_t count = random.size(random.one_in(20) ? 18 : 13);
    const Type &type = kTypes[random.below(3)];
    const Values values = any_values(random);
    const Buffer w = floats(random, type, count, values, 0x1p-6f);
    Call call;
    call.text = described("quantize: count %d, format %d, block %d, values %d, ", count, format, block, int(values));
    call.text += type.name;
    call.outputs = {{packed_size(count, bits), Element::kByte}, {4 * ceil_div(count, block), Element::kFloat32}};
    call.run = [=](int threads, void *const *out) {
        hb_quantize(threads, w->data(), type.number, count, format, block, static_cast<uint8_t *>(out[0]),
                    static_cast<float *>(out[1]));
        return 0;
    };
    return call;
}

Call quantize_scales(Random &random) {
    const int64_t count = random.size(13), bits = random.among({8, 6, 4});
    const Values values = any_values(random);
    const Buffer centred = floats(random, kTypes[0], count, values, 0x1p-7f);
    Call call;
    call.text = described("quantize_scales: count %d, bits %d, values %d", count, bits, int(values));
    call.outputs = {{packed_size(count, bits), Element::kByte},
                    {4 * ceil_div(count, kScaleBlock), Element::kFloat32}};
    call.run = [=](int threads, void *const *out) {
        hb_quantize_scales(threads, centred->data<float>(), count, bits, static_cast<uint8_t *>(out[0]),
                           static_cast<float *>(out[1]));
        return 0;
    };
    return call;
}

Call dequantize(Random &random) {
    const int64_t width = random.size(random.one_in(20) ? 16 : 10), height = random.size(width < 512 ? 7 : 3);
    const bool part = random.one_in(2);
    const int64_t row = random.below(height), rows = random.between(1, height - row);
    const int64_t column = part ? random.below(width) : 0, columns = part ? random.between(1, width - column) : width;
    const Type &type = kTypes[random.below(3)];
    // As ops.py's panels do: the weight has `height` rows, of which some are asked for.
    const Weight w = decoded_weight(random, width * height);
    Call call;
    call.text = described("dequantize: width %d, row %d, rows %d, column %d, columns %d, ", width, row, rows, column,
                          columns) +
                type.name + ", " + w.text;
    call.outputs = {{rows * columns * type.size, type.element}};
    call.run = [=](int threads, void *const *out) {
        hb_dequantize(threads, &w.fields, width, row, rows, column, columns, type.number, out[0]);
        return 0;
    };
    return call;
}

Call dequantize_rows(Random &random) {
    const int64_t width = random.size(10), height = random.size(7), count = random.size(8);
    const Type &type = kTypes[random.below(3)];
    const Buffer index = buffer(random, 8 * count);
    int64_t last = 0;
    for (int64_t i = 0; i < count; ++i) last = std::max(last, index->data<int64_t>()[i] = random.below(height));
    const Weight w = decoded_weight(random, (last + 1) * width);  // ops.py promises no row beyond the largest index
    Call call;
    call.text = described("dequantize_rows: width %d, count %d of %d, ", width, count, last + 1) + type.name + ", " +
                w.text;
    call.outputs = {{count * width * type.size, type.element}};
    call.run = [=](int threads, void *const *out) {
        hb_dequantize_rows(threads, &w.fields, width, index->data<int64_t>(), count, type.number, out[0]);
        return 0;
    };
    return call;
}

Call product(Random &random, bool backward) {
    const int64_t block = block_size(random), unit = std::max<int64_t>(64, block);
    const bool wide = random.one_in(30);  // more scales in a row than are decoded at once
    const int64_t k = wide ? ceil_div(300 * 32, unit) * unit : unit * random.size(block > 256 ? 1 : 3);
    const int64_t most = std::max<int64_t>(1, (1 << 21) / k);  // n * rows, so that the exact product stays cheap
    const int64_t n = random.between(1, std::min<int64_t>(most, random.one_in(4) ? 300 : 70));
    const int64_t rows = std::min(random.size(random.one_in(10) ? 9 : 6), std::max<int64_t>(1, most / n));
    const Type &type = kTypes[random.below(3)];
    const Weight w = weight(random, random.below(kInt8), block, 0, n * k, true);
    const int64_t length = backward ? n : k, outputs = backward ? k : n;
    const Buffer x = floats(random, type, rows * length, random.one_in(8) ? Values::kZero : Values::kSmooth, 1);
    const Buffer bias = backward || random.one_in(2) ? nullptr : floats(random, type, n, Values::kSmooth, 1);
    Call call;
    call.text = described(backward ? "linear_grad_input: n %d, k %d, rows %d, " : "linear: n %d, k %d, rows %d, ", n, k,
                          rows) +
                type.name + (bias ? ", bias, " : ", ") + w.text;
    call.outputs = {{rows * outputs * type.size, type.element}};
    std::vector<float> weights(size_t(n * k));
    hb_set_isa(HB_GENERIC);
    hb_dequantize(1, &w.fields, k, 0, n, 0, k, HB_FLOAT32, weights.data());
    expect(call, type, x->data(), bias.get(), rows, length, outputs, weights.data(), backward ? 1 : k, backward ? k : 1);
    call.run = [=](int threads, void *const *out) {
        return backward ? hb_linear_grad_input(threads, &w.fields, n, k, x->data(), rows, type.number, out[0])
                        : hb_linear(threads, &w.fields, n, k, x->data(), rows, type.number,
                                    bias ? bias->data() : nullptr, out[0]);
    };
    return call;
}

Call linear_lora(Random &random) {
    const int64_t block = block_size(random), unit = std::max<int64_t>(64, block);
    const int64_t k = unit * random.size(block > 256 ? 1 : 3), n = random.between(1, random.one_in(4) ? 150 : 70);
    const int64_t rows = random.one_in(4) ? random.between(1, HB_FEW_ROWS) : random.between(1, 4);
    const Type &type = kTypes[random.below(3)];
    const Weight w = weight(random, random.below(kInt8), block, 0, n * k, true);
    const Buffer x = floats(random, type, rows * k, Values::kSmooth, 1);
    const Buffer bias = random.one_in(2) ? nullptr : floats(random, type, n, Values::kSmooth, 1);
    Call call;
    call.text = described("linear_lora: n %d, k %d, rows %d, ", n, k, rows) + type.name + (bias ? ", bias, " : ", ") +
                w.text;
    call.outputs = {{rows * n * type.size, type.element}};
    std::vector<float> weights(size_t(n * k));
    hb_set_isa(HB_GENERIC);
    hb_dequantize(1, &w.fields, k, 0, n, 0, k, HB_FLOAT32, weights.data());
    expect(call, type, x->data(), bias.get(), rows, k, n, weights.data(), k, 1);
    std::vector<Buffer> keep;
    const std::vector<hb_lora> made = adapters(random, call, keep, type, *x, n, k, rows);
    call.run = [=](int threads, void *const *out) {
        (void)keep;
        return hb_linear_lora(threads, &w.fields, n, k, x->data(), rows, type.number, bias ? bias->data() : nullptr,
                              made.data(), int64_t(made.size()), out[0]);
    };
    return call;
}

Call grouped_linear(Random &random, bool backward) {
    const int64_t block = block_size(random), unit = std::max<int64_t>(64, block);
    const int64_t k = unit * random.size(block > 256 ? 0 : 2), n = random.between(1, 70);
    const int64_t experts = random.between(1, 6), most = random.one_in(4) ? 3 : int64_t(1) << 62;
    const int64_t length = backward ? n : k, outputs = backward ? k : n;
    const Type &type = kTypes[random.below(3)];
    const Buffer ends = buffer(random, 4 * experts);
    int64_t rows = 0;
    for (int64_t e = 0; e < experts; ++e) {
        rows += random.one_in(3) ? 0 : random.size(random.one_in(6) ? 6 : 3);
        ends->data<int32_t>()[e] = int32_t(rows);
    }
    rows += random.one_in(2) ? 1 : random.below(3);
    if (rows == 0) rows = 1;
    const Weight w = weight(random, random.below(kInt8), block, 0, experts * n * k, true);
    const Buffer x = floats(random, type, rows * length, Values::kSmooth, 1);
    Call call;
    call.text = described("grouped_linear: backward %d, experts %d, n %d, k %d, rows %d, most %d, ", backward, experts, n,
                          k, rows, std::min<int64_t>(most, 1000)) +
                type.name + ", " + w.text;
    call.outputs = {{rows * outputs * type.size, type.element}};
    std::vector<float> weights(size_t(experts * n * k));
    hb_set_isa(HB_GENERIC);
    hb_dequantize(1, &w.fields, k, 0, experts * n, 0, k, HB_FLOAT32, weights.data());
    std::vector<char> computed;  // of each row
    for (int64_t e = 0; e < experts; ++e) {
        const int64_t first = int64_t(computed.size()), some = ends->data<int32_t>()[e] - first;
        computed.resize(size_t(first + some), char(some <= most));
        if (some <= most) {
            expect(call, type, x->data<char>() + first * length * type.size, nullptr, some, length, outputs,
                   weights.data() + e * n * k, backward ? 1 : k, backward ? k : 1);
        } else {
            call.exact.resize(size_t((first + some) * outputs)), call.allowed.resize(call.exact.size());
        }
    }
    computed.resize(size_t(rows));
    call.exact.resize(size_t(rows * outputs)), call.allowed.resize(call.exact.size());
    call.run = [=](int threads, void *const *out) {
        const auto op = backward ? hb_grouped_linear_grad_input : hb_grouped_linear;
        const int failed = op(threads, &w.fields, experts, n, k, x->data(), ends->data<int32_t>(), most, type.number, out[0]);
        const int64_t bytes = outputs * type.size;
        for (int64_t row = 0; row < rows; ++row) {
            uint8_t *const result = static_cast<uint8_t *>(out[0]) + row * bytes;
            if (computed[size_t(row)]) continue;
            for (int64_t i = 0; i < bytes; ++i) {
                if (result[i] != 0xff) return 1;  // what it has to leave alone
            }
            std::memset(result, 0, size_t(bytes));
        }
        return failed;
    };
    return call;
}
