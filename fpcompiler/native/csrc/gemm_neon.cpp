// Kernels for ARM processors with dot products of integers (FEAT_DotProd, an option from ARMv8.2 on).
//
// They were run under emulation only: sizes of tiles and of chunks follow from the number of
// registers and from the size of usual caches, not from measured times.

#include "gemm.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#include <string.h>

#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")

#define FPC_INLINE static inline __attribute__((always_inline))
#define FPC_INLINE_MEMBER inline __attribute__((always_inline))
#define FPC_UNROLL _Pragma("GCC unroll 16")

namespace {

typedef int32x4_t I;
typedef float32x4_t F;

#include "tiles.h"

#include "neon_common.h"

#include "neon_int8.h"

#include "neon_f32.h"

}  // namespace

Kernels kernels_neon(const Gemm& gemm) {
    const FpcWeights& weights = gemm.weights;
    if (weights.arithmetic == FPC_INT8) return int8_kernels(weights);
    // Values of wider codes would take tables of more than two registers.
    return weights.code_bits == 4 ? f32_kernels() : kernels_portable(gemm);
}

#pragma GCC pop_options
#endif
