// A CUDA runtime for object files of CuTe DSL that runs nothing, and a program that calls a GEMM
// with it. CuTe DSL fills in tensor maps itself, so that they are shown as the words that the
// kernel would be given. ENTRY is the name of the function in the object file.
//
//   dsl_recorder M N K
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

// Addresses that are never read, 1 TB apart, as in recorder.cpp.
constexpr int tensor_shift = 40;
constexpr uint64_t tensors = 5;  // A, B, scales of A, scales of B, D
constexpr int words = 32;        // of a tensor map
constexpr int arguments = 12;    // of the kernel, which has more

void* address(uint64_t tensor) { return reinterpret_cast<void*>(tensor << tensor_shift); }

}  // namespace

extern "C" {

int ENTRY(void*, void*, void*, void*, void*, int32_t, int32_t, int32_t, int32_t, void*);

cudaError_t _cudaLibraryLoadData(void**, ...) { return cudaSuccess; }
cudaError_t _cudaLibraryGetKernel(void** kernel, void*, const char*) {
  static int some;
  *kernel = &some;
  return cudaSuccess;
}
cudaError_t _cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t _cudaDeviceGetAttribute(int* value, int, int) {
  *value = 227 << 10;  // it asks for the shared memory of a thread block
  return cudaSuccess;
}
int _cuKernelGetAttribute(int* value, ...) {
  *value = 0;
  return 0;
}
cudaError_t _cudaFuncSetAttribute(const void*, int, int) { return cudaSuccess; }
cudaError_t _cudaKernelSetAttributeForDevice(void*, int, int, int) { return cudaSuccess; }

cudaError_t _cudaLaunchKernelEx(const cudaLaunchConfig_t*, const void*, void** values) {
  for (int i = 0; i < arguments; ++i) {
    uint64_t base;
    std::memcpy(&base, values[i], sizeof base);
    const uint64_t tensor = base >> tensor_shift;
    if (tensor == 0 || tensor > tensors || base != tensor << tensor_shift) continue;
    uint32_t map[words];
    std::memcpy(map, values[i], sizeof map);
    std::printf("%llu", static_cast<unsigned long long>(tensor));
    for (const uint32_t word : map) std::printf(" %u", word);
    std::printf("\n");
  }
  return cudaSuccess;
}

}  // extern "C"

int main(int count, char** values) {
  if (count != 4) return 2;
  int32_t sizes[3];
  for (int i = 0; i < 3; ++i) sizes[i] = std::atoi(values[i + 1]);
  return ENTRY(address(1), address(2), address(3), address(4), address(5), sizes[0], sizes[1],
               sizes[2], 1, nullptr);
}
