#include "kernels.h"

namespace halfbyte {
namespace {
constexpr int kLanes = 8;
}
}  // namespace halfbyte

#include "decoder_ops.h"

namespace halfbyte {

const DecoderOps decoder_avx2 = kDecoderOps;

}  // namespace halfbyte
