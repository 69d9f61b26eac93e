// The second level: scales without their mean -> codes and one absmax for 256 of them.
//
// One scale stands for a block of weights, so this is a sixty-fourth of the work of `quantize` and plain C++ serves
// every instruction set. The arithmetic is that of formats/double_quant.py, step by step, rounding by rounding.
#include <vector>

#include "parallel.h"
#include "scalar.h"

namespace halfbyte {
namespace {

// The nearest entry of the 8-bit table for each of the 65,536 grid points.
std::vector<uint8_t> grid_codes() {
    std::vector<uint8_t> codes(65536);
    for (int code = 0; code < 256; ++code) {
        std::fill(codes.begin() + kScaleGridFirst[code], codes.begin() + kScaleGridFirst[code + 1], uint8_t(code));
    }
    return codes;
}

template <int Entries>
int rank_among(const float (&midpoints)[Entries], float x) {  // torch.bucketize: midpoints below x
    return int(std::lower_bound(midpoints, midpoints + Entries, x) - midpoints);
}

// One second-level block.
void encode(const uint8_t *grid, const float *centred, int64_t count, int64_t bits, uint8_t *codes, float *absmax) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, bits_of(centred[i]) & 0x7fffffff);
    *absmax = float_of(largest);
    const float reciprocal = 1.0f / *absmax;
    uint8_t code[kScaleBlock + 3] = {};  // three more, so that a group of four that is not full is padded with 0
    for (int64_t i = 0; i < count; ++i) {
        // A block of equal scales gives 0 * inf; its codes do not matter, and bitsandbytes writes 0.
        const float product = centred[i] * reciprocal;
        const float x = product != product ? -1.0f : std::min(std::max(product, -1.0f), 1.0f);
        code[i] = bits == 8   ? grid[int(((x + 1.0f) * 0.5f) * 65535.0f + 0.5f)]
                  : bits == 6 ? uint8_t(rank_among(kScaleMidpoints6, x))
                              : uint8_t(rank_among(kScaleMidpoints4, x));
    }
    if (bits == 8) {
        std::memcpy(codes, code, size_t(count));
    } else if (bits == 4) {
        for (int64_t i = 0; i < count; i += 2) *codes++ = uint8_t(code[i] << 4 | code[i + 1]);
    } else {
        for (int64_t i = 0; i < count; i += 4) {
            *codes++ = uint8_t(code[i] << 2 | code[i + 1] >> 4);
            *codes++ = uint8_t(code[i + 1] << 4 | code[i + 2] >> 2);
            *codes++ = uint8_t(code[i + 2] << 6 | code[i + 3]);
        }
    }
}

}  // namespace
}  // namespace halfbyte

void hb_quantize_scales(int threads, const float *centred, int64_t count, int64_t bits, uint8_t *codes,
                        float *absmax) {
    using namespace halfbyte;
    static const std::vector<uint8_t> grid = grid_codes();
    const uint8_t *const nearest = grid.data();
    const int64_t blocks = (count + kScaleBlock - 1) / kScaleBlock;
    parallel_for(threads, blocks, 16, [=](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; ++block) {
            const int64_t at = block * kScaleBlock;
            encode(nearest, centred + at, std::min(kScaleBlock, count - at), bits, codes + at * bits / 8,
                   absmax + block);
        }
    });
}
