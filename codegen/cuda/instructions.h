// The instructions of the GPU that kernels use. Everything else here is plain C++, so that tests
// can compile it for the CPU, with functions of the same names in place of these.
//
// Arithmetic goes through functions that round once each: the compiler neither fuses them nor
// depends on its flags for division. Only -ftz=true would change results.

#include <stdint.h>
#include <string.h>

#define FPC_DEVICE __device__ __forceinline__

namespace fpc {

FPC_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
FPC_DEVICE float subtract(float a, float b) { return __fsub_rn(a, b); }
FPC_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
FPC_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FPC_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
FPC_DEVICE float reciprocal(float a) { return __frcp_rn(a); }
FPC_DEVICE float root(float a) { return __fsqrt_rn(a); }
FPC_DEVICE double add(double a, double b) { return __dadd_rn(a, b); }
FPC_DEVICE double multiply(double a, double b) { return __dmul_rn(a, b); }

FPC_DEVICE int32_t bits_of(float a) { return __float_as_int(a); }
FPC_DEVICE float float_of(int32_t a) { return __int_as_float(a); }

// The smaller number; `b` if `a` is NaN.
FPC_DEVICE float smaller(float a, float b) { return fminf(a, b); }
FPC_DEVICE int32_t larger(int32_t a, int32_t b) { return max(a, b); }

// The larger magnitude; NaN if one of them is.
FPC_DEVICE float larger_magnitude(float a, float b) {
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(fabsf(a)), "f"(fabsf(b)));
    return result;
}

// --- 16-bit numbers ----------------------------------------------------------------------------

FPC_DEVICE float from_f16(uint16_t bits) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(bits));
    return result;
}

// Two numbers rounded to 16 bits, the first one in the low bits.
FPC_DEVICE uint32_t f16_pair(float first, float second) {
    uint32_t result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
    return result;
}

FPC_DEVICE uint32_t bf16_pair(float first, float second) {
    uint32_t result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
    return result;
}

// Values rounded to 16 bits, by the instructions for two: those for one take four times as long.
FPC_DEVICE float rounded_to_f16(float value) { return from_f16((uint16_t)f16_pair(value, 0)); }

FPC_DEVICE float rounded_to_bf16(float value) {
    return float_of((int32_t)bf16_pair(0, value));  // in the high half, and zeros: an fp32
}

// --- codes of two numbers, the first one in the low bits ---------------------------------------

// The sum and the four signed bytes of a word.
FPC_DEVICE int32_t plus_bytes(uint32_t word, int32_t sum) {
    return __dp4a((int32_t)word, 0x01010101, sum);
}

// Two E4M3 codes of 8 bits.
FPC_DEVICE uint32_t e4m3_pair(float first, float second) {
    uint16_t result;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(result) : "f"(second), "f"(first));
    return result;
}

#if FPC_CONVERTS >= 2
// Two E2M1 codes of 4 bits.
FPC_DEVICE uint32_t e2m1_pair(float first, float second) {
    uint32_t result;
    asm("{ .reg .b8 pair; cvt.rn.satfinite.e2m1x2.f32 pair, %1, %2; cvt.u32.u8 %0, pair; }"
        : "=r"(result)
        : "f"(second), "f"(first));
    return result;
}

// Two codes of 6 bits; the instruction gives each a byte.
FPC_DEVICE uint32_t e2m3_pair(float first, float second) {
    uint16_t bytes;
    asm("cvt.rn.satfinite.e2m3x2.f32 %0, %1, %2;" : "=h"(bytes) : "f"(second), "f"(first));
    return (bytes & 0x3Fu) | (bytes >> 2 & 0xFC0u);
}

FPC_DEVICE uint32_t e3m2_pair(float first, float second) {
    uint16_t bytes;
    asm("cvt.rn.satfinite.e3m2x2.f32 %0, %1, %2;" : "=h"(bytes) : "f"(second), "f"(first));
    return (bytes & 0x3Fu) | (bytes >> 2 & 0xFC0u);
}
#endif

// --- memory ------------------------------------------------------------------------------------

struct alignas(16) Quad {
    uint32_t words[4];
};

