// Moments of 4 bits: nibbles in and out of bytes, and the nearest codes of a map of 16 values. See adamw.h.
#pragma once

#include "scalar.h"

namespace halfbyte {
namespace {

constexpr float kTiny = 1e-38f;  // the least that is divided by

template <class Lanes>
struct FourBits {
    using F = typename Lanes::F;
    using I = typename Lanes::I;
    static constexpr int64_t kWidth = Lanes::width;

    // Codes [count] as bytes from nibbles, the earlier element in the upper one; `at` is even.
    static void unpack(const void *packed, int64_t at, int64_t count, uint8_t *codes) {
        const uint8_t *bytes = static_cast<const uint8_t *>(packed) + at / 2;
        for (int64_t i = 0; i < count / 2; ++i) {
            codes[2 * i] = bytes[i] >> 4;
            codes[2 * i + 1] = bytes[i] & 15;
        }
        if (count % 2) codes[count - 1] = bytes[count / 2] >> 4;
    }

    // `pad` is the code after an odd count.
    static void pack(uint8_t *codes, uint8_t pad, int64_t at, int64_t count, void *packed) {
        uint8_t *bytes = static_cast<uint8_t *>(packed) + at / 2;
        if (count % 2) codes[count] = pad;
        for (int64_t i = 0; i < (count + 1) / 2; ++i) bytes[i] = uint8_t(codes[2 * i] << 4 | codes[2 * i + 1]);
    }

    // x [count, padded] / scale [count, padded] -> nearest codes of a 4-bit map: how many of the 15 thresholds are below,
    // found by halving.
    static void encode(const float *x, const float *scale, const float *thresholds, int64_t count, uint8_t *codes) {
        for (int64_t i = 0; i < count; i += kWidth) {
            const F ratio = Lanes::div(Lanes::load(x + i), Lanes::max(Lanes::load(scale + i), Lanes::set(kTiny)));
            I rank = Lanes::seti(0);
            rank = halve<8>(thresholds, ratio, rank);
            rank = halve<4>(thresholds, ratio, rank);
            rank = halve<2>(thresholds, ratio, rank);
            rank = halve<1>(thresholds, ratio, rank);
            Lanes::store_bytes(codes + i, rank);
        }
    }

    template <int kHalf>
    static I halve(const float *thresholds, F ratio, I rank) {
        const F threshold = Lanes::lookup16(thresholds, Lanes::addi(rank, Lanes::seti(kHalf - 1)));
        return Lanes::template add_if_greater<kHalf>(rank, ratio, threshold);
    }
};

}  // namespace
}  // namespace halfbyte
