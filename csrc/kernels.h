// What an instruction set implements: one function an op, each in <op>_<set>.cpp, gathered by dispatch.cpp.
//
// A kernel works on a range of *independent outputs* (elements, blocks, rows); api.cpp cuts the work into such ranges
// and gives them to threads. No sum ever crosses a range, so results do not depend on how many threads there are.
#pragma once

#include <cstdint>

#include "halfbyte.h"

namespace halfbyte {

using Dequantize = void (*)(const hb_weight &w, int64_t first, int64_t count, int dtype, void *out);
using Quantize = void (*)(const void *w, int dtype, int64_t count, int64_t format, int64_t block_size, uint8_t *codes,
                          float *scales);

// A few-row product. Each kernel wants x in an order of its own: `prepare` writes it to `scratch` (64-byte aligned,
// `scratch_size` bytes) once a call, `run` computes out[:, first .. last) from it and returns false
// when there was no memory.
struct Linear {
    int64_t (*scratch_size)(int64_t rows, int64_t k);
    void (*prepare)(const void *x, int dtype, int64_t rows, int64_t k, void *scratch);
    bool (*run)(const hb_weight &w, int64_t n, int64_t k, const void *scratch, int64_t rows, int dtype,
                const void *bias, void *out, int64_t first, int64_t last);
};

// out[:, first .. last) of grad W, `grad` float [n, rows]. A range is kGradColumns wide (the last one may be less): its
// sums for 16 rows take 32 KiB and stay close, and each row of W is read in pieces of 256 bytes.
constexpr int64_t kGradColumns = 512;
constexpr int64_t kGradRows = 32;  // the most rows of a call
using GradInput = void (*)(const hb_weight &w, int64_t n, int64_t k, const float *grad, int64_t rows, int dtype,
                           void *out, int64_t first, int64_t last);

struct Kernels {
    Dequantize dequantize;
    Quantize quantize;
    Linear linear;
    GradInput grad_input;
};

// The chosen instruction set's kernels.
const Kernels &kernels();

void dequantize_generic(const hb_weight &, int64_t, int64_t, int, void *);
void quantize_generic(const void *, int, int64_t, int64_t, int64_t, uint8_t *, float *);
void grad_input_generic(const hb_weight &, int64_t, int64_t, const float *, int64_t, int, void *, int64_t, int64_t);
extern const Linear linear_generic;

#ifdef HB_X86
void dequantize_avx2(const hb_weight &, int64_t, int64_t, int, void *);
void quantize_avx2(const void *, int, int64_t, int64_t, int64_t, uint8_t *, float *);
void grad_input_avx2(const hb_weight &, int64_t, int64_t, const float *, int64_t, int, void *, int64_t, int64_t);
extern const Linear linear_avx2;

void dequantize_avx512(const hb_weight &, int64_t, int64_t, int, void *);
void quantize_avx512(const void *, int, int64_t, int64_t, int64_t, uint8_t *, float *);
void grad_input_avx512(const hb_weight &, int64_t, int64_t, const float *, int64_t, int, void *, int64_t, int64_t);
extern const Linear linear_avx512;
extern const Linear linear_avx512bf16;
extern const Linear linear_amx;
#endif

}  // namespace halfbyte
