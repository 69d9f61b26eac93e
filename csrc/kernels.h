// What an instruction set implements: one function an op, each in <op>_<set>.cpp, gathered by dispatch.cpp.
//
// A kernel works on a range of *independent outputs* (elements, blocks, rows); api.cpp cuts the work into such ranges
// and gives them to threads. No sum ever crosses a range, so results do not depend on how many threads there are.
#pragma once

#include <atomic>
#include <cstdint>

#include "halfbyte.h"
#include "optimizer.h"

namespace halfbyte {

using Dequantize = void (*)(const hb_weight &w, int64_t first, int64_t count, int dtype, void *out);
using Quantize = void (*)(const void *w, int dtype, int64_t count, int64_t format, int64_t block_size, uint8_t *codes,
                          float *scales);

// A few-row product. Each kernel wants x in an order of its own, which may depend on the weight's format and blocks and
// on nothing else of it: `prepare` writes it to `scratch` (64-byte aligned,
// `scratch_size` bytes) once a call, `run` computes out[:, first .. last) from it and returns false
// when there was no memory.
struct Linear {
    int64_t (*scratch_size)(const hb_weight &w, int64_t rows, int64_t k);
    void (*prepare)(const hb_weight &w, const void *x, int dtype, int64_t rows, int64_t k, void *scratch);
    bool (*run)(const hb_weight &w, int64_t n, int64_t k, const void *scratch, int64_t rows, int dtype,
                const void *bias, void *out, int64_t first, int64_t last);
};

// Rows of x that a call takes at once where there are many. 128 rows are 1 MiB at K = 4096 and stay in a second-level
// cache of 2 MiB; with AMX 512 rows take 31 ms in one pass and 19 ms in four, although W is decoded four times.
constexpr int64_t kPassRows = 128;

// Rows of W that a thread takes at once in a few-row product: a multiple of every kernel's tile, 128 KiB of codes at
// K = 4096.
constexpr int64_t kLinearRows = 64;

// The branch of a LoRA adapter beside a few-row product; see lora.h. `down` computes columns [first, last) of
// t [rows of the adapter, lora_width(rank)] = scaling x A^T, kLoraRanks of them or up to the last. `up` adds t B^T to
// out[:, first .. last), which it rounds.
constexpr int64_t kFewRows = HB_FEW_ROWS;
constexpr int64_t kLoraRanks = 4;
struct Lora {
    void (*down)(const hb_lora &lora, const void *x, int dtype, int64_t k, float *t, int64_t first, int64_t last);
    void (*up)(const hb_lora &lora, const float *t, int64_t n, int dtype, void *out, int64_t first, int64_t last);
};

// The rank, padded to whole vectors of any instruction set.
constexpr int64_t lora_width(int64_t rank) { return (rank + 15) / 16 * 16; }

// grad W. `run` computes out[:, first .. last), where a range is kGradColumns wide (the last one may be less): sums of
// 16 rows take 32 KiB and stay close, and each row of W is read in pieces of 256 bytes.
constexpr int64_t kGradColumns = 512;
struct GradInput {
    int64_t most_rows[3];  // of a pass, for each hb_dtype
    int64_t (*scratch_size)(int64_t rows, int64_t n);
    void (*prepare)(const void *grad, int dtype, int64_t rows, int64_t n, void *scratch);
    bool (*run)(const hb_weight &w, int64_t n, int64_t k, const void *scratch, int64_t rows, int dtype, void *out,
                int64_t first, int64_t last);
};

// A product of many rows, bf16 only: out [rows, outputs] = the sum over `length` terms of an activation times a weight,
// where (outputs, length) is (n, k) for y = x W^T and (k, n) for g W. api.cpp goes through the rows in passes, which
// bounds the memory it takes. In each, all threads `pack` pieces of the activations into an order of the kernel's own
// (64-byte aligned); then each calls `run` with a workspace of its own, which takes panels of outputs from `next`.
struct Gemm {
    int64_t most_rows;     // of a pass
    int64_t most_outputs;  // of a panel, which is a multiple of 64, and of the block size where that is less than this
    int64_t (*packed_size)(int64_t rows, int64_t length);
    int64_t (*workspace_size)(int64_t rows);
    int64_t (*pieces)(int64_t rows, int64_t length);
    void (*pack)(const void *x, int64_t rows, int64_t length, void *packed, int64_t first, int64_t last);
    void (*run)(const hb_weight &w, int64_t n, int64_t k, const void *packed, int64_t rows, const void *bias, void *out,
                int64_t panel, std::atomic<int64_t> &next, void *workspace);
};

// From so many rows on a Gemm is taken, where the instruction set has one.
constexpr int64_t kGemmRows = 33;

// Kernels on rows [first, last) (elements, where there are no rows) of one element type; see rowwise.h.
struct RowwiseOf {
    void (*cross_entropy)(void *logits, int64_t first, int64_t last, int64_t vocabulary, const int64_t *labels,
                          bool gradient, float *losses);
    void (*rms_norm)(const void *x, const void *weight, int64_t first, int64_t last, int64_t n, float eps, void *y,
                     float *rstd);
    void (*rms_norm_grad)(const void *grad, const void *x, const void *weight, const float *rstd, int64_t first,
                          int64_t last, int64_t n, void *out);
    void (*swiglu)(const void *gate, const void *up, int64_t first, int64_t last, void *y);
    void (*swiglu_grad)(const void *grad, const void *gate, const void *up, int64_t first, int64_t last,
                        void *grad_gate, void *grad_up);
    void (*rotary)(const void *x, const void *cosine, const void *sine, int64_t first, int64_t last, int64_t angles,
                   int64_t heads, int64_t dim, bool inverse, void *out);
};
struct Rowwise {
    RowwiseOf of[3];  // by enum hb_dtype
};

// Where one token's heads that share a key head stand.
struct HeadAt {
    const hb_decoder &decoder;
    const hb_layer &layer;
    int64_t number, slot, position, head;  // the layer's number; `head`: of the keys
};

// What a decoder computes between its products, in float32; see decoder_ops.h.
struct DecoderOps {
    void (*rms_norm)(const float *x, const float *weight, int64_t n, float eps, float *y);
    void (*round)(const float *x, int64_t n, uint16_t *bf16);
    void (*widen)(const uint16_t *bf16, int64_t n, float *out);
    // out[row, first .. last) = x W^T, out [rows, n].
    void (*dense)(const hb_matrix &w, const float *x, int64_t rows, int64_t first, int64_t last, float *out);
    void (*add)(const float *x, int64_t n, float *out);
    void (*gate)(int activation, const float *gate, const float *up, int64_t n, float *out);
    // Normalizes and rotates one key head with its queries [group, head_dim], scales the queries, and stores key and value.
    void (*enter)(const HeadAt &at, float *queries, float *key, const float *value);
    void (*attend)(const HeadAt &at, const float *queries, float *out);
};

struct Kernels {
    Dequantize dequantize;
    Quantize quantize;
    AdamW adamw;
    const Rowwise *rowwise;
    const Lora *lora;
    const DecoderOps *decoder;
    Linear linear;
    GradInput grad_input;
    const Gemm *linear_gemm = nullptr;  // where the set has one
    const Gemm *grad_input_gemm = nullptr;
};

// The chosen instruction set's kernels.
const Kernels &kernels();

void dequantize_generic(const hb_weight &, int64_t, int64_t, int, void *);
void quantize_generic(const void *, int, int64_t, int64_t, int64_t, uint8_t *, float *);
extern const GradInput grad_input_generic;
extern const Linear linear_generic;
extern const Lora lora_generic;
extern const Rowwise rowwise_generic;
extern const DecoderOps decoder_generic;

#ifdef HB_X86
void dequantize_avx2(const hb_weight &, int64_t, int64_t, int, void *);
void quantize_avx2(const void *, int, int64_t, int64_t, int64_t, uint8_t *, float *);
extern const GradInput grad_input_avx2;
extern const Linear linear_avx2;
extern const Lora lora_avx2;
extern const Rowwise rowwise_avx2;
extern const DecoderOps decoder_avx2;

void dequantize_avx512(const hb_weight &, int64_t, int64_t, int, void *);
void quantize_avx512(const void *, int, int64_t, int64_t, int64_t, uint8_t *, float *);
extern const GradInput grad_input_avx512;
extern const Linear linear_avx512;
extern const Linear linear_rows_avx512;
extern const Lora lora_avx512;
extern const Rowwise rowwise_avx512;
extern const DecoderOps decoder_avx512;
extern const Linear linear_avx512bf16;
extern const Linear linear_few_amx;
extern const Linear linear_amx;
extern const GradInput grad_input_amx;
extern const Gemm linear_gemm_amx;
extern const Gemm grad_input_gemm_amx;
#endif

#ifdef HB_ARM64
void dequantize_neon(const hb_weight &, int64_t, int64_t, int, void *);
void quantize_neon(const void *, int, int64_t, int64_t, int64_t, uint8_t *, float *);
extern const GradInput grad_input_neon;
extern const Linear linear_neon;
extern const Linear linear_neonbf16;
#endif

}  // namespace halfbyte
