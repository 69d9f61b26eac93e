// Encoding in plain C++: absmax and codes of a block in one pass over the weights.
#include "encode.h"
#include "kernels.h"

namespace halfbyte {
namespace {

template <class T>
void quantize(const T *w, int64_t count, const Codebook &book, int64_t block_size, uint8_t *codes, float *scales) {
    for_each_block(w, count, block_size, book.bits, codes, scales,
                   [&](const T *x, int64_t size, bool whole, uint8_t *out) {
                       return encode_block(book, x, size, whole, out);
                   });
}

}  // namespace

void quantize_generic(const void *w, int dtype, int64_t count, int64_t format, int64_t block_size, uint8_t *codes,
                      float *scales) {
    with_weights(w, dtype, [&](const auto *typed) {
        quantize(typed, count, kCodebooks[format], block_size, codes, scales);
    });
}

}  // namespace halfbyte
