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
    // The correctly rounded square root without the divider, which is the bottleneck of a step: an estimate and two
    // Newton steps in fused arithmetic (Markstein), 1.5 ns for 16 numbers where the instruction takes 3.4. It equals the
    // instruction for all 2^24 mantissas of two neighbouring exponents (tests/kernels/test_adamw.py), so for all of the
    // range in which nothing overflows or becomes subnormal on the way.
    static F sqrt(F a) {
        const __mmask16 zero = _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_EQ_OQ);
        const __mmask16 inside = _mm512_cmp_ps_mask(a, _mm512_set1_ps(0x1p-100f), _CMP_GE_OQ) &
                                 _mm512_cmp_ps_mask(a, _mm512_set1_ps(0x1p100f), _CMP_LE_OQ);
        if (__builtin_expect(__mmask16(zero | inside) != 0xffff, 0)) return _mm512_sqrt_ps(a);
        const F half = _mm512_set1_ps(0.5f), estimate = _mm512_rsqrt14_ps(a);
        F root = _mm512_mul_ps(a, estimate), slope = _mm512_mul_ps(half, estimate);
        const F error = _mm512_fnmadd_ps(root, slope, half);
        root = _mm512_fmadd_ps(root, error, root);
        slope = _mm512_fmadd_ps(slope, error, slope);
        return _mm512_maskz_mov_ps(inside, _mm512_fmadd_ps(_mm512_fnmadd_ps(root, root, a), slope, root));
    }
    static F abs(F a) { return _mm512_abs_ps(a); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
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
    static F to_floats(I a) { return _mm512_cvtepi32_ps(a); }

    static I seti(int32_t x) { return _mm512_set1_epi32(x); }
    static I load_bytes(const uint8_t *x) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(x)));
    }
    static void store_bytes(uint8_t *out, I x) {
        _mm_storeu_si128(reinterpret_cast<__m128i *>(out), _mm512_cvtepi32_epi8(x));
    }
    static I as_integers(F a) { return _mm512_castps_si512(a); }
    static I gather(const int32_t *table, I index) {
        return _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), all(), index, table, 4);
    }
    static I addi(I a, I b) { return _mm512_add_epi32(a, b); }
    static I subi(I a, I b) { return _mm512_sub_epi32(a, b); }
    static I maxi(I a, I b) { return _mm512_max_epi32(a, b); }
    static I mini(I a, I b) { return _mm512_min_epi32(a, b); }
    static I band(I a, I b) { return _mm512_and_si512(a, b); }
    static I shift_right(I a, int by) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(by)); }
    static I add_if_greater(I sum, I a, I b) {
        return _mm512_mask_add_epi32(sum, _mm512_cmpgt_epi32_mask(a, b), sum, _mm512_set1_epi32(1));
    }
    static I add_if_greater(I sum, F a, F b) {
        return _mm512_mask_add_epi32(sum, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), sum, _mm512_set1_epi32(1));
    }
    static I choose(I which, I where_one, I where_zero) {
        return _mm512_mask_blend_epi32(_mm512_test_epi32_mask(which, which), where_zero, where_one);
    }
};

}  // namespace

const AdamW adamw_avx512 = AdamWStep<Sixteen>::table();

}  // namespace halfbyte
