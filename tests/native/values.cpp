#include "values.h"

#include <algorithm>
#include <cmath>

namespace {

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

Buffer buffer(Random &random, int64_t bytes) { return std::make_shared<Guarded>(bytes, !random.one_in(4)); }

Buffer random_bytes(Random &random, int64_t bytes) {
    const Buffer made = buffer(random, bytes);
    for (int64_t i = 0; i < bytes; ++i) made->data<uint8_t>()[i] = uint8_t(random.bits());
    return made;
}

Values any_values(Random &random) { return Values(random.below(7)); }

Buffer floats(Random &random, const Type &type, int64_t count, Values values, float factor) {
    const Buffer made = buffer(random, count * type.size);
    for (int64_t i = 0; i < count; ++i) put(random, made->data(), type, i, value(random, values) * factor);
    return made;
}

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

int64_t block_size(Random &random) { return int64_t(32) << (random.one_in(2) ? random.below(3) : random.below(8)); }

Buffer positives(Random &random, int64_t count) {
    const Buffer made = buffer(random, 4 * count);
    for (int64_t i = 0; i < count; ++i) {
        made->data<float>()[i] = random.one_in(8) ? 0.0f : std::fabs(random.smooth());
    }
    return made;
}
