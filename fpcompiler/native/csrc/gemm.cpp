// Multiplication: the work is cut into tasks, which threads take one after the other.

#include "gemm.h"

#include <stdlib.h>

#include <new>

#include "threads.h"

namespace {

// Below so many products of codes another thread is not worth waking.
constexpr int64_t kProductsPerThread = 300000;
constexpr int64_t kRowsAtOnce = 6;  // of the kernels' tiles
constexpr int64_t kFewRows = 4;

Kernels kernels_for(const Gemm& gemm, int32_t instructions) {
#if defined(__x86_64__)
    if (instructions >= FPC_AVX512_VNNI) return kernels_avx512(gemm);
    if (instructions >= FPC_AVX2 && gemm.weights.code_bits == 4)
        return kernels_avx2(gemm, instructions > FPC_AVX2 ? vnni256() : Vnni256::kNone);
#elif defined(__aarch64__)
    if (instructions == FPC_NEON_DOT) return kernels_neon(gemm);
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
        } else if (blocks < (m <= kFewRows ? 2 * threads : wanted) && !panel) {
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

namespace {

// A product with what runs it.
struct Job {
    const Gemm gemm;
    const Kernels kernels;
    const Tasks tasks;
    const int32_t instructions;

    Job(const Product& product, const Layout& layout, int32_t threads, int32_t instructions)
        : gemm{*product.weights, layout,
               Prepared(*product.weights, layout, (uint8_t*)product.prepared, product.m), product.m,
               (uint8_t*)product.y, (const uint8_t*)product.residual, product.output,
               product.stride * (product.output == FPC_INPUT_F32 ? 4 : 2)},
          kernels(kernels_for(gemm, instructions)),
          tasks(gemm, threads, kernels.scratch > 0),
          instructions(instructions) {}

    void run(int64_t index, uint8_t* scratch) const {
        const Task task = tasks[index];
        if (tasks.empty(task)) return;
        kernels.run(gemm, task, scratch);
        if (gemm.weights.activation >= 0) activate(gemm, task, instructions);
        if (gemm.residual) add_residual(gemm, task, instructions);
    }
};

}  // namespace

int32_t multiply_all(const Product* products, int count, int32_t threads, int32_t instructions) {
    double total = 0;
    for (int i = 0; i < count; i++)
        total += (double)products[i].weights->n * products[i].weights->k * products[i].m;
    if (total == 0) return FPC_OK;
    if (total < kProductsPerThread * 2) threads = 1;
    alignas(Job) unsigned char memory[kProductsAtOnce * sizeof(Job)];
    const Job* jobs = (const Job*)memory;
    int64_t ends[kProductsAtOnce], tasks = 0, bytes = 0;
    for (int i = 0; i < count; i++) {
        new ((void*)(jobs + i)) Job(products[i], Layout(*products[i].weights), threads, instructions);
        ends[i] = tasks += jobs[i].tasks.count();
        bytes = jobs[i].kernels.scratch > bytes ? jobs[i].kernels.scratch : bytes;
    }
    // A few rows wait for memory, which is read faster the longer a thread goes on.
    const int64_t run = products->m <= kFewRows && tasks > 4 * threads ? tasks / (4 * threads) : 1;
    int32_t status = FPC_OK;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(max : status)
    {
        KeepSubnormals keep;
        uint8_t* scratch = bytes ? (uint8_t*)aligned_alloc(64, round_up(bytes, 64)) : nullptr;
        if (bytes && !scratch) {
            status = FPC_NO_MEMORY;
        } else {
#pragma omp for schedule(dynamic, run) nowait
            for (int64_t i = 0; i < tasks; i++) {
                int job = 0;
                while (i >= ends[job]) job++;
                jobs[job].run(i - (job ? ends[job - 1] : 0), scratch);
            }
        }
        free(scratch);
    }
    return status;
}

extern "C" int32_t fpc_multiply(const FpcWeights* weights, const uint8_t* prepared, int64_t m,
                                void* y, const void* residual, int32_t output, int64_t stride,
                                int32_t threads, int32_t instructions) {
    const Product product{weights, prepared, m, y, residual, output, stride};
    return multiply_all(&product, 1, threads, instructions);
}
