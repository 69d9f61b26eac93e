#include "calls.h"

Call random_call(uint64_t seed) {
    Random random(seed);
    switch (random.below(20)) {
        case 0: return quantize_scales(random);
        case 1: return dequantize_rows(random);
        case 2:
        case 3: return dequantize(random);
        case 4: return product(random, false);
        case 5: return product(random, true);
        case 6:
        case 7:
        case 8: return adamw(random);
        case 9: return adamw_norms(random);
        case 10: return swiglu(random);
        case 11: return rotary(random);
        case 12: return rms_norm(random);
        case 13: return cross_entropy(random);
        case 14: return linear_lora(random);
        case 15: return decode(random);
        case 16: return grouped_linear(random, false);
        case 17: return grouped_linear(random, true);
        default: return quantize(random);
    }
}
