// As much of CUDA as launches of kernels for Hopper need, on a computer without it: what is called
// is noted, and no kernel runs. Kernels compile too, once their instructions are taken out.

#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <string>

#define __device__
#define __host__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes)

using std::max;
using std::min;

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

static dim3 threadIdx, blockIdx, blockDim, gridDim;

// --- functions of kernels ----------------------------------------------------------------------

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return (uint32_t)((uint64_t)a * b >> 32); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline int32_t __float_as_int(float a) { return (int32_t)a; }
inline float __int_as_float(int32_t a) { return (float)a; }
inline int32_t __dp4a(int32_t, int32_t, int32_t sum) { return sum; }
inline size_t __cvta_generic_to_shared(const void* pointer) { return (size_t)pointer; }
inline int __shfl_sync(unsigned, int value, int) { return value; }
template <class T>
T __shfl_xor_sync(unsigned, T value, int) {
    return value;
}
template <class T>
T __ldg(const T* from) {
    return *from;
}
template <class T>
T __ldcg(const T* from) {
    return *from;
}
inline void __syncthreads() {}
inline void atomicMax(int32_t*, int32_t) {}

namespace fpc {
uint8_t memory[16];  // of blocks
}

// --- the runtime and the driver ----------------------------------------------------------------

// What was called, one letter each: attribute of a kernel, map encoded, launch.
static std::string calls;
static int shared_allowed, shared_launched, grid_launched;

typedef int cudaError_t;
typedef void* cudaStream_t;
typedef uint64_t cuuint64_t;
typedef uint32_t cuuint32_t;
struct CUtensorMap {
    char bytes[128];
};
enum CUtensorMapDataType {
    CU_TENSOR_MAP_DATA_TYPE_UINT8,
    CU_TENSOR_MAP_DATA_TYPE_UINT32,
    CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
    CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
};
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B };
enum { CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
       CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE, CUDA_SUCCESS = 0 };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault, cudaDevAttrMultiProcessorCount,
       cudaFuncAttributeMaxDynamicSharedMemorySize };
enum { cudaLaunchAttributeProgrammaticStreamSerialization, cudaLaunchAttributeClusterDimension };

struct cudaLaunchAttribute {
    int id;
    struct {
        int programmaticStreamSerializationAllowed;
        dim3 clusterDim;
    } val;
};

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

inline int cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                  const cuuint64_t*, const cuuint64_t* strides,
                                  const cuuint32_t* box, const cuuint32_t*, int,
                                  CUtensorMapSwizzle, int, int) {
    calls += 'M';
    return strides[0] % 16 != 0 || box[0] > 256 || box[1] > 256;
}

inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, int,
                                                    cudaDriverEntryPointQueryResult* result) {
    *function = (void*)cuTensorMapEncodeTiled;
    *result = cudaDriverEntryPointSuccess;
    return 0;
}

// The error that the next launch gives, and whether somebody took the last one.
static int next_error, last_error;
inline cudaError_t cudaGetLastError() {
    const int error = last_error;
    last_error = 0;
    return error;
}
inline const char* cudaGetErrorString(cudaError_t) { return "an error of CUDA"; }

inline cudaError_t cudaGetDevice(int*) { return 1; }  // there is none
inline cudaError_t cudaDeviceGetAttribute(int*, int, int) { return 1; }
inline cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return 1; }

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int value) {
    calls += 'A';
    shared_allowed = value;
    return value > 227 << 10;
}

template <class Kernel, class Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel, const Parameters& p) {
    calls += 'L';
    shared_launched = (int)config->dynamicSmemBytes;
    grid_launched = (int)config->gridDim.x;
    launched(p, *config);
    last_error = next_error;
    return next_error ? next_error : shared_launched > shared_allowed || config->gridDim.x == 0;
}
