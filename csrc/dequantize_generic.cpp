// Decoding in plain C++: value[code] * scale in float32, rounded once to the output's type.
#include "kernels.h"
#include "scalar.h"

namespace halfbyte {
namespace {

template <class T>
void decode(const hb_weight &w, int64_t first, int64_t count, T *out) {
    const Codebook &book = kCodebooks[w.format];
    const bool nibbles = book.bits == 4;
    for_each_segment(w, first, count, out, [&](int64_t from, int64_t to, float scale, T *at) {
        if (nibbles) {
            decode_nibbles(w.codes, book.values, from, to, scale, at);
        } else {
            decode_bytes(w.codes, book.values, from, to, scale, at);
        }
    });
}

}  // namespace

void dequantize_generic(const hb_weight &w, int64_t first, int64_t count, int dtype, void *out) {
    switch (dtype) {
        case HB_FLOAT32: return decode(w, first, count, static_cast<float *>(out));
        case HB_BFLOAT16: return decode(w, first, count, static_cast<bfloat16 *>(out));
        default: return decode(w, first, count, static_cast<float16 *>(out));
    }
}

}  // namespace halfbyte
