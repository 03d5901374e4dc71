// Products of fp32 in vectors of 256 bits. Included by gemm_avx2.cpp only.
//
// A code is the index of its value among sixteen, which are in two vectors: the code's highest bit
// chooses between what its other three bits choose in each of them.

constexpr int64_t kF32Octets = 8;      // of a chunk: 16 KiB decoded
constexpr int64_t kF32FewOctets = 32;  // of one that is not: 8 KiB

struct Values {
    F low, high;

    explicit Values(const FpcWeights& weights)
        : low(_mm256_loadu_ps(weights.values)), high(_mm256_loadu_ps(weights.values + 8)) {}

    // Of input `j` of eight, whose code is in byte j % 4, in its low half if j < 4.
    FPC_INLINE_MEMBER F operator()(I codes, int j) const {
        const int bit = 8 * (j % 4) + 4 * (j / 4);
        const I index = _mm256_srli_epi32(codes, bit);
        const F highest = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28 - bit));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                _mm256_permutevar8x32_ps(high, index), highest);
    }
};

const float* float_row(const Gemm& gemm, int64_t m) {
    return (const float*)(gemm.activations.a + m * gemm.activations.stride);
}

// One row: add a chunk to four vectors of sums.
void add_row(const Gemm& gemm, const Chunk& chunk, const float* a, int vector, float* sums,
             Ahead& ahead) {
    const Layout& layout = gemm.layout;
    const Values values(gemm.weights);
    const uint8_t* group = chunk.at;
    F sum[4];
    FPC_UNROLL for (int v = 0; v < 4; v++) sum[v] = _mm256_loadu_ps(sums + 8 * v);
    for (int64_t g = 0; g < chunk.groups; g++, group += layout.group_bytes) {
        F part[4];
        FPC_UNROLL for (int v = 0; v < 4; v++) part[v] = _mm256_setzero_ps();
        const uint8_t* octet = group + layout.scale_bytes + 32 * vector;
        for (int64_t o = 0; o < chunk.octets; o++, octet += kOctet, a += 8) {
            ahead.lines(2);
            FPC_UNROLL for (int v = 0; v < 4; v++) {
                const I codes = load(octet + 32 * v);
                FPC_UNROLL for (int j = 0; j < 8; j++)
                    part[v] =
                        _mm256_fmadd_ps(values(codes, j), _mm256_broadcast_ss(a + j), part[v]);
            }
        }
        FPC_UNROLL for (int v = 0; v < 4; v++) {
            const F scale = weight_scales(group, gemm.weights.block_scale, vector + v);
            sum[v] = _mm256_fmadd_ps(part[v], scale, sum[v]);
        }
    }
    FPC_UNROLL for (int v = 0; v < 4; v++) _mm256_storeu_ps(sums + 8 * v, sum[v]);
}

void f32_row(const Gemm& gemm, const Task& task, uint8_t*) {
    few_rows(gemm, task, kF32FewOctets, [&](const Chunk& chunk, int32_t* sums) {
        Ahead ahead = after_scales(chunk, task);
        const float* a = float_row(gemm, task.begin) + chunk.input;
        for (int v = 2 * task.first; v < 2 * (task.first + task.count); v += 4)
            add_row(gemm, chunk, a, v, (float*)sums + 8 * v, ahead);
    });
}

// Decode a chunk: [inputs][64 outputs], scales included.
void decode_floats(const Gemm& gemm, const Chunk& chunk, float* panel) {
    const Layout& layout = gemm.layout;
    const Values values(gemm.weights);
    const uint8_t* group = chunk.at;
    for (int64_t g = 0; g < chunk.groups; g++, group += layout.group_bytes) {
        const uint8_t* octet = group + layout.scale_bytes;
        for (int64_t o = 0; o < chunk.octets; o++, octet += kOctet, panel += 8 * kBlock)
            for (int v = 0; v < 8; v++) {
                const F scale = weight_scales(group, gemm.weights.block_scale, v);
                const I codes = load(octet + 32 * v);
                FPC_UNROLL for (int j = 0; j < 8; j++)
                    _mm256_storeu_ps(panel + kBlock * j + 8 * v,
                                     _mm256_mul_ps(values(codes, j), scale));
            }
    }
}

// Two vectors of outputs, for one row of activations after the other.
struct F32Tiles {
    const Gemm& gemm;
    const Chunk& chunk;
    const float* const panel;
    const int64_t begin;  // row
    float* const sums;    // of that row
    const int64_t lines;
    Ahead& ahead;

    template <int kM>
    void run(int64_t m) const {
        const float* a[kM];
        float* own = sums + (m - begin) * kBlock;
        F sum[kM][2];
        ahead.lines(lines);
        FPC_UNROLL for (int i = 0; i < kM; i++) {
            a[i] = float_row(gemm, m + i) + chunk.input;
            FPC_UNROLL for (int v = 0; v < 2; v++)
                sum[i][v] = _mm256_loadu_ps(own + kBlock * i + 8 * v);
        }
        const int64_t inputs = 8 * chunk.groups * chunk.octets;
        for (int64_t k = 0; k < inputs; k++) {
            const float* at = panel + kBlock * k;
            const F first = _mm256_loadu_ps(at), second = _mm256_loadu_ps(at + 8);
            FPC_UNROLL for (int i = 0; i < kM; i++) {
                const F one = _mm256_broadcast_ss(a[i] + k);
                sum[i][0] = _mm256_fmadd_ps(first, one, sum[i][0]);
                sum[i][1] = _mm256_fmadd_ps(second, one, sum[i][1]);
            }
        }
        FPC_UNROLL for (int i = 0; i < kM; i++)
            FPC_UNROLL for (int v = 0; v < 2; v++)
                _mm256_storeu_ps(own + kBlock * i + 8 * v, sum[i][v]);
    }
};

void f32_many(const Gemm& gemm, const Task& task, uint8_t* memory) {
    const Scratch scratch(gemm, kF32Octets, 4, memory);
    float* panel = (float*)scratch.panel;
    const auto decode = [&](const Chunk& chunk) { decode_floats(gemm, chunk, panel); };
    const auto add = [&](const Chunk& chunk, int64_t begin, int64_t end, int64_t lines) {
        Ahead ahead = after(chunk, task);
        for (int64_t n = 0; n < kBlock; n += 16)
            for_tiles<kRows>(begin, end, F32Tiles{gemm, chunk, panel + n, begin,
                                                  (float*)scratch.sums + n, lines, ahead});
    };
    many_rows(gemm, task, kF32Octets, scratch.sums, decode, add);
}

Kernels f32_kernels(const Gemm& gemm) {
    if (gemm.m == 1) return {f32_row, 0};
    return {f32_many, Scratch(gemm, kF32Octets, 4, nullptr).bytes};
}
