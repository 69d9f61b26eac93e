// What an instruction set implements: one function an op, each in <op>_<set>.cpp, gathered by dispatch.cpp.
//
// A kernel works on a range of *independent outputs* (elements, blocks, rows); api.cpp cuts the work into such ranges
// and gives them to threads. No sum ever crosses a range, so results do not depend on how many threads there are.
#pragma once

#include <cstdint>

#include "halfbyte.h"
#include "optimizer.h"

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

// Rows of x that a call takes at once where there are many. 128 rows are 1 MiB at K = 4096 and stay in a second-level
// cache of 2 MiB; with AMX 512 rows take 31 ms in one pass and 19 ms in four, although W is decoded four times.
constexpr int64_t kPassRows = 128;

// grad W. `run` computes out[:, first .. last), where a range is kGradColumns wide (the last one may be less): sums of
// 16 rows take 32 KiB and stay close, and each row of W is read in pieces of 256 bytes.
constexpr int64_t kGradColumns = 512;
struct GradInput {
    int64_t most_rows;  // of a call
    int64_t (*scratch_size)(int64_t rows, int64_t n);
    void (*prepare)(const void *grad, int dtype, int64_t rows, int64_t n, void *scratch);
    bool (*run)(const hb_weight &w, int64_t n, int64_t k, const void *scratch, int64_t rows, int dtype, void *out,
                int64_t first, int64_t last);
};

struct Kernels {
    Dequantize dequantize;
    Quantize quantize;
    Linear linear;
    GradInput grad_input;
    AdamW adamw;
};

// The chosen instruction set's kernels.
const Kernels &kernels();

void dequantize_generic(const hb_weight &, int64_t, int64_t, int, void *);
void quantize_generic(const void *, int, int64_t, int64_t, int64_t, uint8_t *, float *);
extern const GradInput grad_input_generic;
extern const Linear linear_generic;

#ifdef HB_X86
void dequantize_avx2(const hb_weight &, int64_t, int64_t, int, void *);
void quantize_avx2(const void *, int, int64_t, int64_t, int64_t, uint8_t *, float *);
extern const GradInput grad_input_avx2;
extern const Linear linear_avx2;

void dequantize_avx512(const hb_weight &, int64_t, int64_t, int, void *);
void quantize_avx512(const void *, int, int64_t, int64_t, int64_t, uint8_t *, float *);
extern const GradInput grad_input_avx512;
extern const Linear linear_avx512;
extern const Linear linear_avx512bf16;
extern const Linear linear_amx;
extern const GradInput grad_input_amx;
#endif

}  // namespace halfbyte
