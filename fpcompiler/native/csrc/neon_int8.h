// Integer products (sdot). Included by gemm_neon.cpp only.
//
// Both factors of sdot are signed. So the offset of the weights' integers, which x86 needs, is taken
// off when they are decoded, sums start from 0, and the corrections of activations are not read. The
// layout and what prepares activations are those of x86.

// The integers of eight inputs of four outputs.
struct Eight {
    int8x16_t low, high;  // of the first four inputs, of the others
};

// Where they come from: nibbles ...
struct FromNibbles {
    static constexpr int64_t kStride = kOctet;
    int8x16_t table;

    explicit FromNibbles(const FpcWeights& weights)
        : table(vreinterpretq_s8_u8(
              vsubq_u8(vld1q_u8(weights.integers), vdupq_n_u8((uint8_t)weights.offset)))) {}
    FPC_INLINE_MEMBER Eight operator()(const uint8_t* at) const {
        const uint8x16_t codes = vld1q_u8(at);
        return {vqtbl1q_s8(table, vandq_u8(codes, vdupq_n_u8(15))),
                vqtbl1q_s8(table, vshrq_n_u8(codes, 4))};
    }
};

// ... or bytes, which are the integers with the offset.
struct FromBytes {
    static constexpr int64_t kStride = 2 * kOctet;
    uint8x16_t offset;

    explicit FromBytes(const FpcWeights& weights) : offset(vdupq_n_u8((uint8_t)weights.offset)) {}
    FPC_INLINE_MEMBER Eight operator()(const uint8_t* at) const {
        return {vreinterpretq_s8_u8(vsubq_u8(vld1q_u8(at), offset)),
                vreinterpretq_s8_u8(vsubq_u8(vld1q_u8(at + kOctet), offset))};
    }
};

template <int kM>
struct Activations {
    const int8_t* row[kM];

    FPC_INLINE_MEMBER Activations(const Gemm& gemm, int64_t m) {
        FPC_UNROLL for (int i = 0; i < kM; i++)
            row[i] = (const int8_t*)gemm.activations.a + (m + i) * gemm.activations.stride;
    }
};

// Eight inputs of a tile. Two vectors of weights are decoded, then multiplied with one row after the
// other: with six rows that have totals too, no register is left for more.
template <int kM, int kV, class Source>
FPC_INLINE void add_octet(const Source& source, const uint8_t* at, const Activations<kM>& a,
                          int64_t input, I (&sum)[kM][kV]) {
    int8x8_t inputs = vld1_s8(a.row[0] + input);
    FPC_UNROLL for (int v = 0; v < kV; v += 2) {
        const Eight one = source(at + 16 * v), two = source(at + 16 * v + 16);
        FPC_UNROLL for (int i = 0; i < kM; i++) {
            if (kM > 1) inputs = vld1_s8(a.row[i] + input);
            sum[i][v] = vdotq_lane_s32(sum[i][v], one.low, inputs, 0);
            sum[i][v + 1] = vdotq_lane_s32(sum[i][v + 1], two.low, inputs, 0);
            sum[i][v] = vdotq_lane_s32(sum[i][v], one.high, inputs, 1);
            sum[i][v + 1] = vdotq_lane_s32(sum[i][v + 1], two.high, inputs, 1);
        }
        if (kV == 16) asm volatile("" ::: "memory");
    }
}

template <int kM, int kV, class Source>
FPC_INLINE void add_octets(const Source& source, const uint8_t* at, const Activations<kM>& a,
                           int64_t input, int64_t octets, I (&sum)[kM][kV]) {
    const int64_t end = input + 8 * octets;
    do {
        add_octet<kM, kV>(source, at, a, input, sum);
        at += Source::kStride, input += 8;
    } while (input != end);
}

// Add a chunk to the sums of rows from `m` on, for kV vectors from output `n` of the block on.
template <int kM, int kV, class Source>
void row_tile(const Gemm& gemm, const Source source, const Chunk& chunk, int64_t m, int64_t n,
              int32_t* sums) {
    const Activations<kM> a(gemm, m);
    I sum[kM][kV];
    FPC_UNROLL for (int i = 0; i < kM; i++)
        FPC_UNROLL for (int v = 0; v < kV; v++) sum[i][v] = vld1q_s32(sums + kBlock * i + 4 * v);
    add_octets<kM, kV>(source, chunk.codes + 4 * n, a, chunk.input, chunk.octets, sum);
    FPC_UNROLL for (int i = 0; i < kM; i++)
        FPC_UNROLL for (int v = 0; v < kV; v++) vst1q_s32(sums + kBlock * i + 4 * v, sum[i][v]);
}

