// Products of fp32.

#include "gemm.h"

#if defined(__x86_64__)
#include "gemm_avx512.h"
#include "gemm_avx512_halves.h"

namespace {

// A nibble is the index of its value among sixteen; only four bits of an index count.
struct Nibbles {
    static constexpr int64_t kStride = kOctet;
    F table;

    explicit Nibbles(const Gemm& gemm) : table(_mm512_loadu_ps(gemm.weights.values)) {}
    FPC_INLINE_MEMBER I codes(const uint8_t* at) const { return load(at); }
    // Input j is in byte j % 4, in its low half if j < 4.
    FPC_INLINE_MEMBER F value(I codes, int j) const {
        return _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 8 * (j % 4) + 4 * (j / 4)), table);
    }
};

// bf16 holds the values of all formats of up to eight bits.
struct Bytes {
    static constexpr int64_t kStride = 2 * kOctet;
    const BytePairs pairs;

    struct Codes {
        BytePairs::Codes inputs[2];  // the first four, and the others
    };

    explicit Bytes(const Gemm& gemm) : pairs(gemm) {}
    FPC_INLINE_MEMBER Codes codes(const uint8_t* at) const {
        return {{pairs.codes(at, 0), pairs.codes(at, 1)}};
    }
    // Words are the upper halves of fp32.
    FPC_INLINE_MEMBER F value(const Codes& codes, int j) const {
        const I both = pairs.pair(codes.inputs[j / 4], j % 2 * 2);
        const I low = _mm512_slli_epi32(both, 16);
        const I high = _mm512_and_si512(both, _mm512_set1_epi32((int)0xFFFF0000));
        return _mm512_castsi512_ps(j % 4 < 2 ? low : high);
    }
};

template <int kM, int kV, bool kGroups, class Source>
FPC_INLINE void f32_tile(const Gemm& gemm, const Task& task, int first, int64_t m) {
    const FpcWeights& weights = gemm.weights;
    const Layout& layout = gemm.layout;
    const Source source(gemm);
    const float* a[kM];
    F sum[kM][kV];
    FPC_UNROLL for (int i = 0; i < kM; i++) {
        a[i] = (const float*)(gemm.activations.a + (m + i) * gemm.activations.stride);
        FPC_UNROLL for (int v = 0; v < kV; v++) sum[i][v] = _mm512_setzero_ps();
    }
    const uint8_t* group = gemm.block(task.block);
    int64_t input = 0;
    for (int64_t g = 0; g < layout.groups; g++, group += layout.group_bytes) {
        F scale[kV];
        if (kGroups)
            FPC_UNROLL for (int v = 0; v < kV; v++)
                scale[v] = weight_scales(group, weights.block_scale, first + v);
        const uint8_t* octet = group + layout.scale_bytes + 64 * first;
        for (int64_t o = 0; o < layout.octets; o++, octet += Source::kStride, input += 8) {
            FPC_UNROLL for (int v = 0; v < kV; v++) {
                const auto codes = source.codes(octet + 64 * v);
                FPC_UNROLL for (int j = 0; j < 8; j++) {
                    F value = source.value(codes, j);
                    if (kGroups) value = _mm512_mul_ps(value, scale[v]);
                    FPC_UNROLL for (int i = 0; i < kM; i++)
                        sum[i][v] = _mm512_fmadd_ps(value, _mm512_set1_ps(a[i][input + j]), sum[i][v]);
                }
            }
        }
    }
    const F unit = _mm512_set1_ps(scale_unit(weights));
    const int64_t n = task.block * kBlock + 16 * first;
    FPC_UNROLL for (int v = 0; v < kV; v++)
        FPC_UNROLL for (int i = 0; i < kM; i++)
            finish(gemm, m + i, n + 16 * v, _mm512_mul_ps(sum[i][v], unit));
}

template <int kV, bool kGroups, class Source>
struct F32Tiles {
    const Gemm& gemm;
    const Task& task;
    int first;

    template <int kM>
    void run(int64_t m) const {
        f32_tile<kM, kV, kGroups, Source>(gemm, task, first, m);
    }
};

template <bool kGroups, class Source>
void f32_task(const Gemm& gemm, const Task& task, uint8_t*) {
    if (task.count == 4)
        for_tiles<4>(task.begin, task.end, F32Tiles<4, kGroups, Source>{gemm, task, 0});
    else
        for_tiles<kRows>(task.begin, task.end, F32Tiles<2, kGroups, Source>{gemm, task, task.first});
}

template <class Source>
RunTask kernel_of(const Gemm& gemm) {
    return gemm.weights.group ? f32_task<true, Source> : f32_task<false, Source>;
}

}  // namespace

Kernels kernels_avx512_f32(const Gemm& gemm) {
    return {gemm.weights.code_bits == 4 ? kernel_of<Nibbles>(gemm) : kernel_of<Bytes>(gemm), 0};
}
#endif
