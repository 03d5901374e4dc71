// The C interface of a generated GEMM. Nothing here needs torch, Python or CUDA headers.
#pragma once
#include <cstddef>
#include <cstdint>

#define FPC_GEMM_ABI 1
#define FPC_EXPORT extern "C" __attribute__((visibility("default")))

// What functions return: one of these, plus 256 times CUTLASS's own status where it gave one.
enum FpcStatus : int32_t {
  FPC_OK = 0,
  FPC_NULL_POINTER = 1,       // A, B or D, or scales or a residual that this kernel needs
  FPC_MISALIGNED = 2,         // A or B not at a multiple of 32 bytes, or another one of 16
  FPC_SMALL_WORKSPACE = 3,
  FPC_UNSUPPORTED_SHAPE = 4,  // M, N and K are not multiples of what the kernel needs
  FPC_INITIALIZE = 5,
  FPC_LAUNCH = 6,
};

// D[m,n] = activation(alpha * scalar_a * scalar_b * token[m] * row[n] * acc[m,n] + bias[n])
//          + residual[m,n]. All pointers are of device memory; null where a comment says so.
struct FpcGemmArguments {
  const void* a;             // [m, k], packed rows
  const void* a_scales;      // swizzled; null without block scales
  const void* b;             // [n, k], packed rows
  const void* b_scales;      // swizzled; null without block scales
  void* d;                   // [m, n], rows without gaps
  const void* residual;      // [m, n] like d, which it may be; null for kernels without
  const float* token_scale;  // [m]; null: 1
  const float* row_scale;    // [n]; null: 1
  const float* bias;         // [n]; null: 0
  const float* scalar_a;     // one number; null: 1
  const float* scalar_b;     // one number; null: 1
  float alpha;
  int32_t m, n, k;
  int32_t sm_count;          // SMs of the GPU; 0 asks the driver
  void* workspace;
  size_t workspace_bytes;
  void* stream;              // cudaStream_t
};
