// The C interface of halfbyte's CPU kernels: all that Python calls.
//
// Plain C types, no torch, no Python: one binary serves every version of both. Nothing here checks its arguments;
// kernels/cpu/ checks every pointer's shape, dtype, contiguity and device before it calls.
#pragma once

#include <stdint.h>

#ifdef _WIN32
#define HB_API __declspec(dllexport)
#else
#define HB_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Raised whenever a signature or a struct below changes; kernels/cpu/library.py refuses another number.
#define HB_ABI 5

// Element types, numbered as in kernels/cpu/library.py.
enum hb_dtype { HB_FLOAT32 = 0, HB_BFLOAT16 = 1, HB_FLOAT16 = 2 };

// Instruction sets. HB_AMX is AVX512-BF16 with the matrix unit beside it, HB_NEONBF16 is NEON with bf16 products.
enum hb_isa { HB_GENERIC = 0, HB_AVX2 = 1, HB_AVX512 = 2, HB_AVX512BF16 = 3, HB_AMX = 4, HB_NEON = 5,
              HB_NEONBF16 = 6 };

// A packed weight: the nine fields of kernels/schema.py's PackedWeight. Element i of the tensor is element start + i
// of the blocks; block b's scale is number scale_start + b of the second level.
typedef struct hb_weight {
    const uint8_t *codes;
    const void *scales;         // float [blocks], or packed uint8 codes where scale_bits > 0
    const float *scale_absmax;  // float [second-level blocks], or null
    const float *scale_offset;  // float [1], or null
    int64_t format;             // position in formats.FORMATS
    int64_t block_size;         // 32 to 4096, a power of two
    int64_t scale_bits;         // 0, 8, 6 or 4
    int64_t start;
    int64_t scale_start;
} hb_weight;

HB_API int hb_abi(void);

// Instruction sets: whether this build and this CPU have one, the best, and the choice. hb_set_isa returns 0 when done.
HB_API int hb_has_isa(int isa);
HB_API int hb_best_isa(void);
HB_API int hb_set_isa(int isa);

// The OpenMP runtime that the process already has: the address of its GOMP_parallel. Without it every call runs on the
// thread that made it.
HB_API void hb_set_openmp(void *gomp_parallel);

// w [count] of `dtype` -> codes [packed size], scales [ceil(count / block_size)].
HB_API void hb_quantize(int threads, const void *w, int dtype, int64_t count, int64_t format, int64_t block_size,
                        uint8_t *codes, float *scales);

// centred [count], the scales without their mean -> codes [packed size], absmax [ceil(count / 256)].
HB_API void hb_quantize_scales(int threads, const float *centred, int64_t count, int64_t bits, uint8_t *codes,
                               float *absmax);

// Columns [column, column + columns) of rows [row, row + rows) of a weight [*, width] -> out [rows, columns].
HB_API void hb_dequantize(int threads, const hb_weight *w, int64_t width, int64_t row, int64_t rows, int64_t column,
                          int64_t columns, int dtype, void *out);

// Rows index[0 .. count) of a weight [*, width] -> out [count, width].
HB_API void hb_dequantize_rows(int threads, const hb_weight *w, int64_t width, const int64_t *index, int64_t count,
                               int dtype, void *out);

// out [rows, n] = x [rows, k] W^T + bias, W [n, k] of 4-bit codes. k is whole blocks and a multiple of 64, start is 0.
// Both return 0, or 1 when there was no memory.
HB_API int hb_linear(int threads, const hb_weight *w, int64_t n, int64_t k, const void *x, int64_t rows, int dtype,
                      const void *bias, void *out);

// out [rows, k] = grad [rows, n] W, under the same conditions.
HB_API int hb_linear_grad_input(int threads, const hb_weight *w, int64_t n, int64_t k, const void *grad, int64_t rows,
                                 int dtype, void *out);

// The same with a weight [experts, n, k], a matrix for each expert: rows [ends[e - 1], ends[e]) are multiplied with expert
// e's. The results of an expert with more than `most` rows are left as they are, and so are those of rows from the last
// end on.
HB_API int hb_grouped_linear(int threads, const hb_weight *w, int64_t experts, int64_t n, int64_t k, const void *x,
                             const int32_t *ends, int64_t most, int dtype, void *out);
HB_API int hb_grouped_linear_grad_input(int threads, const hb_weight *w, int64_t experts, int64_t n, int64_t k,
                                        const void *grad, const int32_t *ends, int64_t most, int dtype, void *out);

