#include <immintrin.h>

#include "adamw.h"

namespace halfbyte {
namespace {

struct Sixteen {
    static constexpr int64_t width = 16;
    using F = __m512;
    using I = __m512i;

    static F set(float x) { return _mm512_set1_ps(x); }
    static F load(const float *x) { return _mm512_loadu_ps(x); }
    static F load_bf16(const uint16_t *x) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(x));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    static void store(float *out, F x) { _mm512_storeu_ps(out, x); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F sqrt(F a) { return _mm512_sqrt_ps(a); }
    static F abs(F a) { return _mm512_abs_ps(a); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static float largest(F a) { return _mm512_reduce_max_ps(a); }
    // A gather keeps the lanes that its mask leaves out, so it waits for whatever its destination held before. GCC's
    // intrinsics leave that to chance where they know the mask, and the step then runs one vector after the other. With
    // a mask that it cannot see through it has to write zeros first, which breaks the chain.
    static __mmask16 all() {
        unsigned mask = 0xffff;
        __asm__("" : "+r"(mask));
        return __mmask16(mask);
    }
    static F gather(const float *table, I index) {
        return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), all(), index, table, 4);
    }

    static F lookup16(const float *table, I index) { return _mm512_permutexvar_ps(index, _mm512_loadu_ps(table)); }

    static I seti(int32_t x) { return _mm512_set1_epi32(x); }
    static I load_bytes(const uint8_t *x) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(x)));
    }
    static void store_bytes(uint8_t *out, I x) {
        _mm_storeu_si128(reinterpret_cast<__m128i *>(out), _mm512_cvtepi32_epi8(x));
    }
    static I as_integers(F a) { return _mm512_castps_si512(a); }
    static I ordered(F a) {
        const I bits = _mm512_castps_si512(a), sign = _mm512_srai_epi32(bits, 31);
        return _mm512_ternarylogic_epi32(bits, sign, _mm512_set1_epi32(0x7fffffff), 0x78);  // bits ^ (sign & mask)
    }
    static I gather(const int32_t *table, I index) {
        return _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), all(), index, table, 4);
    }
    static I addi(I a, I b) { return _mm512_add_epi32(a, b); }
    template <int by>
    static I shift_right(I a) {
        return _mm512_srli_epi32(a, by);
    }
    template <int by>
    static I add_if_greater(I sum, F a, F b) {
        return _mm512_mask_add_epi32(sum, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), sum, _mm512_set1_epi32(by));
    }
    static bool any_greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
};

}  // namespace

const AdamW adamw_avx512 = AdamWStep<Sixteen>::table();

}  // namespace halfbyte
