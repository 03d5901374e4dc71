// Kernels for AVX-512 with VNNI: which one runs for a task.

#include "gemm.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

// The headers of GCC 12 use undefined vectors on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx512bf16,f16c,prefer-vector-width=512")

#define FPC_INLINE static inline __attribute__((always_inline))
#define FPC_INLINE_MEMBER inline __attribute__((always_inline))
#define FPC_UNROLL _Pragma("GCC unroll 16")

namespace {

typedef __m512i I;
typedef __m512 F;

#include "avx512_common.h"

#include "avx512_int8.h"

#include "avx512_bf16.h"

#include "avx512_f32.h"

}  // namespace

Kernels kernels_avx512(const Gemm& gemm) {
    switch (gemm.weights.arithmetic) {
        case FPC_INT8: return int8_kernels(gemm);
        case FPC_BF16: return bf16_kernels(gemm);
        default: return f32_kernels(gemm);
    }
}

#pragma GCC pop_options
#endif
