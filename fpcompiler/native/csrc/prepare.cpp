// Activations, quantized and made ready to be multiplied; rows are shared out over threads.

#include <stdlib.h>

#include "layout.h"
#include "threads.h"

#include "values.h"

#define FPC_ROWS "prepare_rows.h"
#include "instruction_sets.h"

namespace {

// Below so many values another thread is not worth waking.
constexpr int64_t kValuesPerThread = 1 << 15;

struct Rows {
    const FpcWeights& weights;
    const FpcActivations& activations;
    const Values from;
    int64_t m;
    uint8_t* prepared;
    int32_t threads;
};

struct Codes {
    const FpcWeights& weights;
    const FpcActivations& activations;
    const uint8_t* codes;
    const float* outer;
    const uint8_t* block_scale;
    int64_t m;
    uint8_t* prepared;
    int32_t threads;
};

int32_t useful_threads(int32_t threads, int64_t values) {
    const int64_t most = values / kValuesPerThread;
    return most < threads ? (most < 1 ? 1 : (int32_t)most) : threads;
}

template <class Preparer, class Quantizer, class Row>
struct Kernel {
    static int32_t quantize(const Rows& job) {
        const Layout layout(job.weights);
        const Preparer preparer{job.weights, job.activations, layout,
                                Prepared(job.weights, layout, job.prepared, job.m), job.weights.k};
        float shared = 1;
        if (job.activations.quantized && job.activations.operand.outer == FPC_PER_TENSOR) {
            const int32_t most = for_rows(preparer, job, [&](Quantizer& own, int64_t m) {
                return own.largest(m);
            });
            if (most >= 0x7F800000) return FPC_NOT_FINITE;
            shared = Row::scale_of(most, job.activations.operand);
        }
        return for_rows(preparer, job, [&](Quantizer& own, int64_t m) {
            return own.prepare(m, shared);
        });
    }

    static void take(const Codes& job) {
        const Layout layout(job.weights);
        const Preparer preparer{job.weights, job.activations, layout,
                                Prepared(job.weights, layout, job.prepared, job.m), job.weights.k};
        const FpcOperand& operand = job.activations.operand;
        const int64_t blocks = operand.block ? (preparer.k + operand.block - 1) / operand.block : 0;
        const int64_t scale_row = blocks * (operand.block_scale == FPC_F32 ? 4 : 1);
#pragma omp parallel for num_threads(job.threads) if (job.threads > 1) schedule(static)
        for (int64_t m = 0; m < job.m; m++) {
            KeepSubnormals keep;
            const float outer = operand.outer ? job.outer[operand.outer == FPC_PER_ROW ? m : 0] : 1;
            preparer.from_codes(m, job.codes + m * preparer.k, outer,
                                job.block_scale + m * scale_row);
        }
    }

   private:
    // Call `work(quantizer, row)` for every row; the result is the largest of theirs.
    template <class Work>
    static int32_t for_rows(const Preparer& preparer, const Rows& job, const Work& work) {
        int32_t status = FPC_OK;
#pragma omp parallel num_threads(job.threads) if (job.threads > 1) reduction(max : status)
        {
            KeepSubnormals keep;
            const int64_t bytes = Quantizer::bytes(job.activations.operand, preparer.k);
            uint8_t* memory = (uint8_t*)aligned_alloc(64, round_up(bytes, 64));
            if (!memory) {
                status = FPC_NO_MEMORY;
            } else {
                Quantizer own(preparer, job.from, memory);
#pragma omp for schedule(static) nowait
                for (int64_t m = 0; m < job.m; m++) {
                    const int32_t result = work(own, m);
                    status = result > status ? result : status;
                }
                free(memory);
            }
        }
        return status;
    }
};

typedef Kernel<baseline::Preparer, baseline::Quantizer, baseline::Row> Baseline;
#if defined(__x86_64__)
typedef Kernel<avx2::Preparer, avx2::Quantizer, avx2::Row> Avx2;
typedef Kernel<avx512::Preparer, avx512::Quantizer, avx512::Row> Avx512;
#endif

}  // namespace

extern "C" int32_t fpc_prepare(const FpcWeights* weights, const FpcActivations* activations,
                               const void* x, int32_t input, int64_t m, int64_t stride,
                               uint8_t* prepared, int32_t threads, int32_t instructions) {
    return fpc_prepare_produced(weights, activations, nullptr, nullptr, nullptr, x, input, m,
                                stride, prepared, threads, instructions);
}

extern "C" int32_t fpc_prepare_produced(const FpcWeights* weights,
                                        const FpcActivations* activations,
                                        const FpcProducer* producer, const FpcRows* scale,
                                        const FpcRows* shift, const void* x, int32_t input,
                                        int64_t m, int64_t stride, uint8_t* prepared,
                                        int32_t threads, int32_t instructions) {
    const FpcRows none{};
    const Values from{(const uint8_t*)x, input, stride * (input == FPC_INPUT_F32 ? 4 : 2), producer,
                      scale ? *scale : none, shift ? *shift : none};
    const Rows job{*weights, *activations, from, m, prepared,
                   useful_threads(threads, m * weights->k)};
#if defined(__x86_64__)
    if (instructions >= FPC_AVX512) return Avx512::quantize(job);
    if (instructions >= FPC_AVX2) return Avx2::quantize(job);
#endif
    (void)instructions;
    return Baseline::quantize(job);
}

extern "C" int32_t fpc_prepare_codes(const FpcWeights* weights, const FpcActivations* activations,
                                     const uint8_t* codes, const float* outer_scale,
                                     const void* block_scale, int64_t m, uint8_t* prepared,
                                     int32_t threads, int32_t instructions) {
    const Codes job{*weights, *activations, codes, outer_scale, (const uint8_t*)block_scale, m,
                    prepared, useful_threads(threads, m * weights->k)};
#if defined(__x86_64__)
    if (instructions >= FPC_AVX512) return Avx512::take(job), FPC_OK;
    if (instructions >= FPC_AVX2) return Avx2::take(job), FPC_OK;
#endif
    (void)instructions;
    Baseline::take(job);
    return FPC_OK;
}
