#include "kernels.h"

namespace halfbyte {
namespace {
constexpr int kLanes = 4;
}
}  // namespace halfbyte

#include "decoder_ops.h"

namespace halfbyte {

const DecoderOps decoder_generic = kDecoderOps;

}  // namespace halfbyte
