// The last step of a product: the activation of its results, while they are in the cache of the core
// that has just written them.
//
// They are rounded to their type before, as they are where the activation is an operation of its own,
// so it does not matter to kernels which there is, nor to results whether it is fused.

#include "gemm.h"

namespace {

// Rows of neighbouring results.
struct Results {
    uint8_t* y;
    int32_t type;    // FpcInput
    int64_t rows;
    int64_t count;   // of a row
    int64_t stride;  // bytes from one row to the next
};

}  // namespace

#define FPC_ROWS "activate_rows.h"
#include "instruction_sets.h"

void activate(const Gemm& gemm, const Task& task, int32_t instructions) {
    const int64_t first = task.block * kBlock + 16 * task.first, left = gemm.weights.n - first;
    const int64_t most = 16 * task.count, size = gemm.output == FPC_INPUT_F32 ? 4 : 2;
    const Results results{gemm.y + task.begin * gemm.y_stride + first * size, gemm.output,
                          task.end - task.begin, left < most ? left : most, gemm.y_stride};
    const int32_t head = gemm.weights.activation;
#if defined(__x86_64__)
    if (instructions >= FPC_AVX512) return avx512::activate(results, head);
    if (instructions >= FPC_AVX2) return avx2::activate(results, head);
#endif
    (void)instructions;
    baseline::activate(results, head);
}
