// CRC-32 (zlib's, IEEE 802.3) of large buffers, by carry-less multiplication.
//
// A CRC is the remainder of the message, a polynomial over GF(2), divided by P. Multiplying 64 bits that stand T bits
// before the end by (x^T mod P) instead of moving them there leaves the remainder as it is, so the message is folded onto
// its own end: four independent sums of 16 bytes are multiplied and met by the next 64 bytes, and at the end by each
// other. What is left, 16 bytes with the remainder of everything before, goes through the table byte by byte.
// Source: V. Gopal et al., Fast CRC Computation for Generic Polynomials Using PCLMULQDQ, Intel, 2009.
#include <array>
#include <cstring>

#include "halfbyte.h"

#ifdef HB_X86
#include <immintrin.h>
#endif

namespace {

constexpr uint32_t kPolynomial = 0xEDB88320;  // P without x^32; the lowest bit is the highest power

constexpr uint32_t times_x(uint32_t value) { return value >> 1 ^ (value & 1 ? kPolynomial : 0); }

constexpr std::array<uint32_t, 256> make_table() {
    std::array<uint32_t, 256> table{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t value = byte;
        for (int bit = 0; bit < 8; ++bit) value = times_x(value);
        table[byte] = value;
    }
    return table;
}

constexpr std::array<uint32_t, 256> kTable = make_table();

uint32_t by_table(uint32_t state, const uint8_t *data, int64_t nbytes) {
    for (; nbytes > 0; --nbytes) state = state >> 8 ^ kTable[(state ^ *data++) & 0xFF];
    return state;
}

#ifdef HB_X86
// x^power mod P as a factor: the product of two reflected numbers of 64 bits lies one bit too low.
constexpr int64_t factor(int power) {
    uint32_t value = uint32_t{1} << 31;
    for (; power > 0; --power) value = times_x(value);
    return static_cast<int64_t>(value) << 1;
}

// sum x^distance + next: of 16 bytes, those that come first are 64 bits farther from the end.
__attribute__((target("pclmul,sse4.1"))) inline __m128i fold(__m128i sum, __m128i factors, __m128i next) {
    const __m128i first = _mm_clmulepi64_si128(sum, factors, 0x00), second = _mm_clmulepi64_si128(sum, factors, 0x11);
    return _mm_xor_si128(_mm_xor_si128(first, second), next);
}

inline __m128i load(const uint8_t *data) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(data)); }

__attribute__((target("pclmul,sse4.1"))) uint32_t by_folding(uint32_t state, const uint8_t *data, int64_t nbytes) {
    // The lower factor meets the first 8 bytes. A product has 127 bits, whence the 32 either way.
    const __m128i by_64 = _mm_set_epi64x(factor(512 - 32), factor(512 + 32));
    const __m128i by_16 = _mm_set_epi64x(factor(128 - 32), factor(128 + 32));
    __m128i sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = load(data + 16 * i);
    sums[0] = _mm_xor_si128(sums[0], _mm_cvtsi32_si128(static_cast<int>(state)));
    for (data += 64, nbytes -= 64; nbytes >= 64; data += 64, nbytes -= 64) {
        for (int i = 0; i < 4; ++i) sums[i] = fold(sums[i], by_64, load(data + 16 * i));
    }
    __m128i sum = sums[0];
    for (int i = 1; i < 4; ++i) sum = fold(sum, by_16, sums[i]);
    for (; nbytes >= 16; data += 16, nbytes -= 16) sum = fold(sum, by_16, load(data));
    uint8_t rest[16];
    std::memcpy(rest, &sum, sizeof rest);
    return by_table(by_table(0, rest, sizeof rest), data, nbytes);
}
#endif

}  // namespace

int hb_has_crc32(void) {
#ifdef HB_X86
    __builtin_cpu_init();
    return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
#else
    return 0;
#endif
}

uint32_t hb_crc32(uint32_t crc, const void *data, int64_t nbytes) {
    const auto *bytes = static_cast<const uint8_t *>(data);
#ifdef HB_X86
    if (nbytes >= 64 && hb_has_crc32()) return ~by_folding(~crc, bytes, nbytes);
#endif
    return ~by_table(~crc, bytes, nbytes);
}
