#include "kernels.h"

namespace halfbyte {
namespace {
constexpr int kLanes = 4;
}
}  // namespace halfbyte

#include "lora.h"

namespace halfbyte {

const Lora lora_generic = {run_down, run_up};

}  // namespace halfbyte