struct alignas(8) Twin {
    uint32_t words[2];
};

// Volatile, and not by the cache for constants: an earlier kernel may still write what is read
// until `follow` returns.
FPC_DEVICE Quad load_quad(const void* from) {
    Quad q;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(q.words[0]), "=r"(q.words[1]), "=r"(q.words[2]), "=r"(q.words[3])
                 : "l"(from));
    return q;
}

// Have memory in the second cache when it is read.
FPC_DEVICE void prefetch(const void* from) {
    asm volatile("prefetch.global.L2 [%0];" : : "l"(from));
}

// Let the next kernel begin, and wait until earlier ones are through and what they wrote is there.
// The next one waits too before it touches what kernels share: for this one, and so for all before
// it. Where a kernel is not launched early, and before Hopper, this is nothing.
FPC_DEVICE void follow() {
#if FPC_FOLLOWS
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// --- other threads -----------------------------------------------------------------------------

// What the lane that differs in the bits of `mask` has. All 32 lanes take part.
FPC_DEVICE float exchange(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
FPC_DEVICE int32_t exchange(int32_t value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
FPC_DEVICE double exchange(double value, int mask) { return __shfl_xor_sync(~0u, value, mask); }

FPC_DEVICE void barrier() { __syncthreads(); }

// Memory of the block for `kCount` numbers.
template <class T, int kCount>
FPC_DEVICE T* block_memory() {
    __shared__ T memory[kCount];
    return memory;
}

// All threads of all blocks of a cluster take part: from Hopper on.
FPC_DEVICE void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// The same in two halves: what comes between them does not wait.
FPC_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
FPC_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// Leave a number in the memory of another block of the cluster, where this block has `own`. It is
// there behind a barrier of the cluster; the other block must have begun.
template <class T>
FPC_DEVICE void store_remote(T* own, int rank, T value) {
    constexpr int kWords = sizeof(T) / 4;
    static_assert(sizeof(T) == 4 * kWords, "");
    const uint32_t address = (uint32_t)__cvta_generic_to_shared(own);
    uint32_t words[kWords];
    memcpy(words, &value, sizeof value);
#pragma unroll
    for (int i = 0; i < kWords; i++)
        asm volatile(
            "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;\n"
            "st.shared::cluster.u32 [there], %2; }"
            :: "r"(address + 4 * i), "r"(rank), "r"(words[i])
            : "memory");
}

FPC_DEVICE void store_larger(int32_t* to, int32_t value) { atomicMax(to, value); }

// --- launches, on the CPU ----------------------------------------------------------------------

// The error of a call that failed, taken off the thread: whoever looks next would think it theirs.
inline cudaError_t taken(cudaError_t error) {
    if (error) cudaGetLastError();
    return error;
}

// Of the current device; 0 if there is none.
inline unsigned multiprocessors() {
    int device = 0, count = 0;
    if (taken(cudaGetDevice(&device))) return 0;
    return taken(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device)) ? 0 : count;
}

// Launch a kernel that follows others: its blocks may begin while those of the last one end, unless
// that was no kernel. `cluster`: blocks along x that can write to each other's memory.
template <class Arguments>
int32_t launch(void (*kernel)(Arguments), dim3 grid, dim3 block, const Arguments& arguments,
               void* stream, bool behind_kernel = true, unsigned cluster = 1) {
    cudaLaunchAttribute attributes[2] = {};
    unsigned count = 0;
    if (FPC_FOLLOWS && behind_kernel) {
        attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
        attributes[count].id = cudaLaunchAttributeClusterDimension;
        attributes[count].val.clusterDim.x = cluster;
        attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
        count++;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = block, config.stream = (cudaStream_t)stream;
    config.attrs = attributes, config.numAttrs = count;
    return taken(cudaLaunchKernelEx(&config, kernel, arguments));
}

inline const char* error_text(int32_t error) { return cudaGetErrorString((cudaError_t)error); }

inline int32_t set_zero(void* memory, size_t bytes, void* stream) {
    return taken(cudaMemsetAsync(memory, 0, bytes, (cudaStream_t)stream));
}

}  // namespace fpc
