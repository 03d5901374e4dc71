// The C interface of a library of packed weights: that of generated GEMMs, kernel_abi.h, with

//   a        rows of int8, E4M3 or bf16, K padded with zeros to a multiple of 128;
//   b        weights in fragments (problem.h), b_scales the scales of their blocks;
//   token_scale, for int8: m numbers, then the sums of the rows of A, int32;
//   residual null for none. Results are rounded to their type before it is added.
// A status of FPC_LAUNCH has 256 times the cudaError_t added to it.
// A function in front of the macro does all the work, so that the macro holds no code.

namespace fpc {

inline int64_t scale_bytes(int64_t n, int64_t k, int block) {
    return block ? (n + 15) / 16 * 16 * (k / block) : 0;
}

// For kInt8, a token's results do not depend on how many others there are: both kernels scale exact
// sums by the same steps. Sums of floating point are added in an order that depends on the number
// of tokens, and so do their last bits.
template <class P>
int32_t run(const FpcGemmArguments& a) {
    if (a.m == 0) return FPC_OK;
    const int32_t refused = refusal<P>(a);
    if (refused) return refused;
    int32_t status = FPC_OK;
    if (launch_few<P>(a, multiprocessors(a), status)) return status;
    return launch_many<P>(a);
}

}  // namespace fpc

#define FPC_LIBRARY(P)                                                                        \
    FPC_EXPORT int32_t fpc_gemm_abi() { return FPC_GEMM_ABI; }                                 \
    FPC_EXPORT int64_t fpc_gemm_workspace(int32_t, int32_t, int32_t, int32_t) { return 0; }    \
    FPC_EXPORT int64_t fpc_gemm_scale_bytes_a(int32_t, int32_t, int32_t) { return 0; }         \
    FPC_EXPORT int64_t fpc_gemm_scale_bytes_b(int32_t, int32_t n, int32_t k) {                 \
        return fpc::scale_bytes(n, k, P::kBlock);                                              \
    }                                                                                          \
    FPC_EXPORT const char* fpc_cuda_error_text(int32_t e) { return fpc::error_text(e); }       \
    FPC_EXPORT int32_t fpc_gemm_run(const FpcGemmArguments* a) { return fpc::run<P>(*a); }
