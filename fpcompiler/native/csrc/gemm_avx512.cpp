// Kernels for AVX-512 with VNNI: those of each arithmetic have a file of their own.

#include "gemm.h"

#if defined(__x86_64__)
Kernels kernels_avx512(const Gemm& gemm) {
    switch (gemm.weights.arithmetic) {
        case FPC_INT8: return kernels_avx512_int8(gemm);
        case FPC_BF16: return kernels_avx512_bf16(gemm);
        default: return kernels_avx512_f32(gemm);
    }
}
#endif
