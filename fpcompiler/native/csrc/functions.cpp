// exp, erf and tanh of arrays, so that their errors can be measured.

#include "native.h"

#define FPC_ROWS "function_rows.h"
#include "instruction_sets.h"

extern "C" void fpc_evaluate(int32_t function, const float* x, float* y, int64_t count,
                             int32_t instructions) {
#if defined(__x86_64__)
    if (instructions >= FPC_AVX512) return avx512::evaluate(function, x, y, count);
    if (instructions >= FPC_AVX2) return avx2::evaluate(function, x, y, count);
#endif
    (void)instructions;
    baseline::evaluate(function, x, y, count);
}
