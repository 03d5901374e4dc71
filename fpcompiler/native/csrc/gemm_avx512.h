// What the kernels for AVX-512 share. From here to its end a file is compiled for AVX-512: what it
// shares with others is included before.
//
// Nothing fetches ahead: it was measured to be slower, see decision 56 of DESIGN.md.

#include "gemm.h"

#include <immintrin.h>
#include <string.h>

// The headers of GCC 12 use undefined vectors on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx512bf16,f16c,prefer-vector-width=512")

#define FPC_INLINE static inline __attribute__((always_inline))
#define FPC_INLINE_MEMBER inline __attribute__((always_inline))
#define FPC_UNROLL _Pragma("GCC unroll 16")

namespace {

typedef __m512i I;
typedef __m512 F;

constexpr int64_t kPanelBytes = 640 << 10;  // larger ones leave the cache of a core
constexpr int64_t kPanelRows = 112;         // from as many rows on a panel is worth it
constexpr int kRows = 6;                    // of activations that a tile has at most

FPC_INLINE I load(const void* from) { return _mm512_loadu_si512(from); }

FPC_INLINE I broadcast4(const void* from) {
    int32_t value;
    memcpy(&value, from, 4);
    return _mm512_set1_epi32(value);
}

// Sixteen scales of a group. Those of E4M3 are 2**-8 of what they should be.
FPC_INLINE F weight_scales(const uint8_t* group, int32_t format, int vector) {
    if (format < 0) return _mm512_set1_ps(1);
    if (format == FPC_F32) return _mm512_loadu_ps((const float*)group + 16 * vector);
    const __m128i codes = _mm_loadu_si128((const __m128i*)(group + 16 * vector));
    if (format == FPC_E8M0)
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(codes), 23));
    return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(codes), 7));
}

FPC_INLINE float scale_unit(const FpcWeights& weights) {
    return weights.block_scale == FPC_E4M3 ? 256 : 1;
}

FPC_INLINE __mmask16 first_lanes(int64_t count) {
    return count >= 16 ? 0xFFFF : (__mmask16)((1u << (count > 0 ? count : 0)) - 1);
}

// To bf16, rounding to nearest even; the instruction would flush subnormal numbers.
FPC_INLINE __m256i to_bf16(F value) {
    const I bits = _mm512_castps_si512(value);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const I sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16));
}

// Apply the scales of the token and of the outputs and the bias, each rounded as the definition
// does it (fpcompiler/runtime/reference.py), and store sixteen results.
FPC_INLINE void finish(const Gemm& gemm, int64_t m, int64_t n, F sum) {
    const FpcWeights& weights = gemm.weights;
    const __mmask16 lanes = first_lanes(weights.n - n);
    F value = _mm512_mul_ps(sum, _mm512_set1_ps(gemm.activations.token_scale[m]));
    value = _mm512_mul_ps(value, _mm512_loadu_ps(weights.row_scale + n));
    if (weights.bias) value = _mm512_add_ps(value, _mm512_loadu_ps(weights.bias + n));
    uint8_t* row = gemm.y + m * gemm.y_stride;
    if (gemm.output == FPC_INPUT_F32)
        _mm512_mask_storeu_ps((float*)row + n, lanes, value);
    else if (gemm.output == FPC_INPUT_BF16)
        _mm256_mask_storeu_epi16((uint16_t*)row + n, lanes, to_bf16(value));
    else
        _mm256_mask_storeu_epi16((uint16_t*)row + n, lanes, _mm512_cvtps_ph(value, 8));
}

#include "tiles.h"

}  // namespace
