// Multiplication: the work is cut into tasks, which threads take one after the other.

#include "gemm.h"

#include <stdlib.h>

#include "threads.h"

namespace {

// Below so many products of codes another thread is not worth waking.
constexpr int64_t kProductsPerThread = 300000;
constexpr int64_t kRowsAtOnce = 6;  // of the kernels' tiles

Kernels kernels_for(const Gemm& gemm, int32_t instructions) {
#if defined(__x86_64__)
    if (instructions >= FPC_AVX512_VNNI) return kernels_avx512(gemm);
    if (instructions >= FPC_AVX2 && gemm.weights.code_bits == 4)
        return kernels_avx2(gemm, instructions > FPC_AVX2 ? vnni256() : Vnni256::kNone);
#endif
    (void)instructions;
    return kernels_portable(gemm);
}

// Blocks of outputs, each cut into halves or into runs of rows where there are few of them.
struct Tasks {
    int64_t blocks, halves, runs, run_rows, m, n;

    Tasks(const Gemm& gemm, int32_t threads, bool panel) : m(gemm.m), n(gemm.weights.n) {
        blocks = gemm.layout.blocks;
        halves = runs = 1;
        const int64_t wanted = threads > 1 ? 8 * threads : 1;
        if (blocks < wanted && m >= 96) {
            runs = (wanted + blocks - 1) / blocks;
            if (runs > m / 48) runs = m / 48;
        } else if (blocks < wanted && !panel) {
            halves = 2;
        }
        run_rows = round_up((m + runs - 1) / runs, kRowsAtOnce);
        runs = (m + run_rows - 1) / run_rows;
    }

    int64_t count() const { return blocks * halves * runs; }

    Task operator[](int64_t index) const {
        const int64_t run = index % runs, half = index / runs % halves;
        const int64_t block = index / runs / halves, end = (run + 1) * run_rows;
        return {block, (int32_t)half * 2, halves == 2 ? 2 : 4, run * run_rows, end < m ? end : m};
    }

    // The second half of the last block may be nothing but padding.
    bool empty(const Task& task) const { return task.block * kBlock + 16 * task.first >= n; }
};

}  // namespace

extern "C" int64_t fpc_prepared_bytes(const FpcWeights* weights, int64_t m) {
    return Prepared(*weights, Layout(*weights), nullptr, m).bytes;
}

extern "C" int32_t fpc_multiply(const FpcWeights* weights, const uint8_t* prepared, int64_t m,
                                void* y, int32_t output, int64_t stride, int32_t threads,
                                int32_t instructions) {
    if (m == 0) return FPC_OK;
    const Layout layout(*weights);
    const Gemm gemm{*weights, layout, Prepared(*weights, layout, (uint8_t*)prepared, m), m,
                    (uint8_t*)y, output, stride * (output == FPC_INPUT_F32 ? 4 : 2)};
    const Kernels kernels = kernels_for(gemm, instructions);
    const double products = (double)weights->n * (double)weights->k * (double)m;
    if (products < kProductsPerThread * 2) threads = 1;
    const Tasks tasks(gemm, threads, kernels.scratch > 0);
    const int64_t count = tasks.count();
    int32_t status = FPC_OK;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(max : status)
    {
        KeepSubnormals keep;
        uint8_t* scratch = nullptr;
        if (kernels.scratch) scratch = (uint8_t*)aligned_alloc(64, round_up(kernels.scratch, 64));
        if (kernels.scratch && !scratch) {
            status = FPC_NO_MEMORY;
        } else {
#pragma omp for schedule(dynamic, 1) nowait
            for (int64_t i = 0; i < count; i++) {
                const Task task = tasks[i];
                if (!tasks.empty(task)) kernels.run(gemm, task, scratch);
            }
        }
        free(scratch);
    }
    return status;
}
