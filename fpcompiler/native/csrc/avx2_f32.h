// Products of fp32 in vectors of 256 bits. Included by gemm_avx2.cpp only.
//
// A code is the index of its value among sixteen, which are in two vectors: the code's highest bit
// chooses between what its other three bits choose in each of them.

struct Values {
    F low, high;

    explicit Values(const FpcWeights& weights)
        : low(_mm256_loadu_ps(weights.values)), high(_mm256_loadu_ps(weights.values + 8)) {}

    // Of the input `j` of the eight of a vector of codes: it is in byte j % 4, in its low half if j < 4.
    FPC_INLINE_MEMBER F operator()(I codes, int j) const {
        const int bit = 8 * (j % 4) + 4 * (j / 4);
        const I index = _mm256_srli_epi32(codes, bit);
        const F sign = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28 - bit));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                _mm256_permutevar8x32_ps(high, index), sign);
    }
};

template <int kM>
struct FloatRows {
    const float* row[kM];

    FloatRows(const Gemm& gemm, int64_t m) {
        FPC_UNROLL for (int i = 0; i < kM; i++)
            row[i] = (const float*)(gemm.activations.a + (m + i) * gemm.activations.stride);
    }
};

template <int kM, int kV>
FPC_INLINE void store_sums(const Gemm& gemm, int64_t m, int64_t n, const F (&sum)[kM][kV]) {
    const F unit = _mm256_set1_ps(scale_unit(gemm.weights));
    FPC_UNROLL for (int i = 0; i < kM; i++)
        FPC_UNROLL for (int v = 0; v < kV; v++)
            finish(gemm, m + i, n + 8 * v, _mm256_mul_ps(sum[i][v], unit));
}

template <int kV, bool kGroups>
struct F32Tiles {
    const Gemm& gemm;
    const Task& task;
    int vector;

    template <int kM>
    void run(int64_t m) const {
        const Layout& layout = gemm.layout;
        const Values values(gemm.weights);
        const FloatRows<kM> a(gemm, m);
        F sum[kM][kV], scale[kV];
        FPC_UNROLL for (int i = 0; i < kM; i++)
            FPC_UNROLL for (int v = 0; v < kV; v++) sum[i][v] = _mm256_setzero_ps();
        const uint8_t* group = gemm.block(task.block);
        int64_t input = 0;
        for (int64_t g = 0; g < layout.groups; g++, group += layout.group_bytes) {
            if (kGroups)
                FPC_UNROLL for (int v = 0; v < kV; v++)
                    scale[v] = weight_scales(group, gemm.weights.block_scale, vector + v);
            const uint8_t* octet = group + layout.scale_bytes + 32 * vector;
            for (int64_t o = 0; o < layout.octets; o++, octet += kOctet, input += 8) {
                FPC_UNROLL for (int v = 0; v < kV; v++) {
                    const I codes = load(octet + 32 * v);
                    if (v % 2 == 0) fetch(octet + 32 * v + kAhead);
                    FPC_UNROLL for (int j = 0; j < 8; j++) {
                        F value = values(codes, j);
                        if (kGroups) value = _mm256_mul_ps(value, scale[v]);
                        FPC_UNROLL for (int i = 0; i < kM; i++)
                            sum[i][v] = _mm256_fmadd_ps(
                                value, _mm256_broadcast_ss(a.row[i] + input + j), sum[i][v]);
                    }
                }
            }
        }
        store_sums(gemm, m, task.block * kBlock + 8 * vector, sum);
    }
};

template <bool kGroups>
void f32_few(const Gemm& gemm, const Task& task, uint8_t*) {
    const int first = 2 * task.first, end = first + 2 * task.count;
    if (task.end - task.begin == 1)
        for (int v = first; v < end; v += 4)
            for_tiles<1>(task.begin, task.end, F32Tiles<4, kGroups>{gemm, task, v});
    else
        for (int v = first; v < end; v += 2)
            for_tiles<kRows>(task.begin, task.end, F32Tiles<2, kGroups>{gemm, task, v});
}

// --- panels -----------------------------------------------------------------------------------

// Decode sixteen outputs of a block: [inputs][2 vectors][8] values of fp32, scales included.
void decode_f32_panel(const Gemm& gemm, int64_t block, int vector, float* panel) {
    const Layout& layout = gemm.layout;
    const Values values(gemm.weights);
    const uint8_t* group = gemm.block(block);
    for (int64_t g = 0; g < layout.groups; g++, group += layout.group_bytes) {
        F scale[2];
        FPC_UNROLL for (int v = 0; v < 2; v++)
            scale[v] = weight_scales(group, gemm.weights.block_scale, vector + v);
        const uint8_t* octet = group + layout.scale_bytes + 32 * vector;
        for (int64_t o = 0; o < layout.octets; o++, octet += kOctet, panel += 8 * 16) {
            fetch(octet + kAhead);
            FPC_UNROLL for (int v = 0; v < 2; v++) {
                const I codes = load(octet + 32 * v);
                FPC_UNROLL for (int j = 0; j < 8; j++)
                    _mm256_store_ps(panel + 16 * j + 8 * v, _mm256_mul_ps(values(codes, j), scale[v]));
            }
        }
    }
}

struct F32PanelTiles {
    const Gemm& gemm;
    const float* panel;
    int64_t n;

    template <int kM>
    void run(int64_t m) const {
        const FloatRows<kM> a(gemm, m);
        const int64_t inputs = gemm.layout.inputs();
        F sum[kM][2];
        FPC_UNROLL for (int i = 0; i < kM; i++)
            FPC_UNROLL for (int v = 0; v < 2; v++) sum[i][v] = _mm256_setzero_ps();
        for (int64_t k = 0; k < inputs; k++) {
            const F low = _mm256_load_ps(panel + 16 * k), high = _mm256_load_ps(panel + 16 * k + 8);
            FPC_UNROLL for (int i = 0; i < kM; i++) {
                const F one = _mm256_broadcast_ss(a.row[i] + k);
                sum[i][0] = _mm256_fmadd_ps(low, one, sum[i][0]);
                sum[i][1] = _mm256_fmadd_ps(high, one, sum[i][1]);
            }
        }
        store_sums(gemm, m, n, sum);
    }
};

void f32_many(const Gemm& gemm, const Task& task, uint8_t* scratch) {
    float* panel = (float*)scratch;
    for (int v = 2 * task.first; v < 2 * (task.first + task.count); v += 2) {
        decode_f32_panel(gemm, task.block, v, panel);
        for_tiles<6>(task.begin, task.end,
                     F32PanelTiles{gemm, panel, task.block * kBlock + 8 * v});
    }
}

Kernels f32_kernels(const Gemm& gemm) {
    const int64_t bytes = gemm.layout.inputs() * 16 * 4;
    if (gemm.m > kRows) return {f32_many, bytes};
    return {gemm.weights.group ? f32_few<true> : f32_few<false>, 0};
}
