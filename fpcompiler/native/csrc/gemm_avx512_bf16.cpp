// Products of bf16 (vdpbf16ps).
//
// An octet of an output is decoded to four words of two inputs: 0 and 2, 4 and 6, 1 and 3, 5 and 7;
// activations are stored in that order.

#include "gemm.h"

#if defined(__x86_64__)
#include "gemm_avx512.h"
#include "gemm_avx512_halves.h"

namespace {

FPC_INLINE F dot2(F sum, I weights, I activations) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)activations);
}

// With few rows a sum is in several parts, which do not wait for each other.
template <int kM>
constexpr int kParts = kM == 1 ? 4 : kM == 2 ? 2 : 1;

// Two inputs of a tile: decoded once, then multiplied with one row after the other.
template <int kM, int kV, class Source>
FPC_INLINE void add_pairs(const Source& source, const typename Source::Codes (&codes)[kV], int s,
                          const uint16_t* const (&a)[kM], int64_t input, F (&sum)[kM][kV]) {
    I pair[kV];
    FPC_UNROLL for (int v = 0; v < kV; v++) pair[v] = source.pair(codes[v], s);
    FPC_UNROLL for (int i = 0; i < kM; i++) {
        const I two = broadcast4(a[i] + input + 2 * s);
        FPC_UNROLL for (int v = 0; v < kV; v++) sum[i][v] = dot2(sum[i][v], pair[v], two);
    }
}

template <int kM, int kV, bool kGroups, class Source>
FPC_INLINE void bf16_tile(const Gemm& gemm, const Task& task, int first, int64_t m) {
    constexpr int kP = kParts<kM>;
    const FpcWeights& weights = gemm.weights;
    const Layout& layout = gemm.layout;
    const Source source(gemm);
    const uint16_t* a[kM];
    F sum[kP][kM][kV], total[kM][kV];
    FPC_UNROLL for (int i = 0; i < kM; i++) {
        a[i] = (const uint16_t*)(gemm.activations.a + (m + i) * gemm.activations.stride);
        FPC_UNROLL for (int v = 0; v < kV; v++) total[i][v] = _mm512_setzero_ps();
    }
    const uint8_t* group = gemm.block(task.block);
    int64_t input = 0;
    for (int64_t g = 0; g < layout.groups; g++, group += layout.group_bytes) {
        FPC_UNROLL for (int p = 0; p < kP; p++)
            FPC_UNROLL for (int i = 0; i < kM; i++)
                FPC_UNROLL for (int v = 0; v < kV; v++) sum[p][i][v] = _mm512_setzero_ps();
        const uint8_t* octet = group + layout.scale_bytes + 64 * first;
        for (int64_t o = 0; o < layout.octets; o++, octet += Source::kStride, input += 8) {
            FPC_UNROLL for (int t = 0; t < Source::kTurns; t++) {
                typename Source::Codes codes[kV];
                FPC_UNROLL for (int v = 0; v < kV; v++) codes[v] = source.codes(octet + 64 * v, t);
                FPC_UNROLL for (int s = t; s < 4; s += Source::kTurns)
                    add_pairs<kM, kV>(source, codes, s, a, input, sum[s % kP]);
            }
        }
        FPC_UNROLL for (int v = 0; v < kV; v++) {
            const F scale = kGroups ? weight_scales(group, weights.block_scale, first + v)
                                    : _mm512_set1_ps(1);
            FPC_UNROLL for (int i = 0; i < kM; i++) {
                FPC_UNROLL for (int p = 1; p < kP; p++)
                    sum[0][i][v] = _mm512_add_ps(sum[0][i][v], sum[p][i][v]);
                total[i][v] = kGroups ? _mm512_fmadd_ps(sum[0][i][v], scale, total[i][v])
                                      : sum[0][i][v];
            }
        }
    }
    const F unit = _mm512_set1_ps(scale_unit(weights));
    const int64_t n = task.block * kBlock + 16 * first;
    FPC_UNROLL for (int v = 0; v < kV; v++)
        FPC_UNROLL for (int i = 0; i < kM; i++)
            finish(gemm, m + i, n + 16 * v, _mm512_mul_ps(total[i][v], unit));
}

template <int kV, bool kGroups, class Source>
struct Bf16Tiles {
    const Gemm& gemm;
    const Task& task;
    int first;

    template <int kM>
    void run(int64_t m) const {
        bf16_tile<kM, kV, kGroups, Source>(gemm, task, first, m);
    }
};

template <bool kGroups, class Source>
void bf16_task(const Gemm& gemm, const Task& task, uint8_t*) {
    constexpr int kMost = kGroups ? 3 : kRows;  // registers hold two sums where there are groups
    if (task.count == 4)
        for_tiles<kMost>(task.begin, task.end, Bf16Tiles<4, kGroups, Source>{gemm, task, 0});
    else
        for_tiles<kRows>(task.begin, task.end, Bf16Tiles<2, kGroups, Source>{gemm, task, task.first});
}

