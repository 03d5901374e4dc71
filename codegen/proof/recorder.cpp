// A CUDA runtime that runs nothing and writes down what it is asked for, and a program that calls a
// generated GEMM with it. Linked with the kernel's object file in place of libcudart, on a machine
// without a GPU or a driver; a function of the runtime that is missing here fails to link.
//
//   recorder M N K SMS WORKSPACE SCALES RESIDUAL
//
// prints a JSON object per line: the tensor maps, the launch, and what the call returned.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernel_abi.h"
#include "quantize_abi.h"

extern "C" int32_t fpc_gemm_run(const FpcGemmArguments*);

namespace {

// Addresses that are never read: each tensor gets 1 TB, so that an address tells which one it is.
enum Tensor : uintptr_t {
  A = 1, A_SCALES, B, B_SCALES, D, RESIDUAL, VECTORS, WORKSPACE, D_SCALES, STATUS, TENSORS
};
constexpr const char* tensor_names[TENSORS] = {
    "null", "a", "a_scales", "b", "b_scales", "d", "residual", "vectors", "workspace", "d_scales",
    "status"};
constexpr int tensor_shift = 40;

void* address(Tensor tensor) { return reinterpret_cast<void*>(tensor << tensor_shift); }

const char* name_of(const void* pointer) {
  const auto tensor = reinterpret_cast<uintptr_t>(pointer) >> tensor_shift;
  return tensor < TENSORS ? tensor_names[tensor] : "unknown";
}

uint64_t offset_of(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) & ((uintptr_t{1} << tensor_shift) - 1);
}

template <class Number>
void print_list(const char* name, const Number* values, unsigned count) {
  std::printf(", \"%s\": [", name);
  for (unsigned i = 0; i < count; ++i) {
    std::printf("%s%llu", i ? ", " : "", static_cast<unsigned long long>(values[i]));
  }
  std::printf("]");
}

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                      const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* steps, CUtensorMapInterleave interleave,
                      CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  std::printf("{\"event\": \"tensor_map\", \"tensor\": \"%s\", \"offset\": %llu, \"type\": %d",
              name_of(base), static_cast<unsigned long long>(offset_of(base)), type);
  print_list("sizes", sizes, rank);
  print_list("strides", strides, rank - 1);  // of the first axis it is that of an element
  print_list("box", box, rank);
  print_list("steps", steps, rank);
  std::printf(", \"interleave\": %d, \"swizzle\": %d}\n", interleave, swizzle);
  std::memset(map, 0, sizeof *map);
  return CUDA_SUCCESS;
}

dim3 cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) {
      const auto& size = config.attrs[i].val.clusterDim;
      return {size.x, size.y, size.z};
    }
  }
  return {1, 1, 1};
}

cudaError_t launch(dim3 grid, dim3 cluster, dim3 block, size_t shared_memory) {
  const unsigned sizes[][3] = {{grid.x, grid.y, grid.z},
                               {cluster.x, cluster.y, cluster.z},
                               {block.x, block.y, block.z}};
  std::printf("{\"event\": \"launch\"");
  print_list("grid", sizes[0], 3);
  print_list("cluster", sizes[1], 3);
  print_list("block", sizes[2], 3);
  std::printf(", \"shared_memory\": %zu}\n", shared_memory);
  return cudaSuccess;
}

// Between kernel<<<...>>> and the launch, the runtime keeps the configuration.
dim3 pushed_grid, pushed_block;
size_t pushed_shared_memory;
cudaStream_t pushed_stream;
int sm_count;

}  // namespace

extern "C" {

// ---- The runtime: what the object file calls -------------------------------------------------
void** __cudaRegisterFatBinary(void* image) {
  static void* handle;
  handle = image;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_memory, CUstream_st* s) {
  pushed_grid = grid, pushed_block = block, pushed_shared_memory = shared_memory, pushed_stream = s;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_memory, void* s) {
  *grid = pushed_grid, *block = pushed_block, *shared_memory = pushed_shared_memory;
  *static_cast<cudaStream_t*>(s) = pushed_stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3 grid, dim3 block, void**, size_t shared_memory,
                               cudaStream_t) {
  return launch(grid, {1, 1, 1}, block, shared_memory);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  return launch(config->gridDim, cluster_of(*config), config->blockDim, config->dynamicSmemBytes);
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  std::printf("{\"event\": \"function_attribute\", \"attribute\": %d, \"value\": %d}\n", attribute,
              value);
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMultiProcessorCount) return cudaErrorInvalidValue;
  *value = sm_count;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(encode_tiled) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return known ? cudaSuccess : cudaErrorSymbolNotFound;
}

}  // extern "C"

int main(int count, char** values) {
  if (count != 8) return 2;
  long numbers[7];
  for (int i = 0; i < 7; ++i) numbers[i] = std::strtol(values[i + 1], nullptr, 10);
  const auto [m, n, k, sms, workspace, scales, residual] = numbers;
  sm_count = static_cast<int>(sms);

  // Kernels that give their output itself look at the first part only.
  FpcQuantizingArguments args{};
  args.d_scales = address(D_SCALES), args.status = static_cast<int32_t*>(address(STATUS));
  args.a = address(A), args.b = address(B), args.d = address(D);
  if (scales) args.a_scales = address(A_SCALES), args.b_scales = address(B_SCALES);
  if (residual) args.residual = address(RESIDUAL);
  args.token_scale = args.row_scale = args.bias = static_cast<const float*>(address(VECTORS));
  args.alpha = 1.0f;
  args.m = static_cast<int32_t>(m), args.n = static_cast<int32_t>(n);
  args.k = static_cast<int32_t>(k), args.sm_count = sm_count;
  args.workspace = workspace ? address(WORKSPACE) : nullptr;
  args.workspace_bytes = static_cast<size_t>(workspace);
  std::printf("{\"event\": \"return\", \"status\": %d}\n", fpc_gemm_run(&args));
  return 0;
}
