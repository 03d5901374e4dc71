// Kernels in vectors of 256 bits, for processors without the AVX-512 that gemm_avx512.cpp needs.

#include "gemm.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

// The headers of GCC 12 use undefined vectors on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#define FPC_INLINE static inline __attribute__((always_inline))
#define FPC_INLINE_MEMBER inline __attribute__((always_inline))
// Of the functions with the innermost loops: what they are inlined into would take their registers.
#define FPC_APART static __attribute__((noinline))
#define FPC_UNROLL _Pragma("GCC unroll 16")

namespace {

typedef __m256i I;
typedef __m256 F;

#include "tiles.h"

#include "avx2_common.h"

#include "avx2_tasks.h"

#include "avx2_int8.h"

#include "avx2_int8_tasks.h"

#include "avx2_f32.h"

}  // namespace

Kernels kernels_avx2(const Gemm& gemm, Vnni256 vnni) {
    if (gemm.weights.arithmetic != FPC_INT8) return f32_kernels(gemm);
    switch (vnni) {
#ifdef FPC_KNOWS_AVX_VNNI
        case Vnni256::kVex: return int8_kernels<Vnni<true>>(gemm);
#endif
        case Vnni256::kEvex: return int8_kernels<Vnni<false>>(gemm);
        default: break;
    }
    if (Words(gemm.weights).run > 0) return int8_kernels<Words>(gemm);
    return int8_kernels<Wide>(gemm);
}

#pragma GCC pop_options
#endif
