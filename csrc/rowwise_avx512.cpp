#include "kernels.h"

namespace halfbyte {
namespace {
constexpr int kLanes = 16;
}
}  // namespace halfbyte

#include "rowwise.h"

namespace halfbyte {

const Rowwise rowwise_avx512 = {{kRowwiseOf<float>, kRowwiseOf<bfloat16>, kRowwiseOf<float16>}};

}  // namespace halfbyte
