#include "adamw.h"

namespace halfbyte {
namespace {

struct One {
    static constexpr int64_t width = 1;
    using F = float;
    using I = int32_t;

    static F set(float x) { return x; }
    static F load(const float *x) { return *x; }
    static F load_bf16(const uint16_t *x) { return to_float(bfloat16{*x}); }
    static void store(float *out, F x) { *out = x; }
    static F add(F a, F b) { return a + b; }
    static F sub(F a, F b) { return a - b; }
    static F mul(F a, F b) { return a * b; }
    static F div(F a, F b) { return a / b; }
    static F fma(F a, F b, F c) { return std::fma(a, b, c); }
    static F sqrt(F a) { return std::sqrt(a); }
    static F abs(F a) { return std::fabs(a); }
    static F max(F a, F b) { return a > b ? a : b; }
    static float largest(F a) { return a; }
    static F gather(const float *table, I index) { return table[index]; }
    static F lookup16(const float *table, I index) { return table[index]; }

    static I seti(int32_t x) { return x; }
    static I load_bytes(const uint8_t *x) { return *x; }
    static void store_bytes(uint8_t *out, I x) { *out = uint8_t(x); }
    static I as_integers(F a) { return int32_t(bits_of(a)); }
    static I ordered(F a) { return as_integers(a) < 0 ? as_integers(a) ^ 0x7fffffff : as_integers(a); }
    static I gather(const int32_t *table, I index) { return table[index]; }
    static I addi(I a, I b) { return I(uint32_t(a) + uint32_t(b)); }
    template <int by>
    static I shift_right(I a) {
        return int32_t(uint32_t(a) >> by);
    }
    template <int by>
    static I add_if_greater(I sum, F a, F b) {
        return sum + (a > b ? by : 0);
    }
    static bool any_greater(F a, F b) { return a > b; }
};

}  // namespace

const AdamW adamw_generic = AdamWStep<One>::table();

}  // namespace halfbyte
