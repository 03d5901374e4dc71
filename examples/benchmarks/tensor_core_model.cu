// A GEMM of one wgmma after the other along K, so that the order of all additions is known.
//
// A [M, K] and B [N, K] are rows of E4M3 or bf16, D [M, N] is fp32. M is a multiple of 64, N of 8,
// and a row of 32 bytes, which is the K of one instruction in either type. A block of 128 threads
// computes 64 x 8 numbers.

#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kRows = 64;
constexpr int kColumns = 8;
constexpr int kStep = 32;   // bytes of K
constexpr int kChunk = 16;  // bytes of a row of a core matrix, 8 rows by 16 bytes

// Shared memory without swizzling: the two core matrices along K are `along_k` bytes apart, those
// along M or N 128 (PTX ISA, "Matrix Descriptor Format" of wgmma).
__device__ uint64_t descriptor(const void* tile, int along_k) {
  const uint64_t address = __cvta_generic_to_shared(tile);
  return (address & 0x3FFFF) >> 4 | uint64_t(along_k >> 4) << 16 | uint64_t(128 >> 4) << 32;
}

__device__ void multiply_e4m3(float (&d)[4], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0, %1, %2, %3}, %4, %5, add, 1, 1;\n"
      "}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "l"(a), "l"(b));
}

__device__ void multiply_bf16(float (&d)[4], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, add, 1, 1, "
      "0, 0;\n"
      "}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "l"(a), "l"(b));
}

template <bool kBf16>
__global__ void gemm(const uint8_t* a, const uint8_t* b, float* d, int n, int row_bytes) {
  __shared__ alignas(128) uint8_t tile_a[kRows * kStep];
  __shared__ alignas(128) uint8_t tile_b[kColumns * kStep];
  const int thread = threadIdx.x;
  const int row = thread / 2, chunk = thread % 2;
  const uint8_t* from_a = a + int64_t(blockIdx.x * kRows + row) * row_bytes + chunk * kChunk;
  const uint8_t* from_b = b + int64_t(blockIdx.y * kColumns + row) * row_bytes + chunk * kChunk;
  float sum[4] = {0.f, 0.f, 0.f, 0.f};

  for (int k = 0; k < row_bytes; k += kStep) {
    *reinterpret_cast<uint4*>(tile_a + chunk * kRows * kChunk + row * kChunk) =
        *reinterpret_cast<const uint4*>(from_a + k);
    if (row < kColumns)
      *reinterpret_cast<uint4*>(tile_b + chunk * kColumns * kChunk + row * kChunk) =
          *reinterpret_cast<const uint4*>(from_b + k);
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
    __syncthreads();
    asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
    const uint64_t left = descriptor(tile_a, kRows * kChunk);
    const uint64_t right = descriptor(tile_b, kColumns * kChunk);
    if constexpr (kBf16) multiply_bf16(sum, left, right);
    if constexpr (!kBf16) multiply_e4m3(sum, left, right);
    asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;\n"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])::"memory");
    __syncthreads();
  }

  // Each warp has 16 rows; a thread has two neighbours in each of two rows that are 8 apart.
  const int lane = thread % 32;
  const int first = blockIdx.x * kRows + thread / 32 * 16 + lane / 4;
  const int column = blockIdx.y * kColumns + lane % 4 * 2;
  for (int i = 0; i < 4; ++i) d[int64_t(first + i / 2 * 8) * n + column + i % 2] = sum[i];
}

}  // namespace

// Returns 0, or the error of the CUDA runtime.
extern "C" __attribute__((visibility("default"))) int wgmma_gemm(
    const uint8_t* a, const uint8_t* b, float* d, int m, int n, int row_bytes, int bf16,
    cudaStream_t stream) {
  const dim3 blocks(m / kRows, n / kColumns);
  if (bf16) gemm<true><<<blocks, 128, 0, stream>>>(a, b, d, n, row_bytes);
  if (!bf16) gemm<false><<<blocks, 128, 0, stream>>>(a, b, d, n, row_bytes);
  return cudaGetLastError();
}
