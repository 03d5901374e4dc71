// The last steps of a product: the activation of its results, and a sum with others, while they are
// in the cache of the core that has just written them.
//
// They are rounded to their type before each, as they are where it is an operation of its own, so it
// does not matter to kernels which there is, nor to results whether it is fused.

#include "gemm.h"

namespace {

// Rows of neighbouring results.
struct Results {
    uint8_t* y;
    int32_t type;    // FpcInput
    int64_t rows;
    int64_t count;   // of a row
    int64_t stride;  // bytes from one row to the next
    int64_t first;   // bytes before the first one

    Results(const Gemm& gemm, const Task& task) : type(gemm.output), stride(gemm.y_stride) {
        const int64_t at = task.block * kBlock + 16 * task.first, left = gemm.weights.n - at;
        const int64_t most = 16 * task.count, size = type == FPC_INPUT_F32 ? 4 : 2;
        first = task.begin * stride + at * size;
        y = gemm.y + first;
        rows = task.end - task.begin;
        count = left < most ? left : most;
    }
};

}  // namespace

#define FPC_ROWS "activate_rows.h"
#include "instruction_sets.h"

void activate(const Gemm& gemm, const Task& task, int32_t instructions) {
    const Results results(gemm, task);
    const int32_t head = gemm.weights.activation;
#if defined(__x86_64__)
    if (instructions >= FPC_AVX512) return avx512::activate(results, head);
    if (instructions >= FPC_AVX2) return avx2::activate(results, head);
#endif
    (void)instructions;
    baseline::activate(results, head);
}

void add_residual(const Gemm& gemm, const Task& task, int32_t instructions) {
    const Results results(gemm, task);
    const uint8_t* residual = gemm.residual + results.first;
#if defined(__x86_64__)
    if (instructions >= FPC_AVX512) return avx512::add(results, residual);
    if (instructions >= FPC_AVX2) return avx2::add(results, residual);
#endif
    (void)instructions;
    baseline::add(results, residual);
}
