// Products of fp32. Included by gemm_avx512.cpp only.
//
// A code is the index of its value among sixteen; only four bits of an index count.

template <int kM, int kV, bool kGroups>
FPC_INLINE void f32_tile(const Gemm& gemm, const Task& task, int first, int64_t m) {
    const FpcWeights& weights = gemm.weights;
    const Layout& layout = gemm.layout;
    const F table = _mm512_loadu_ps(weights.values);
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
        for (int64_t o = 0; o < layout.octets; o++, octet += kOctet, input += 8) {
            FPC_UNROLL for (int v = 0; v < kV; v++) {
                const I codes = load(octet + 64 * v);
                fetch(octet + 64 * v + kAhead);
                FPC_UNROLL for (int j = 0; j < 8; j++) {
                    // Input j is in byte j % 4, in its low half if j < 4.
                    const I index = _mm512_srli_epi32(codes, 8 * (j % 4) + 4 * (j / 4));
                    F value = _mm512_permutexvar_ps(index, table);
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

template <int kV, bool kGroups>
struct F32Tiles {
    const Gemm& gemm;
    const Task& task;
    int first;

    template <int kM>
    void run(int64_t m) const {
        f32_tile<kM, kV, kGroups>(gemm, task, first, m);
    }
};

template <bool kGroups>
void f32_task(const Gemm& gemm, const Task& task, uint8_t*) {
    if (task.count == 4)
        for_tiles<4>(task.begin, task.end, F32Tiles<4, kGroups>{gemm, task, 0});
    else
        for_tiles<kRows>(task.begin, task.end, F32Tiles<2, kGroups>{gemm, task, task.first});
}

Kernels f32_kernels(const Gemm& gemm) {
    return {gemm.weights.group ? f32_task<true> : f32_task<false>, 0};
}
