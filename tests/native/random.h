// Random numbers that are the same on every machine: integer arithmetic and exact float operations only.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>

class Random {  // splitmix64 (Steele, Lea, Flood 2014)
  public:
    explicit Random(uint64_t seed) : state_(seed) {}

    uint64_t bits() {
        uint64_t z = state_ += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        return z ^ z >> 31;
    }
    int64_t below(int64_t end) { return int64_t(bits() % uint64_t(end)); }
    int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
    bool one_in(int64_t n) { return below(n) == 0; }
    int64_t among(std::initializer_list<int64_t> values) { return values.begin()[below(int64_t(values.size()))]; }

    // 1 to 2**digits, small numbers as likely as large ones.
    int64_t size(int digits) { return between(1, int64_t(1) << below(digits + 1)); }

    // Near a normal distribution, of deviation about 0.6, within [-2, 2]: the sum of four uniforms.
    float smooth() {
        int64_t sum = 0;
        for (int i = 0; i < 4; ++i) sum += below(1 << 20);
        return float(sum - (1 << 21)) * 0x1p-20f;
    }
    // Any float at all, with every eighth a NaN or an infinity and every eighth subnormal or zero.
    float any_float() {
        const uint32_t u = uint32_t(bits()), fraction = one_in(4) ? 0 : u & 0x7fffff, sign = u & 0x80000000;
        const int64_t kind = below(8);
        return from_bits(kind == 0 ? sign | 0x7f800000 | fraction : kind == 1 ? sign | fraction : u);
    }
    // Halfway between two neighbours of bfloat16 or of float16, or one step beside.
    float halfway() {
        const float near = smooth();
        uint32_t u;
        std::memcpy(&u, &near, 4);
        const uint32_t middle = one_in(2) ? 0x8000 : 0x1000, width = 2 * middle - 1;
        return from_bits((u & ~width) + uint32_t(int64_t(middle) + between(-1, 1)));
    }

  private:
    static float from_bits(uint32_t u) {
        float x;
        std::memcpy(&x, &u, 4);
        return x;
    }

    uint64_t state_;
};