// A LoRA adapter, for some of the rows of a product: out[first .. first + rows) += scaling (x A^T) B^T.
typedef struct hb_lora {
    const void *a;  // [rank, k] of `dtype`
    const void *b;  // [n, rank] of `dtype`
    int64_t rank;
    int64_t first, rows;
    int32_t dtype;
    float scaling;
} hb_lora;

// hb_linear of at most HB_FEW_ROWS rows, with the branches of adapters, each of which names its rows: a batch whose rows
// have adapters of their own is one call. Sums are float32; the branch is added to the rounded product and rounded.
// Returns as hb_linear.
#define HB_FEW_ROWS 32
HB_API int hb_linear_lora(int threads, const hb_weight *w, int64_t n, int64_t k, const void *x, int64_t rows, int dtype,
                          const void *bias, const hb_lora *adapters, int64_t count, void *out);

// Row by row, in one dtype, computed in float32. Labels lie in [0, vocabulary).
// losses [rows] = log(sum(exp(logits))) - logits[label]; with `gradient`, logits become their gradient: softmax - one-hot.
HB_API void hb_cross_entropy(int threads, void *logits, int dtype, int64_t rows, int64_t vocabulary,
                             const int64_t *labels, int gradient, float *losses);

// y [rows, n] = weight x rstd, rstd [rows] = 1 / sqrt(mean(x^2) + eps); and the gradient of x.
HB_API void hb_rms_norm(int threads, const void *x, const void *weight, int dtype, int64_t rows, int64_t n, float eps,
                        void *y, float *rstd);
HB_API void hb_rms_norm_grad(int threads, const void *grad, const void *x, const void *weight, const float *rstd,
                             int dtype, int64_t rows, int64_t n, void *out);

// y [count] = gate sigmoid(gate) up; and the gradients of both.
HB_API void hb_swiglu(int threads, const void *gate, const void *up, int dtype, int64_t count, void *y);
HB_API void hb_swiglu_grad(int threads, const void *grad, const void *gate, const void *up, int dtype, int64_t count,
                           void *grad_gate, void *grad_up);

// out [tokens, heads, dim] = x cos + (-x2, x1) sin, x1 and x2 the halves of a head; cos and sin [angles, dim], token t
// takes row t mod angles. `inverse`: the transposed map.
HB_API void hb_rotary(int threads, const void *x, const void *cosine, const void *sine, int dtype, int64_t tokens,
                      int64_t angles, int64_t heads, int64_t dim, int inverse, void *out);

// How an optimizer keeps its two moments; numbered as in kernels/cpu/adamw.py.
enum hb_state { HB_STATE_FLOAT32 = 0, HB_STATE_8BIT = 1, HB_STATE_4BIT = 2 };

// Numbers of one AdamW step that many tensors share.
typedef struct hb_adamw_options {
    float grad_scale;        // of the gradients, for clipping
    float beta1, weight1;    // weight1 = 1 - beta1
    float beta2, weight2;
    float eps;
    float correction2;       // sqrt(1 - beta2^step)
    float inverse2;          // 1 / correction2
    float step_size;         // -lr / (1 - beta1^step)
    float decay;             // 1 - lr weight_decay
} hb_adamw_options;

// One tensor of a step, or a range of one that begins with a whole block.
typedef struct hb_adamw_tensor {
    void *param;             // float32 or bfloat16 [count]
    const void *grad;        // float32 or bfloat16 [count]
    float *master;           // float [count] where param is bfloat16 and rounded from it, or null
    void *state1, *state2;   // float [count]; uint8 [count]; uint8 [(count + 1) / 2]
    float *scale1, *scale2;  // float [blocks], or null; with columns > 0 scale2 is [rows] ...
    float *scale2_columns;   // ... and this [columns]
    int64_t count;
    int64_t columns;         // of the matrix whose second moment has scales by row and column, else 0
    int64_t first;           // what element 0 is called where random numbers are drawn
    uint32_t key[2];         // of those random numbers
    int32_t param_dtype, grad_dtype, state, options;  // options: position in the array given with the tensors
} hb_adamw_tensor;

// One AdamW step of all tensors. Returns 0, or 1 when there was no memory and nothing was changed.
HB_API int hb_adamw(int threads, const hb_adamw_tensor *tensors, int64_t count, const hb_adamw_options *options);

