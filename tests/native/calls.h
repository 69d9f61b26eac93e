// Random calls of the C interface, and what their results have to be.
//
// A call is made under exactly the conditions that kernels/cpu/ops.py proves before it hands out a pointer: sizes are
// those and not one byte more, and of the alignment only that of an element is promised.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "values.h"

struct Output {
    int64_t bytes;
    Element element;
};

struct Call {
    std::string text;
    std::vector<Output> outputs;
    std::function<int(int threads, void *const *out)> run;  // 0 when done
    // A product: the exact result of each element and how far it may lie from that. Empty for all other calls, whose
    // results have to be equal, to the bit, with every instruction set.
    std::vector<double> exact, allowed;
};

// The call that belongs to a seed.
Call random_call(uint64_t seed);

// Of packed weights (weight_calls.cpp).
Call quantize(Random &random);
Call quantize_scales(Random &random);
Call dequantize(Random &random);
Call dequantize_rows(Random &random);
Call product(Random &random, bool backward);  // linear, or linear_grad_input where `backward`
Call linear_lora(Random &random);
Call grouped_linear(Random &random, bool backward);

// Of a training step (training_calls.cpp).
Call adamw(Random &random);
Call adamw_norms(Random &random);
Call swiglu(Random &random);
Call rotary(Random &random);
Call rms_norm(Random &random);
Call cross_entropy(Random &random);

// Of a decoder (decoder_calls.cpp).
Call decode(Random &random);
