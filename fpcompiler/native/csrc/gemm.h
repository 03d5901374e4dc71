// A product of quantized operands, as the kernels of an instruction set see it.

#ifndef FPC_GEMM_H
#define FPC_GEMM_H

#include "layout.h"
#include "processor.h"

struct Gemm {
    const FpcWeights& weights;
    const Layout layout;
    const Prepared activations;
    int64_t m;
    uint8_t* y;
    const uint8_t* residual;  // what is added, of the type and the strides of y; or null
    int32_t output;           // FpcInput: the type of the result
    int64_t y_stride;         // bytes

    const uint8_t* block(int64_t index) const {
        return weights.data + index * layout.block_bytes();
    }
};

// What a thread does at a time: some vectors of a block of outputs, for some rows of activations.
struct Task {
    int64_t block;
    int32_t first;  // vector
    int32_t count;  // of vectors: 2 or 4
    int64_t begin;  // row
    int64_t end;
};

// `scratch` has scratch_bytes(gemm) of the same kernels, aligned to 64.
typedef void (*RunTask)(const Gemm& gemm, const Task& task, uint8_t* scratch);

struct Kernels {
    RunTask run;
    int64_t scratch;  // bytes that a thread needs for a panel, which takes whole blocks; 0 without
};

// The arguments of fpc_multiply.
struct Product {
    const FpcWeights* weights;
    const uint8_t* prepared;
    int64_t m;
    void* y;
    const void* residual;
    int32_t output;
    int64_t stride;
};

static constexpr int kProductsAtOnce = 8;

// Some products, at most kProductsAtOnce, whose tasks threads share: they wait for each other once.
int32_t multiply_all(const Product* products, int count, int32_t threads, int32_t instructions);

// Replace the results of a task, which kernels have written, by their activation.
void activate(const Gemm& gemm, const Task& task, int32_t instructions);

// Add the residual to the results of a task, or to their activation.
void add_residual(const Gemm& gemm, const Task& task, int32_t instructions);

// One for each instruction set.
Kernels kernels_avx2(const Gemm& gemm, Vnni256 vnni);
Kernels kernels_avx512(const Gemm& gemm);
Kernels kernels_avx512_int8(const Gemm& gemm);
Kernels kernels_avx512_bf16(const Gemm& gemm);
Kernels kernels_avx512_f32(const Gemm& gemm);
Kernels kernels_neon(const Gemm& gemm);
Kernels kernels_portable(const Gemm& gemm);

#endif
