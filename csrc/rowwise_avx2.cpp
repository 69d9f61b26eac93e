#include "kernels.h"

namespace halfbyte {
namespace {
constexpr int kLanes = 8;
}
}  // namespace halfbyte

#include "rowwise.h"

namespace halfbyte {

const Rowwise rowwise_avx2 = {{kRowwiseOf<float>, kRowwiseOf<bfloat16>, kRowwiseOf<float16>}};

}  // namespace halfbyte
