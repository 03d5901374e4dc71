// Quantization of a tensor: one kernel per instruction set, rows shared out over threads.

#include "native.h"

#include <stdlib.h>

#include "threads.h"

#define FPC_ROWS "quantize_rows.h"
#include "instruction_sets.h"

namespace {

struct Job {
    const FpcOperand* operand;
    const uint8_t* x;
    int32_t input;
    int64_t rows, k, stride;  // the stride in bytes
    uint8_t* codes;
    float* outer;
    uint8_t* block_scale;
    int32_t threads;

    int64_t code_bytes() const {
        if (operand->code_bits == 8) return k;
        return operand->code_bits == 4 ? (k + 1) / 2 : (k + 3) / 4 * 3;
    }

    int64_t scale_bytes() const {
        if (!operand->block) return 0;
        return (k + operand->block - 1) / operand->block * (operand->block_scale == FPC_F32 ? 4 : 1);
    }
};

// Call `work(row kernel, index)` for every row, with a kernel in each thread.
template <class Row, class Work>
int32_t for_rows(const Job& job, const Work& work) {
    int32_t status = FPC_OK;
#pragma omp parallel num_threads(job.threads) if (job.threads > 1) reduction(max : status)
    {
        KeepSubnormals keep;
        void* memory = malloc(Row::bytes(*job.operand, job.k));
        if (!memory) {
            status = FPC_NO_MEMORY;
        } else {
            Row row(*job.operand, job.k, memory);
#pragma omp for schedule(static) nowait
            for (int64_t r = 0; r < job.rows; r++) {
                int32_t result = work(row, r);
                status = result > status ? result : status;
            }
            free(memory);
        }
    }
    return status;
}

template <class Row>
int32_t quantize(const Job& job) {
    if (job.operand->outer == FPC_PER_TENSOR) {
        int32_t most = for_rows<Row>(job, [&](Row& row, int64_t r) {
            return row.largest(row.read(job.x + r * job.stride, job.input));
        });
        if (most >= 0x7F800000) return FPC_NOT_FINITE;
        *job.outer = Row::scale_of(most, *job.operand);
    }
    const bool per_row = job.operand->outer == FPC_PER_ROW;
    return for_rows<Row>(job, [&](Row& row, int64_t r) {
        const float* values = row.read(job.x + r * job.stride, job.input);
        return row.quantize(values, job.codes + r * job.code_bytes(), job.outer + (per_row ? r : 0),
                            job.block_scale + r * job.scale_bytes());
    });
}

}  // namespace

extern "C" int32_t fpc_quantize(const FpcOperand* operand, const void* x, int32_t input,
                                int64_t rows, int64_t k, int64_t stride, uint8_t* codes,
                                float* outer_scale, void* block_scale, int32_t threads,
                                int32_t instructions) {
    const int64_t size = input == FPC_INPUT_F32 ? 4 : 2;
    Job job{operand, (const uint8_t*)x, input,       rows,
            k,       stride * size,     codes,       outer_scale,
            (uint8_t*)block_scale,      threads};
#if defined(__x86_64__)
    if (instructions >= FPC_AVX512) return quantize<avx512::Row>(job);
    if (instructions >= FPC_AVX2) return quantize<avx2::Row>(job);
#endif
    (void)instructions;
    return quantize<baseline::Row>(job);
}