// The same with scales of groups: `sums` are the bits of fp32, and kS vectors are summed at a time.
template <int kM, int kV, int kS, bool kScaled, class Source>
void group_tile(const Gemm& gemm, const Source source, const Chunk& chunk, int64_t m, int64_t n,
                int32_t* sums) {
    const Activations<kM> a(gemm, m);
    const Prepared& prepared = gemm.activations;
    const float* group_scale = prepared.group_scale + chunk.group * prepared.m + m;
    const uint8_t* codes = chunk.codes + 4 * n;
    const uint8_t* scales = chunk.scales;
    int64_t input = chunk.input;
    F total[kM][kV];
    FPC_UNROLL for (int i = 0; i < kM; i++)
        FPC_UNROLL for (int v = 0; v < kV; v++)
            total[i][v] = vreinterpretq_f32_s32(vld1q_s32(sums + kBlock * i + 4 * v));
    for (int64_t g = 0; g < chunk.groups; g++) {
        FPC_UNROLL for (int v = 0; v < kV; v += kS) {
            I sum[kM][kS] = {};
            add_octets<kM, kS>(source, codes + 16 * v, a, input, chunk.octets, sum);
            const Scales<kS> scale(scales, chunk.scale_format, n + 4 * v);
            FPC_UNROLL for (int i = 0; i < kM; i++)
                FPC_UNROLL for (int s = 0; s < kS; s++) {
                    const F both = kScaled ? vmulq_n_f32(scale.of[s], group_scale[i]) : scale.of[s];
                    total[i][v + s] = vfmaq_f32(total[i][v + s], vcvtq_f32_s32(sum[i][s]), both);
                }
        }
        codes += gemm.layout.group_bytes, scales += chunk.scale_stride;
        input += 8 * chunk.octets, group_scale += prepared.m;
    }
    FPC_UNROLL for (int i = 0; i < kM; i++)
        FPC_UNROLL for (int v = 0; v < kV; v++)
            vst1q_s32(sums + kBlock * i + 4 * v, vreinterpretq_s32_f32(total[i][v]));
}

enum Scaling { kRowsOnly, kWeights, kProducts };  // of sums: see Scaling in gemm_avx512_int8.cpp

// Tiles of a chunk: all outputs of a task for some rows, then all for the next ones.
template <Scaling kScaling, class Source>
struct Int8Tiles {
    const Gemm& gemm;
    const Source& source;
    const Chunk& chunk;
    const int64_t begin;     // row
    int32_t* const sums;     // of that row
    const int64_t from, to;  // outputs of the block

    template <int kM>
    void run(int64_t m) const {
        // One row: a whole block at a time, so that memory is read in order.
        if constexpr (kM == 1)
            if (to - from == kBlock) return tile<1, 16>(m, from);
        constexpr int kV = kM == 1 ? 8 : kM <= 3 ? 4 : 2;
        for (int64_t n = from; n < to; n += 4 * kV) tile<kM, kV>(m, n);
    }

    template <int kM, int kV>
    void tile(int64_t m, int64_t n) const {
        int32_t* own = sums + (m - begin) * kBlock + n;
        if constexpr (kScaling == kRowsOnly)
            row_tile<kM, kV>(gemm, source, chunk, m, n, own);
        else
            group_tile<kM, kV, (kV < 4 ? kV : 4), kScaling == kProducts>(gemm, source, chunk, m, n,
                                                                         own);
    }
};

template <Scaling kScaling>
void finish_rows(const Gemm& gemm, const Task& task, int64_t begin, int64_t end,
                 const int32_t* sums) {
    const float unit = gemm.weights.unit * scale_unit(gemm.weights);
    for (int64_t m = begin; m < end; m++, sums += kBlock)
        for (int64_t n = 16 * task.first; n < 16 * (task.first + task.count); n += 4) {
            const I sum = vld1q_s32(sums + n);
            const F value = kScaling == kRowsOnly ? vcvtq_f32_s32(sum) : vreinterpretq_f32_s32(sum);
            finish(gemm, m, task.block * kBlock + n, vmulq_n_f32(value, unit));
        }
}

template <Scaling kScaling, class Source>
void int8_task(const Gemm& gemm, const Task& task, uint8_t*) {
    const Source source(gemm.weights);
    for (int64_t begin = task.begin; begin < task.end; begin += kMostRows) {
        const int64_t end = begin + kMostRows < task.end ? begin + kMostRows : task.end;
        alignas(64) int32_t sums[kMostRows * kBlock];
        memset(sums, 0, (end - begin) * kBlock * sizeof *sums);
        for_chunks(gemm, task.block, [&](const Chunk& chunk) {
            for_tiles<kRows>(begin, end, Int8Tiles<kScaling, Source>{
                                 gemm, source, chunk, begin, sums, 16 * task.first,
                                 16 * (task.first + task.count)});
        });
        finish_rows<kScaling>(gemm, task, begin, end, sums);
    }
}

template <class Source>
RunTask int8_task_of(const FpcWeights& weights) {
    if (!weights.group) return int8_task<kRowsOnly, Source>;
    return weights.scaled_inputs == FPC_NO_SCALES ? int8_task<kWeights, Source>
                                                  : int8_task<kProducts, Source>;
}

Kernels int8_kernels(const Gemm& gemm) {
    const bool nibbles = gemm.weights.code_bits == 4;
    return {nibbles ? int8_task_of<FromNibbles>(gemm.weights) : int8_task_of<FromBytes>(gemm.weights),
            0};
}
