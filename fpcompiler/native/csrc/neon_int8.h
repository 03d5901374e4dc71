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

// Eight inputs of a tile. Two vectors of weights are decoded, then multiplied with one row after the
// other: a tile of five rows and four vectors of sums leaves no registers for more.
template <int kM, int kV, class Source>
FPC_INLINE void add_octet(const Source& source, const uint8_t* at, const Rows<int8_t, kM>& a,
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
        keep_order<kV == 16>();
    }
}

template <int kM, int kV, class Source>
FPC_INLINE void add_octets(const Source& source, const uint8_t* at, const Rows<int8_t, kM>& a,
                           int64_t input, int64_t octets, I (&sum)[kM][kV]) {
    const int64_t end = input + 8 * octets;
    do {
        add_octet<kM, kV>(source, at, a, input, sum);
        at += Source::kStride, input += 8;
    } while (input != end);
}

// Add a chunk to the sums of rows from `m` on, for kV vectors from output `n` of the block on.
template <int kM, int kV, class Source>
void row_tile(const Tiles& at, const Source source, int64_t m, int64_t n) {
    const Chunk& chunk = at.chunk;
    const Rows<int8_t, kM> a(at.gemm, m);
    int32_t* sums = at.sums_of(m, n);
    I sum[kM][kV];
    FPC_UNROLL for (int i = 0; i < kM; i++)
        FPC_UNROLL for (int v = 0; v < kV; v++) sum[i][v] = vld1q_s32(sums + kBlock * i + 4 * v);
    add_octets<kM, kV>(source, chunk.codes + 4 * n, a, chunk.input, chunk.octets, sum);
    FPC_UNROLL for (int i = 0; i < kM; i++)
        FPC_UNROLL for (int v = 0; v < kV; v++) vst1q_s32(sums + kBlock * i + 4 * v, sum[i][v]);
}

// The same with scales of groups: sums are the bits of fp32. Scales are multiplied and products added
// as the kernels for AVX2 and AVX-512 do it.
template <int kM, int kV, bool kScaled, class Source>
void group_tile(const Tiles& at, const Source source, int64_t m, int64_t n) {
    const Chunk& chunk = at.chunk;
    const Prepared& prepared = at.gemm.activations;
    const Rows<int8_t, kM> a(at.gemm, m);
    const float* group_scale = prepared.group_scale + chunk.group * prepared.m + m;
    const float* scales = at.scales + n;
    const uint8_t* codes = chunk.codes + 4 * n;
    int32_t* sums = at.sums_of(m, n);
    const int64_t next_codes = at.gemm.layout.group_bytes, next_scale = prepared.m;
    const int64_t inputs = 8 * chunk.octets;
    int64_t input = chunk.input;
    for (int64_t g = chunk.groups; g > 0; g--) {
        I sum[kM][kV] = {};
        add_octets<kM, kV>(source, codes, a, input, chunk.octets, sum);
        constexpr int kAtOnce = kV < 4 ? kV : 4;
        FPC_UNROLL for (int v = 0; v < kV; v += kAtOnce) FPC_UNROLL for (int i = 0; i < kM; i++) {
            F real[kAtOnce], scale[kAtOnce];
            FPC_UNROLL for (int j = 0; j < kAtOnce; j++) {
                real[j] = vcvtq_f32_s32(sum[i][v + j]);
                scale[j] = vld1q_f32(scales + 4 * (v + j));
                if (kScaled) scale[j] = vmulq_n_f32(scale[j], group_scale[i]);
            }
            add_scaled<kAtOnce>(sums + kBlock * i + 4 * v, real, scale);
        }
        codes += next_codes, scales += kBlock, input += inputs, group_scale += next_scale;
    }
}

enum Scaling { kRowsOnly, kWeights, kProducts };  // of sums: see Scaling in gemm_avx512_int8.cpp

template <Scaling kScaling, class From>
struct Int8Tiles : Tiles {
    static constexpr bool kIntegers = kScaling == kRowsOnly;
    typedef From Source;
    const Source& source;

    template <int kM>
    void run(int64_t m) const {
        // One row: a whole block at a time, so that memory is read in order. Wider tiles of six rows
        // take more instructions: registers are too few for them.
        if constexpr (kM == 1)
            if (to - from == kBlock) return tile<1, 16>(m, from);
        constexpr int kV = kM <= 2 ? 8 : kM <= 5 ? 4 : 2;
        for (int64_t n = from; n < to; n += 4 * kV) tile<kM, kV>(m, n);
    }

    template <int kM, int kV>
    void tile(int64_t m, int64_t n) const {
        if constexpr (kIntegers)
            row_tile<kM, kV>(*this, source, m, n);
        else
            group_tile<kM, kV, kScaling == kProducts>(*this, source, m, n);
    }
};

template <class Source>
RunTask int8_task(const FpcWeights& weights) {
    if (!weights.group) return run_task<Int8Tiles<kRowsOnly, Source>>;
    return weights.scaled_inputs == FPC_NO_SCALES ? run_task<Int8Tiles<kWeights, Source>>
                                                  : run_task<Int8Tiles<kProducts, Source>>;
}

Kernels int8_kernels(const FpcWeights& weights) {
    return {weights.code_bits == 4 ? int8_task<FromNibbles>(weights) : int8_task<FromBytes>(weights),
            0};
}