// --- panels -----------------------------------------------------------------------------------

// Both halves of each lane times the lane's scale, where that is exact.
FPC_INLINE I scaled_pair(I pair, F scale) {
    const I mask = _mm512_set1_epi32((int)0xFFFF0000);
    const F high = _mm512_castsi512_ps(_mm512_and_si512(pair, mask));
    const F low = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
    const I scaled_high = _mm512_castps_si512(_mm512_mul_ps(high, scale));
    const I scaled_low = _mm512_castps_si512(_mm512_mul_ps(low, scale));
    return _mm512_or_si512(scaled_high, _mm512_srli_epi32(scaled_low, 16));
}

// Decode a block: [octets][4 pairs][4 vectors][64 bytes], scales included.
template <class Source>
void decode_panel(const Gemm& gemm, int64_t block, uint8_t* panel) {
    const Layout& layout = gemm.layout;
    const Source source(gemm);
    const uint8_t* group = gemm.block(block);
    for (int64_t g = 0; g < layout.groups; g++, group += layout.group_bytes) {
        F scale[4];
        FPC_UNROLL for (int v = 0; v < 4; v++)
            scale[v] = weight_scales(group, gemm.weights.block_scale, v);
        const uint8_t* octet = group + layout.scale_bytes;
        for (int64_t o = 0; o < layout.octets; o++, octet += Source::kStride, panel += 4 * kOctet)
            FPC_UNROLL for (int v = 0; v < 4; v++)
                FPC_UNROLL for (int s = 0; s < 4; s++) {
                    I pair = source.pair(source.codes(octet + 64 * v, s % Source::kTurns), s);
                    if (layout.scale_bytes) pair = scaled_pair(pair, scale[v]);
                    _mm512_store_si512(panel + kOctet * s + 64 * v, pair);
                }
    }
}

struct Bf16PanelTiles {
    const Gemm& gemm;
    const uint8_t* panel;
    int64_t n;

    template <int kM>
    void run(int64_t m) const {
        const uint16_t* a[kM];
        F sum[kM][4];
        FPC_UNROLL for (int i = 0; i < kM; i++) {
            a[i] = (const uint16_t*)(gemm.activations.a + (m + i) * gemm.activations.stride);
            FPC_UNROLL for (int v = 0; v < 4; v++) sum[i][v] = _mm512_setzero_ps();
        }
        const int64_t pairs = gemm.layout.inputs() / 2;
        for (int64_t p = 0; p < pairs; p++) {
            I weights[4];
            FPC_UNROLL for (int v = 0; v < 4; v++) weights[v] = load(panel + kOctet * p + 64 * v);
            FPC_UNROLL for (int i = 0; i < kM; i++) {
                const I two = broadcast4(a[i] + 2 * p);
                FPC_UNROLL for (int v = 0; v < 4; v++) sum[i][v] = dot2(sum[i][v], weights[v], two);
            }
        }
        const F unit = _mm512_set1_ps(scale_unit(gemm.weights));
        FPC_UNROLL for (int v = 0; v < 4; v++)
            FPC_UNROLL for (int i = 0; i < kM; i++)
                finish(gemm, m + i, n + 16 * v, _mm512_mul_ps(sum[i][v], unit));
    }
};

template <class Source>
void bf16_panel_task(const Gemm& gemm, const Task& task, uint8_t* panel) {
    decode_panel<Source>(gemm, task.block, panel);
    for_tiles<kRows>(task.begin, task.end, Bf16PanelTiles{gemm, panel, task.block * kBlock});
}

// Whether bf16 holds the products of weights and their scales.
bool holds_scaled(const FpcWeights& weights) {
    constexpr int32_t kDigits = 8, kScaleDigits = 4;  // of bf16, and of E4M3
    if (!weights.group || weights.block_scale == FPC_E8M0) return true;
    return weights.block_scale == FPC_E4M3 && weights.digits + kScaleDigits <= kDigits;
}

template <class Source>
Kernels kernels_of(const Gemm& gemm) {
    const bool groups = gemm.weights.group;
    const int64_t bytes = gemm.layout.inputs() * kBlock * 2, rows = groups ? 24 : kPanelRows;
    if (holds_scaled(gemm.weights) && gemm.m >= rows && bytes <= kPanelBytes)
        return {bf16_panel_task<Source>, bytes};
    return {groups ? bf16_task<true, Source> : bf16_task<false, Source>, 0};
}

}  // namespace

Kernels kernels_avx512_bf16(const Gemm& gemm) {
    return gemm.weights.code_bits == 4 ? kernels_of<NibblePairs>(gemm) : kernels_of<BytePairs>(gemm);
}
#endif
