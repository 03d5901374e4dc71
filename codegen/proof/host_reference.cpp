// CUTLASS's host reference on packed buffers: its numeric types, its iterators over codes of less
// than a byte, its layout of block scales and its GEMM, compiled by a C++ compiler without CUDA.
//
// Types are numbered as in host_reference.py. Every function returns 0, or -1 for a type that it
// does not know.

#include <cuda_runtime.h>

#include <cstdint>
#include <tuple>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/detail/sm100_blockscaled_layout.hpp"
#include "cutlass/numeric_types.h"
#include "cutlass/util/reference/host/gett.hpp"
#include "cutlass/version.h"

#define FPC_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using Elements = std::tuple<cutlass::float_e2m1_t, cutlass::float_e2m3_t, cutlass::float_e3m2_t,
                            cutlass::float_e4m3_t>;
using Types = std::tuple<cutlass::float_e2m1_t, cutlass::float_e2m3_t, cutlass::float_e3m2_t,
                         cutlass::float_e4m3_t, cutlass::float_e5m2_t, cutlass::float_ue8m0_t,
                         cutlass::float_ue4m3_t>;
constexpr int kUnscaled = -1;
constexpr int kUE8M0 = 5;
constexpr int kUE4M3 = 6;

// The fields of struct Problem in host_reference.py, in the same order.
struct Problem {
  const void *a, *scales_a, *b, *scales_b;
  float* d;
  int m, n, k;
  float alpha;
};

template <class Element>
auto operand(const void* data, int rows, int k) {
  auto layout = cute::make_layout(cute::make_shape(rows, k, 1),
                                  cute::make_stride(int64_t(k), cute::_1{}, int64_t(0)));
  return cute::make_tensor(cute::recast_ptr<Element>(const_cast<void*>(data)), layout);
}

template <class MainloopParams>
void multiply(const MainloopParams& mainloop, const Problem& p) {
  auto layout = cute::make_layout(cute::make_shape(p.m, p.n, 1),
                                  cute::make_stride(int64_t(p.n), cute::_1{}, int64_t(0)));
  auto d = cute::make_tensor(p.d, layout);
  // C is D with beta = 0. It is still read, so that D must not hold NaN before.
  cutlass::reference::host::GettBlockScalingEpilogueParams<float, float, float, decltype(d),
                                                           decltype(d)>
      epilogue{p.alpha, 0.f, d, d};
  cutlass::reference::host::Gemm3x(mainloop, epilogue);
}

template <class A, class B>
void unscaled(const Problem& p) {
  auto a = operand<A>(p.a, p.m, p.k);
  auto b = operand<B>(p.b, p.n, p.k);
  cutlass::reference::host::GettMainloopParams<float, decltype(a), decltype(b)> mainloop{a, b};
  multiply(mainloop, p);
}

template <class A, class B, class Scale, int kBlock>
void block_scaled(const Problem& p) {
  using Config = cutlass::detail::Sm1xxBlockScaledConfig<kBlock>;
  auto shape = cute::make_shape(p.m, p.n, p.k, 1);
  auto a = operand<A>(p.a, p.m, p.k);
  auto b = operand<B>(p.b, p.n, p.k);
  auto scales_a = cute::make_tensor(static_cast<Scale*>(const_cast<void*>(p.scales_a)),
                                    Config::tile_atom_to_shape_SFA(shape));
  auto scales_b = cute::make_tensor(static_cast<Scale*>(const_cast<void*>(p.scales_b)),
                                    Config::tile_atom_to_shape_SFB(shape));
  cutlass::reference::host::GettBlockScalingMainloopParams<
      float, decltype(a), decltype(scales_a), decltype(b), decltype(scales_b)>
      mainloop{a, scales_a, b, scales_b};
  multiply(mainloop, p);
}

// Calls visit with a value of the type of an index; false if there is no such type.
template <class List, class Visit, int kIndex = 0>
bool with_type(int index, Visit visit) {
  if constexpr (kIndex == std::tuple_size_v<List>) {
    return false;
  } else {
    if (index != kIndex) return with_type<List, Visit, kIndex + 1>(index, visit);
    visit(std::tuple_element_t<kIndex, List>{});
    return true;
  }
}

template <class Run>
int with_elements(int a, int b, Run run) {
  bool known = false;
  with_type<Elements>(a, [&](auto first) {
    known = with_type<Elements>(b, [&](auto second) { run(first, second); });
  });
  return known ? 0 : -1;
}

template <int kBlock>
void indices(int rows, int k, bool weights, int64_t* out) {
  using Config = cutlass::detail::Sm1xxBlockScaledConfig<kBlock>;
  const auto fill = [&](auto layout) {
    for (int row = 0; row < rows; ++row)
      for (int i = 0; i < k; ++i) *out++ = layout(cute::make_coord(row, i, 0));
  };
  if (weights) fill(Config::tile_atom_to_shape_SFB(cute::make_shape(1, rows, k, 1)));
  if (!weights) fill(Config::tile_atom_to_shape_SFA(cute::make_shape(rows, 1, k, 1)));
}

}  // namespace

// UE8M0: a scale per 32 values; UE4M3: per 16, and for E2M1 by E2M1 only.
FPC_EXPORT int fpc_gemm(int type_a, int type_b, int scale_type, const Problem* problem) {
  const Problem& p = *problem;
  if (scale_type == kUE4M3 && type_a == 0 && type_b == 0) {
    block_scaled<cutlass::float_e2m1_t, cutlass::float_e2m1_t, cutlass::float_ue4m3_t, 16>(p);
    return 0;
  }
  if (scale_type != kUE8M0 && scale_type != kUnscaled) return -1;
  return with_elements(type_a, type_b, [&](auto a, auto b) {
    using A = decltype(a);
    using B = decltype(b);
    if (scale_type == kUE8M0) block_scaled<A, B, cutlass::float_ue8m0_t, 32>(p);
    if (scale_type == kUnscaled) unscaled<A, B>(p);
  });
}

// Values of packed codes.
FPC_EXPORT int fpc_decode(int type, const void* packed, float* values, int64_t count) {
  return with_type<Types>(type, [&](auto element) {
    using Element = decltype(element);
    auto codes = cute::make_tensor(cute::recast_ptr<Element>(const_cast<void*>(packed)),
                                   cute::make_layout(count));
    for (int64_t i = 0; i < count; ++i) {
      const Element value = codes(i);
      values[i] = float(value);
    }
  }) - 1;
}

// Codes of the nearest values, one in each byte.
FPC_EXPORT int fpc_encode(int type, const float* values, uint8_t* codes, int64_t count) {
  return with_type<Types>(type, [&](auto element) {
    using Element = decltype(element);
    for (int64_t i = 0; i < count; ++i) codes[i] = uint8_t(Element(values[i]).storage);
  }) - 1;
}

// Where the scale of each value stands: out[row * k + i], for blocks of 16 or 32.
FPC_EXPORT int fpc_scale_indices(int block, int rows, int k, int weights, int64_t* out) {
  if (block == 16) indices<16>(rows, k, weights, out);
  if (block == 32) indices<32>(rows, k, weights, out);
  return block == 16 || block == 32 ? 0 : -1;
}

FPC_EXPORT int fpc_cutlass_version() { return CUTLASS_VERSION; }
