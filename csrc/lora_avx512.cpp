#include "kernels.h"

namespace halfbyte {
namespace {
constexpr int kLanes = 16;
}
}  // namespace halfbyte

#include "lora.h"

namespace halfbyte {

const Lora lora_avx512 = {run_down, run_up};

}  // namespace halfbyte
