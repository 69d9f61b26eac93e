// Random calls of the C interface, and what their results have to be.
//
// A call is made under exactly the conditions that kernels/cpu/ops.py proves before it hands out a pointer: sizes are
// those and not one byte more, and of the alignment only that of an element is promised.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "random.h"

// What an output holds. NaNs of every payload are equal: their bits differ between processors and mean nothing.
enum class Element { kByte, kFloat32, kBfloat16, kFloat16 };

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

double to_double(const void *data, Element element, int64_t at);
