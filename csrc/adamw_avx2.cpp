#include <immintrin.h>

#include "adamw.h"

namespace halfbyte {
namespace {

struct Eight {
    static constexpr int64_t width = 8;
    using F = __m256;
    using I = __m256i;

    static F set(float x) { return _mm256_set1_ps(x); }
    static F load(const float *x) { return _mm256_loadu_ps(x); }
    static F load_bf16(const uint16_t *x) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i *>(x));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
    static void store(float *out, F x) { _mm256_storeu_ps(out, x); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F div(F a, F b) { return _mm256_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F sqrt(F a) { return _mm256_sqrt_ps(a); }
    static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static float largest(F a) {
        alignas(32) float lanes[8];
        _mm256_store_ps(lanes, a);
        return *std::max_element(lanes, lanes + 8);
    }
    // A gather keeps the lanes that its mask leaves out, so it waits for whatever its destination held before. GCC's
    // intrinsics leave that to chance where they know the mask, and the step then runs one vector after the other. With
    // a mask that it cannot see through it has to write zeros first, which breaks the chain.
    static I all() {
        I mask = _mm256_set1_epi32(-1);
        __asm__("" : "+x"(mask));
        return mask;
    }
    static F gather(const float *table, I index) {
        return _mm256_mask_i32gather_ps(_mm256_setzero_ps(), table, index, _mm256_castsi256_ps(all()), 4);
    }

    // Of a table of 16: both halves by the lower three bits of the index, and one of the two by the fourth.
    static F lookup16(const float *table, I index) {
        const F lower = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
        const F upper = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
        return _mm256_blendv_ps(lower, upper, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
    }

    static I seti(int32_t x) { return _mm256_set1_epi32(x); }
    static I load_bytes(const uint8_t *x) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(x)));
    }
    static void store_bytes(uint8_t *out, I x) {
        const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i *>(out), _mm_packus_epi16(words, words));
    }
    static I as_integers(F a) { return _mm256_castps_si256(a); }
    static I ordered(F a) {
        const I bits = _mm256_castps_si256(a), sign = _mm256_srai_epi32(bits, 31);
        return _mm256_xor_si256(bits, _mm256_srli_epi32(sign, 1));
    }
    static I gather(const int32_t *table, I index) {
        return _mm256_mask_i32gather_epi32(_mm256_setzero_si256(), table, index, all(), 4);
    }
    static I addi(I a, I b) { return _mm256_add_epi32(a, b); }
    template <int by>
    static I shift_right(I a) {
        return _mm256_srli_epi32(a, by);
    }
    // A comparison that holds is -1 in every lane.
    template <int by>
    static I add_if_greater(I sum, F a, F b) {
        const I greater = _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ));
        return _mm256_add_epi32(sum, _mm256_and_si256(greater, seti(by)));
    }
    static bool any_greater(F a, F b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }
};

}  // namespace

const AdamW adamw_avx2 = AdamWStep<Eight>::table();

}  // namespace halfbyte
