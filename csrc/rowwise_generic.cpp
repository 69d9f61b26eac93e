#include "kernels.h"

namespace halfbyte {
namespace {
constexpr int kLanes = 4;
}
}  // namespace halfbyte

#include "rowwise.h"

namespace halfbyte {

const Rowwise rowwise_generic = {{kRowwiseOf<float>, kRowwiseOf<bfloat16>, kRowwiseOf<float16>}};

}  // namespace halfbyte
