// budget: every op has a function that makes up a call of it, and they stand side by side
#include "calls.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "guarded.h"
#include "halfbyte.h"

namespace {

using Buffer = std::shared_ptr<Guarded>;

constexpr int64_t kScaleBlock = 256;
constexpr int kFormats = 5, kInt8 = 4;

struct Type {  // an element type and what rounding to it costs (torch.finfo)
    hb_dtype number;
    Element element;
    int64_t size;
    double eps, smallest_normal;
    const char *name;
};
constexpr Type kTypes[] = {{HB_FLOAT32, Element::kFloat32, 4, 0x1p-23, 0x1p-126, "float32"},
                           {HB_BFLOAT16, Element::kBfloat16, 2, 0x1p-7, 0x1p-126, "bfloat16"},
                           {HB_FLOAT16, Element::kFloat16, 2, 0x1p-10, 0x1p-14, "float16"}};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// formats.packing.packed_size
int64_t packed_size(int64_t count, int64_t bits) {
    return bits == 6 ? ceil_div(count, 4) * 3 : bits == 4 ? ceil_div(count, 2) : count;
}

Buffer buffer(Random &random, int64_t bytes) { return std::make_shared<Guarded>(bytes, !random.one_in(4)); }

Buffer random_bytes(Random &random, int64_t bytes) {
    const Buffer made = buffer(random, bytes);
    for (int64_t i = 0; i < bytes; ++i) made->data<uint8_t>()[i] = uint8_t(random.bits());
    return made;
}

// Which values a buffer of floats holds. kTies has few values, on and beside thresholds of the formats; kHalfway has
// scales that, multiplied by a value of 1, lie where 16-bit rounding decides. Factors are powers of two, to keep both.
enum class Values { kSmooth, kTies, kHalfway, kConstant, kZero, kRare, kAny };

float value(Random &random, Values values) {
    switch (values) {
        case Values::kSmooth: return random.smooth();
        case Values::kTies: return float(random.between(-32, 32)) / 32;
        case Values::kHalfway: return random.halfway();
        case Values::kConstant: return -0.75f;
        case Values::kZero: return random.one_in(2) ? 0.0f : -0.0f;
        case Values::kRare: return random.one_in(50) ? random.any_float() : random.smooth();
        default: return random.any_float();
    }
}

Values any_values(Random &random) { return Values(random.below(7)); }

void put(Random &random, void *data, const Type &type, int64_t at, float x) {
    if (type.number == HB_FLOAT32) {
        static_cast<float *>(data)[at] = x;
        return;
    }
    uint32_t u;
    std::memcpy(&u, &x, 4);
    uint16_t &word = static_cast<uint16_t *>(data)[at];
    if (type.number == HB_BFLOAT16) {
        word = uint16_t(u >> 16);
        return;
    }
    const int exponent = int(u >> 23 & 255) - 127 + 15;  // truncation: any float16 near x will do
    const uint16_t sign = uint16_t(u >> 16 & 0x8000), mantissa = uint16_t(u >> 13 & 0x3ff);
    word = uint16_t(sign | (exponent > 30   ? 0x7c00 | (random.one_in(2) ? mantissa : 0)
                            : exponent <= 0 ? (u & 0x7fffffff ? mantissa : 0)
                                            : exponent << 10 | mantissa));
}

Buffer floats(Random &random, const Type &type, int64_t count, Values values, float factor) {
    const Buffer made = buffer(random, count * type.size);
    for (int64_t i = 0; i < count; ++i) put(random, made->data(), type, i, value(random, values) * factor);
    return made;
}

// A packed weight of `count` elements and its buffers.
struct Weight {
    hb_weight fields = {};
    std::vector<Buffer> buffers;
    std::string text;
};

// `finite`: the scales are of the size that scales have. Otherwise they may be any float.
Weight weight(Random &random, int64_t format, int64_t block_size, int64_t start, int64_t count, bool finite) {
    Weight made;
    hb_weight &w = made.fields;
    const auto keep = [&](Buffer b) { return made.buffers.push_back(b), b->data(); };
    const Type &single = kTypes[0];
    w.format = format, w.block_size = block_size, w.start = start;
    w.scale_bits = random.among({0, 8, 6, 4});
    w.scale_start = w.scale_bits && random.one_in(2) ? random.below(600) : 0;
    const int64_t total = start + count, blocks = ceil_div(total, block_size), last = w.scale_start + blocks;
    w.codes = static_cast<uint8_t *>(keep(random_bytes(random, packed_size(total, format == kInt8 ? 8 : 4))));
    const Values values = finite ? Values::kSmooth : any_values(random);
    if (w.scale_bits == 0) {
        w.scales = keep(floats(random, single, blocks, values, 0x1p-4f));
    } else {
        w.scales = keep(random_bytes(random, packed_size(last, w.scale_bits)));
        const int64_t second = ceil_div(last, kScaleBlock);
        w.scale_absmax = static_cast<float *>(keep(floats(random, single, second, values, 0x1p-4f)));
        w.scale_offset = static_cast<float *>(keep(floats(random, single, 1, values, 0x1p-4f)));
    }
    char text[200];
    std::snprintf(text, sizeof text, "format %d, block %d, start %d, scale_bits %d, scale_start %d", int(format),
                  int(block_size), int(start), int(w.scale_bits), int(w.scale_start));
    made.text = text;
    return made;
}

template <class... Numbers>
std::string described(const char *format, Numbers... numbers) {
    char text[200];
    std::snprintf(text, sizeof text, format, int(numbers)...);
    return text;
}

int64_t block_size(Random &random) { return int64_t(32) << (random.one_in(2) ? random.below(3) : random.below(8)); }

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

// A weight of which a part is decoded: rows that are not whole blocks, and starts within a block, included.
Weight decoded_weight(Random &random, int64_t count) {
    const int64_t block = block_size(random);
    const int64_t start = random.one_in(2) ? 0 : random.below(random.one_in(3) ? 3 * block : block);
    return weight(random, random.below(kFormats), block, start, count, false);
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

// The exact product in float64 and its bound, as tests/kernels/test_cpu.py derives it: a weight may be rounded once to
// the dtype, a float32 sum of `length` terms errs by at most `length` float32 eps of the sum of magnitudes, and the
// result is rounded once; below the normal range a rounding errs by half the spacing of subnormals instead.
// Factor i of the sum lies at x[m][i] and at weights[first(j) + i * step].
void expect(Call &call, const Type &type, const Guarded &x, const Guarded *bias, int64_t rows, int64_t length,
            int64_t outputs, const std::vector<float> &weights, int64_t first_step, int64_t step) {
    const double half = type.eps / 2, floor = std::max(type.smallest_normal * half, 0x1p-126);
    std::vector<double> factors(static_cast<size_t>(length));
    for (int64_t m = 0; m < rows; ++m) {
        double total = 0;
        for (int64_t i = 0; i < length; ++i) {
            total += std::fabs(factors[size_t(i)] = to_double(x.data(), type.element, m * length + i));
        }
        for (int64_t j = 0; j < outputs; ++j) {
            double exact = bias ? to_double(bias->data(), type.element, j) : 0, magnitude = 0;
            const double of_bias = type.eps * std::fabs(exact);
            for (int64_t i = 0; i < length; ++i) {
                const double product = factors[size_t(i)] * double(weights[size_t(j * first_step + i * step)]);
                exact += product, magnitude += std::fabs(product);
            }
            call.exact.push_back(exact);
            call.allowed.push_back((half + double(length) * 0x1p-23) * magnitude * (1 + type.eps) + half * magnitude +
                                   floor * (total + 1) + of_bias);
        }
    }
}

// linear, or linear_grad_input where `backward`.
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
    expect(call, type, *x, bias.get(), rows, length, outputs, weights, backward ? 1 : k, backward ? k : 1);
    call.run = [=](int threads, void *const *out) {
        return backward ? hb_linear_grad_input(threads, &w.fields, n, k, x->data(), rows, type.number, out[0])
                        : hb_linear(threads, &w.fields, n, k, x->data(), rows, type.number,
                                    bias ? bias->data() : nullptr, out[0]);
    };
    return call;
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
    expect(call, type, *x, bias.get(), rows, k, n, weights, k, 1);
    std::vector<Buffer> keep;
    const std::vector<hb_lora> made = adapters(random, call, keep, type, *x, n, k, rows);
    call.run = [=](int threads, void *const *out) {
        (void)keep;
        return hb_linear_lora(threads, &w.fields, n, k, x->data(), rows, type.number, bias ? bias->data() : nullptr,
                              made.data(), int64_t(made.size()), out[0]);
    };
    return call;
}

constexpr int64_t kStateBlock[] = {1, 256, 128};  // elements that share a scale, by kind of optimizer state

Buffer positives(Random &random, int64_t count) {
    const Buffer made = buffer(random, 4 * count);
    for (int64_t i = 0; i < count; ++i) {
        made->data<float>()[i] = random.one_in(8) ? 0.0f : std::fabs(random.smooth());
    }
    return made;
}

// One AdamW step of a tensor, all of whose changed buffers are outputs. Its numbers are finite: what comes of others
// is nobody's business, but it must stay inside the buffers, so then the results are wiped before they are compared.
Call adamw(Random &random) {
    const int kind = int(random.below(3));
    const bool matrix = kind == HB_STATE_4BIT && random.one_in(2), finite = !random.one_in(8);
    const int64_t columns = matrix ? random.size(9) : 0;
    const int64_t count = matrix ? columns * random.size(6) : random.size(random.one_in(10) ? 15 : 11);
    const Type &type = kTypes[random.below(2)], &grad_type = kTypes[random.below(2)];
    const bool master = type.number == HB_BFLOAT16 && random.one_in(2);
    const Values values = finite ? Values(random.below(5)) : Values::kAny;
    const int64_t blocks = ceil_div(count, kStateBlock[kind]), codes = packed_size(count, 8 / std::max(kind, 1));
    const Buffer grad = floats(random, grad_type, count, values, 0x1p-5f);
    std::vector<Buffer> begin = {floats(random, type, count, Values::kSmooth, 1)};
    Call call;
    call.text = described("adamw: state %d, count %d, columns %d, master %d, values %d, ", kind, count, columns, master,
                          int(values));
    call.text += std::string(type.name) + ", gradient " + grad_type.name;
    call.outputs = {{count * type.size, type.element}};
    const auto add = [&](Buffer buffer, Element element) {
        call.outputs.push_back({int64_t(buffer->size()), element});
        begin.push_back(buffer);
    };
    if (kind == HB_STATE_FLOAT32) {
        add(floats(random, kTypes[0], count, Values::kSmooth, 1), Element::kFloat32);
        add(positives(random, count), Element::kFloat32);
    } else {
        for (int i = 0; i < 2; ++i) add(random_bytes(random, codes), Element::kByte);
        add(positives(random, blocks), Element::kFloat32);
        add(positives(random, matrix ? count / columns : blocks), Element::kFloat32);
        if (matrix) add(positives(random, columns), Element::kFloat32);
    }
    if (master) add(floats(random, kTypes[0], count, Values::kSmooth, 1), Element::kFloat32);
    hb_adamw_tensor t = {};
    t.count = count, t.columns = columns, t.first = 256 * random.below(1000);
    t.key[0] = uint32_t(random.bits()), t.key[1] = uint32_t(random.bits());
    t.param_dtype = type.number, t.grad_dtype = grad_type.number, t.state = kind;
    const float beta1 = float(random.below(100)) / 100, beta2 = float(random.below(1000)) / 1000;
    const float correction = random.one_in(2) ? 1.0f : 0.0625f, decay = 1 - float(random.below(10)) / 1024;
    const hb_adamw_options o = {random.one_in(2) ? 1.0f : 0.3f, beta1, 1 - beta1, beta2, 1 - beta2, 0x1p-20f,
                                correction, 1 / correction, -0x1p-8f, decay};
    call.run = [=](int threads, void *const *out) {
        for (size_t i = 0; i < begin.size(); ++i) std::memcpy(out[i], begin[i]->data(), begin[i]->size());
        hb_adamw_tensor now = t;
        now.grad = grad->data();
        size_t next = 0;
        const auto take = [&] { return out[next++]; };
        now.param = take(), now.state1 = take(), now.state2 = take();
        if (kind != HB_STATE_FLOAT32) {
            now.scale1 = static_cast<float *>(take()), now.scale2 = static_cast<float *>(take());
            if (columns) now.scale2_columns = static_cast<float *>(take());
        }
        if (master) now.master = static_cast<float *>(take());
        const int failed = hb_adamw(threads, &now, 1, &o);
        for (size_t i = 0; i < begin.size() && !finite; ++i) std::memset(out[i], 0, begin[i]->size());
        return failed;
    };
    return call;
}

// The sums of squares of up to three gradients.
Call adamw_norms(Random &random) {
    const Type &type = kTypes[random.below(2)];
    const Values values = any_values(random);
    std::vector<Buffer> grads;
    std::vector<hb_adamw_tensor> tensors(size_t(random.between(1, 3)));
    for (hb_adamw_tensor &t : tensors) {
        t = {};
        t.count = random.size(14), t.grad_dtype = type.number;
        grads.push_back(floats(random, type, t.count, values, 1));
    }
    Call call;
    call.text = described("adamw_norms: tensors %d, first count %d, values %d, ", tensors.size(), tensors[0].count,
                          int(values));
    call.text += type.name;
    call.outputs = {{int64_t(8 * tensors.size()), Element::kByte}};
    call.run = [=](int threads, void *const *out) {
        std::vector<hb_adamw_tensor> now = tensors;
        std::vector<double> sums(now.size());
        for (size_t i = 0; i < now.size(); ++i) now[i].grad = grads[i]->data();
        const int failed = hb_adamw_norms(threads, now.data(), int64_t(now.size()), sums.data());
        for (double &sum : sums) sum = std::isnan(sum) ? 0 : sum;  // a NaN has many bits
        std::memcpy(out[0], sums.data(), 8 * sums.size());
        return failed;
    };
    return call;
}

Call swiglu(Random &random) {
    const Type &type = kTypes[random.below(3)];
    const int64_t count = random.size(13);
    const Values values = any_values(random);
    const Buffer gate = floats(random, type, count, values, 0x1p3f), up = floats(random, type, count, values, 1);
    const Buffer grad = random.one_in(2) ? nullptr : floats(random, type, count, values, 1);
    Call call;
    call.text = described("swiglu: count %d, backward %d, values %d, ", count, !!grad, int(values)) + type.name;
    call.outputs.assign(grad ? 2 : 1, {count * type.size, type.element});
    call.run = [=](int threads, void *const *out) {
        if (grad) {
            hb_swiglu_grad(threads, grad->data(), gate->data(), up->data(), type.number, count, out[0], out[1]);
        } else {
            hb_swiglu(threads, gate->data(), up->data(), type.number, count, out[0]);
        }
        return 0;
    };
    return call;
}

Call rotary(Random &random) {
    const Type &type = kTypes[random.below(3)];
    const int64_t angles = random.size(5), tokens = angles * random.size(2), heads = random.size(3);
    const int64_t dim = 2 * random.size(6), inverse = random.below(2);
    const Values values = any_values(random);
    const Buffer x = floats(random, type, tokens * heads * dim, values, 1);
    const Buffer cosine = floats(random, type, angles * dim, Values::kSmooth, 1);
    const Buffer sine = floats(random, type, angles * dim, Values::kSmooth, 1);
    Call call;
    call.text = described("rotary: tokens %d, angles %d, heads %d, dim %d, ", tokens, angles, heads, dim) + type.name;
    call.outputs = {{tokens * heads * dim * type.size, type.element}};
    call.run = [=](int threads, void *const *out) {
        hb_rotary(threads, x->data(), cosine->data(), sine->data(), type.number, tokens, angles, heads, dim,
                  int(inverse), out[0]);
        return 0;
    };
    return call;
}

// A float32 sum of n terms of one sign errs by at most n float32 eps of itself, its root by half of that.
Call rms_norm(Random &random) {
    const Type &type = kTypes[random.below(3)];
    const int64_t rows = random.size(4), n = random.size(10);
    constexpr float eps = 0x1p-17f;
    const Buffer x = floats(random, type, rows * n, Values::kSmooth, 1);
    const Buffer weight = floats(random, type, n, Values::kSmooth, 1);
    Call call;
    call.text = described("rms_norm: rows %d, n %d, ", rows, n) + type.name;
    call.outputs = {{rows * n * type.size, type.element}};
    for (int64_t row = 0; row < rows; ++row) {
        double sum = 0;
        for (int64_t i = 0; i < n; ++i) sum += std::pow(to_double(x->data(), type.element, row * n + i), 2);
        for (int64_t i = 0; i < n; ++i) {
            const double exact = to_double(x->data(), type.element, row * n + i) / std::sqrt(sum / double(n) + eps) *
                                 to_double(weight->data(), type.element, i);
            call.exact.push_back(exact);
            // Three more float32 roundings (rstd, x rstd, times the weight), and one to the dtype.
            call.allowed.push_back(std::fabs(exact) * (double(n + 2) * 0x1p-23 + type.eps / 2) +
                                   type.eps / 2 * type.smallest_normal);
        }
    }
    call.run = [=](int threads, void *const *out) {
        const Guarded rstd(4 * rows, true), gradient(rows * n * type.size, true);
        hb_rms_norm(threads, x->data(), weight->data(), type.number, rows, n, eps, out[0], rstd.data<float>());
        hb_rms_norm_grad(threads, x->data(), x->data(), weight->data(), rstd.data<float>(), type.number, rows, n,
                         gradient.data());
        return int(!rstd.intact() || !gradient.intact());
    };
    return call;
}

// As above for the sum of exponentials, whose logarithm errs absolutely by what the sum errs relatively: by its length,
// 2 for an exponential, and half the size of its argument, which is at most twice the largest logit. The loss itself, at
// most twice the largest logit and log(vocabulary) < 8, is rounded once.
Call cross_entropy(Random &random) {
    const Type &type = kTypes[random.below(3)];
    const int64_t rows = random.size(4), vocabulary = random.size(11), gradient = random.below(2);
    const Buffer logits = floats(random, type, rows * vocabulary, Values::kSmooth, 0x1p3f);
    const Buffer labels = buffer(random, 8 * rows);
    Call call;
    call.text = described("cross_entropy: rows %d, size %d, gradient %d, ", rows, vocabulary, gradient) + type.name;
    call.outputs = {{4 * rows, Element::kFloat32}};
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t label = labels->data<int64_t>()[row] = random.below(vocabulary);
        double sum = 0, largest = 0;
        for (int64_t i = 0; i < vocabulary; ++i) {
            const double logit = to_double(logits->data(), type.element, row * vocabulary + i);
            sum += std::exp(logit), largest = std::max(largest, std::fabs(logit));
        }
        call.exact.push_back(std::log(sum) - to_double(logits->data(), type.element, row * vocabulary + label));
        call.allowed.push_back((double(vocabulary) + 2 + 4 + 2 * largest) * 0x1p-23);
    }
    call.run = [=](int threads, void *const *out) {
        const Guarded copy(int64_t(logits->size()), true);
        std::memcpy(copy.data(), logits->data(), logits->size());
        hb_cross_entropy(threads, copy.data(), type.number, rows, vocabulary, labels->data<int64_t>(), int(gradient),
                         static_cast<float *>(out[0]));
        return int(!copy.intact());
    };
    return call;
}

}  // namespace

