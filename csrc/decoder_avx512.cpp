#include "kernels.h"

namespace halfbyte {
namespace {
constexpr int kLanes = 16;
}
}  // namespace halfbyte

#include "decoder_ops.h"

namespace halfbyte {

const DecoderOps decoder_avx512 = kDecoderOps;

}  // namespace halfbyte
