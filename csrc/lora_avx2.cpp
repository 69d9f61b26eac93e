#include "kernels.h"

namespace halfbyte {
namespace {
constexpr int kLanes = 8;
}
}  // namespace halfbyte

#include "lora.h"

namespace halfbyte {

const Lora lora_avx2 = {run_down, run_up};

}  // namespace halfbyte