// The sum of squares of each gradient, not finite exactly where the gradient is not -> sums [count]. Returns as hb_adamw.
HB_API int hb_adamw_norms(int threads, const hb_adamw_tensor *tensors, int64_t count, double *sums);

// A decoder of the Llama family, one token of each sequence at a time. All arithmetic between the products is float32.

// W [n, k], packed under the conditions of hb_linear, or dense.
typedef struct hb_matrix {
    const hb_weight *packed;    // or null, and then
    const void *dense;          // float32 or bfloat16
    const float *bias;          // [n], or null
    const hb_lora *loras;       // [adapters], whose rows are those of a step; rank 0: it leaves this matrix alone. Or null
    int64_t n, k;
    int32_t dense_dtype;
} hb_matrix;

typedef struct hb_layer {
    hb_matrix query, key, value, output, gate, up, down;
    const float *attention_norm, *mlp_norm;  // [hidden]
    const float *query_norm, *key_norm;      // [head_dim], or null
    int64_t window;                          // the last positions that a token sees, its own included; 0: all
} hb_layer;

enum hb_activation { HB_SILU = 0, HB_GELU_TANH = 1 };

// What the cache holds: enum hb_dtype without float16, or this, with a scale for each head and position.
enum { HB_INT8 = 3 };

typedef struct hb_decoder {
    const hb_layer *layers;
    const float *final_norm;     // [hidden]
    const float *cosine, *sine;  // [positions, head_dim]
    hb_matrix head;              // [vocabulary, hidden], without adapters
    int64_t layer_count, hidden, ffn, heads, kv_heads, head_dim;
    // Keys [layers, slots, kv_heads, positions / 16, head_dim, 16]: 16 positions side by side, so that a product with
    // them needs no sum across a register. Values [layers, slots, kv_heads, positions, head_dim].
    void *keys, *values;
    float *key_scales, *value_scales;  // [layers, slots, kv_heads, positions], or null
    int64_t slots, positions;          // positions: a multiple of 16
    float eps, attention_scale;
    int32_t cache_dtype, activation;
} hb_decoder;

// Where a step's time goes. Adapters count as products, the final norm as head; rotating and storing as attention.
typedef enum hb_part { HB_PART_NORMS, HB_PART_PRODUCTS, HB_PART_ATTENTION, HB_PART_HEAD, HB_PARTS } hb_part;

// Tokens to decode together, at most HB_STEP_ROWS. Several may be of one slot, at different positions. A step may be done
// in parts, each going on with `hidden` as the one before left it.
enum { HB_STEP_ROWS = 128 };
typedef struct hb_step {
    float *hidden;               // [rows, hidden]: embeddings in, the last layer's output out
    float *logits;               // [wanted_count, vocabulary]
    const int64_t *slot;         // [rows]
    const int64_t *position;     // [rows]
    const int64_t *mix;          // [rows + 1]: row r has the adapters [mix[r], mix[r + 1]) of the next two, or null
    const int64_t *adapter;
    const float *weight;
    const int64_t *wanted;       // [wanted_count], at most `rows`: the rows whose logits are computed
    int64_t *nanoseconds;        // [HB_PARTS], to which the time of each part is added; or null
    int64_t rows, wanted_count;
    int64_t first_layer, last_layer;  // the layers [first, last) of this part; then the logits of wanted_count rows
    int32_t dtype;               // of the activations that enter a packed product: float32 or bfloat16
} hb_step;

// Returns 0, or 1 when there was no memory.
HB_API int hb_decode(int threads, const hb_decoder *decoder, const hb_step *step);

// zlib's crc32 of `nbytes` bytes, going on from `crc` (0 at the beginning). Whether it is faster than zlib's here.
HB_API int hb_has_crc32(void);
HB_API uint32_t hb_crc32(uint32_t crc, const void *data, int64_t nbytes);

// Files that shrink while they are mapped (mapped.cpp). hb_watch_mappings takes SIGBUS over, from Python's handler too:
// `tell` is called, in a signal handler, with its number. hb_watch_mapping gives the mapping a place, -1 when there is
// none left; from then on a fault in it is survived. hb_lost_of_mapping: the offset of the lowest page that was missed,
// -1 for none.
HB_API int hb_watch_mappings(void (*tell)(int));
HB_API int hb_watch_mapping(void *begin, int64_t nbytes);
HB_API int64_t hb_lost_of_mapping(int place);
HB_API void hb_forget_mapping(int place);

#ifdef __cplusplus
}
#endif
