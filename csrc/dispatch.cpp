// Which instruction set runs: the best that this build and this CPU have, unless Python asks for another.
#include <atomic>
#include <initializer_list>

#include "kernels.h"

#ifdef HB_X86
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef __APPLE__
#include <sys/sysctl.h>
#endif

namespace halfbyte {
namespace {

const Kernels kGeneric = {dequantize_generic, quantize_generic, adamw_generic,     &rowwise_generic,
                          &lora_generic, &decoder_generic,      linear_generic,   grad_input_generic};
#ifdef HB_X86
const Kernels kAvx2 = {dequantize_avx2, quantize_avx2, adamw_avx2,     &rowwise_avx2,
                       &lora_avx2, &decoder_avx2,      linear_avx2,   grad_input_avx2};
const Kernels kAvx512 = {dequantize_avx512, quantize_avx512, adamw_avx512,     &rowwise_avx512,
                         &lora_avx512, &decoder_avx512,      linear_avx512,   grad_input_avx512};
// Only products gain from bf16 instructions; the rest is AVX512's.
const Kernels kAvx512Bf16 = {dequantize_avx512, quantize_avx512,   adamw_avx512,     &rowwise_avx512,
                             &lora_avx512, &decoder_avx512,      linear_avx512bf16, grad_input_avx512};
const Kernels kAmx = {dequantize_avx512, quantize_avx512, adamw_avx512,     &rowwise_avx512,     &lora_avx512, &decoder_avx512,
                      linear_amx,        grad_input_amx,  &linear_gemm_amx, &grad_input_gemm_amx};

// AMX needs the operating system twice: it must save the tiles (XCR0 bits 17 and 18), and Linux lends them only to a
// process that has asked (arch_prctl ARCH_REQ_XCOMP_PERM, state 18).
bool amx_granted() {
#ifdef __linux__
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low >> 17 & 3) == 3 && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return false;
#endif
}
#endif
#ifdef HB_ARM64
const Kernels kNeon = {dequantize_neon, quantize_neon, adamw_generic,  &rowwise_generic,
                       &lora_generic, &decoder_generic,   linear_neon,   grad_input_neon};
const Kernels kNeonBf16 = {dequantize_neon, quantize_neon,   adamw_generic,  &rowwise_generic,
                           &lora_generic, &decoder_generic,   linear_neonbf16, grad_input_neon};

bool has_bf16() {
#if defined(__linux__)
    return getauxval(AT_HWCAP2) >> 14 & 1;  // HWCAP2_BF16
#elif defined(__APPLE__)
    int found = 0;
    size_t size = sizeof found;
    return !sysctlbyname("hw.optional.arm.FEAT_BF16", &found, &size, nullptr, 0) && found;
#else
    return false;
#endif
}
#endif

const Kernels *find(int isa) {
    if (isa == HB_GENERIC) return &kGeneric;
#ifdef HB_X86
    // The compiler's cpuid reader also asks whether the operating system saves the wide registers.
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (isa == HB_AVX2 && avx2) return &kAvx2;
    if (isa == HB_AVX512 && avx512) return &kAvx512;
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    if (isa == HB_AVX512BF16 && bf16) return &kAvx512Bf16;
    if (isa == HB_AMX && bf16 && amx_granted()) return &kAmx;
#endif
#ifdef HB_ARM64
    if (isa == HB_NEON) return &kNeon;  // part of every 64-bit ARM
    if (isa == HB_NEONBF16 && has_bf16()) return &kNeonBf16;
#endif
    return nullptr;
}

std::atomic<const Kernels *> chosen{&kGeneric};

}  // namespace

const Kernels &kernels() { return *chosen.load(std::memory_order_relaxed); }

}  // namespace halfbyte

int hb_abi(void) { return HB_ABI; }

int hb_has_isa(int isa) { return halfbyte::find(isa) != nullptr; }

int hb_best_isa(void) {
    for (const int isa : {HB_AMX, HB_AVX512BF16, HB_AVX512, HB_AVX2, HB_NEONBF16, HB_NEON}) {
        if (hb_has_isa(isa)) return isa;
    }
    return HB_GENERIC;
}

int hb_set_isa(int isa) {
    const halfbyte::Kernels *found = halfbyte::find(isa);
    if (!found) return 1;
    halfbyte::chosen.store(found);
    return 0;
}