double to_double(const void *data, Element element, int64_t at) {
    if (element == Element::kFloat32) return double(static_cast<const float *>(data)[at]);
    const uint16_t word = static_cast<const uint16_t *>(data)[at];
    if (element == Element::kBfloat16) {
        const uint32_t u = uint32_t(word) << 16;
        float x;
        std::memcpy(&x, &u, 4);
        return double(x);
    }
    const int exponent = word >> 10 & 31, mantissa = word & 0x3ff;
    const double magnitude = exponent == 31  ? (mantissa ? double(NAN) : double(INFINITY))
                             : exponent == 0 ? std::ldexp(mantissa, -24)
                                             : std::ldexp(1024 + mantissa, exponent - 25);
    return word >> 15 ? -magnitude : magnitude;
}

Call random_call(uint64_t seed) {
    Random random(seed);
    switch (random.below(17)) {
        case 0: return quantize_scales(random);
        case 1: return dequantize_rows(random);
        case 2:
        case 3: return dequantize(random);
        case 4: return product(random, false);
        case 5: return product(random, true);
        case 6:
        case 7:
        case 8: return adamw(random);
        case 9: return adamw_norms(random);
        case 10: return swiglu(random);
        case 11: return rotary(random);
        case 12: return rms_norm(random);
        case 13: return cross_entropy(random);
        case 14: return linear_lora(random);
        default: return quantize(random);
    }
}
