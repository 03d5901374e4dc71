// Functions of arrays. Included once per instruction set, after vectors.h.

#include "functions.h"

static F function_of(int32_t function, F x) {
    if (function == FPC_EXP) return exp_of(x);
    return function == FPC_ERF ? erf_of(x) : tanh_of(x);
}

static void evaluate(int32_t function, const float* x, float* y, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t size = 4 * (count - i < kLanes ? count - i : kLanes);
        float values[kLanes] = {};
        __builtin_memcpy(values, x + i, size);
        store(values, function_of(function, load<F>(values)));
        __builtin_memcpy(y + i, values, size);
    }
}
