// Random values in guarded memory: what the calls are made of.
#pragma once

#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "guarded.h"
#include "halfbyte.h"
#include "random.h"

// What a buffer holds. NaNs of every payload are equal: their bits differ between processors and mean nothing.
enum class Element { kByte, kFloat32, kBfloat16, kFloat16 };

double to_double(const void *data, Element element, int64_t at);

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

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// formats.packing.packed_size
inline int64_t packed_size(int64_t count, int64_t bits) {
    return bits == 6 ? ceil_div(count, 4) * 3 : bits == 4 ? ceil_div(count, 2) : count;
}

Buffer buffer(Random &random, int64_t bytes);
Buffer random_bytes(Random &random, int64_t bytes);

// Which values a buffer of floats holds. kTies has few values, on and beside thresholds of the formats; kHalfway has
// scales that, multiplied by a value of 1, lie where 16-bit rounding decides. Factors are powers of two, to keep both.
enum class Values { kSmooth, kTies, kHalfway, kConstant, kZero, kRare, kAny };

Values any_values(Random &random);
Buffer floats(Random &random, const Type &type, int64_t count, Values values, float factor);
Buffer positives(Random &random, int64_t count);  // float32, every eighth a zero

// A packed weight of `count` elements and its buffers.
struct Weight {
    hb_weight fields = {};
    std::vector<Buffer> buffers;
    std::string text;
};

int64_t block_size(Random &random);

// `finite`: the scales are of the size that scales have. Otherwise they may be any float.
Weight weight(Random &random, int64_t format, int64_t block_size, int64_t start, int64_t count, bool finite);

template <class... Numbers>
std::string described(const char *format, Numbers... numbers) {
    char text[200];
    std::snprintf(text, sizeof text, format, int(numbers)...);
    return text;
}
