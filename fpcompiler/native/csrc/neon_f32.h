// Products of fp32, for weights of four bits. Included by gemm_neon.cpp only.
//
// The sixteen values are bf16 too: two tables give the two bytes of a value, which with zeros below
// them are its fp32. Scales of groups of activations are in the activations already.

struct Values {
    typedef F Eight[8];  // of four outputs, input by input

    uint8x16x2_t bytes;  // the low ones, the high ones
    uint8x16_t order;

    explicit Values(const FpcWeights& weights) : bytes(vld2q_u8((const uint8_t*)weights.halves)) {
        // Codes lie output by output.
        static const uint8_t from[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
        order = vld1q_u8(from);
    }

    FPC_INLINE_MEMBER void decode(const uint8_t* at, Eight& of) const {
        const uint8x16_t codes = vqtbl1q_u8(vld1q_u8(at), order);
        four(vandq_u8(codes, vdupq_n_u8(15)), of);
        four(vshrq_n_u8(codes, 4), of + 4);
    }

   private:
    FPC_INLINE_MEMBER void four(uint8x16_t codes, F* of) const {
        const uint8x16_t low = vqtbl1q_u8(bytes.val[0], codes);
        const uint8x16_t high = vqtbl1q_u8(bytes.val[1], codes);
        const uint16x8_t first = vreinterpretq_u16_u8(vzip1q_u8(low, high));
        const uint16x8_t second = vreinterpretq_u16_u8(vzip2q_u8(low, high));
        of[0] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(first), 16));
        of[1] = vreinterpretq_f32_u32(vshll_high_n_u16(first, 16));
        of[2] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(second), 16));
        of[3] = vreinterpretq_f32_u32(vshll_high_n_u16(second, 16));
    }
};

FPC_INLINE F add_four(F sum, const F* weights, F inputs) {
    sum = vfmaq_laneq_f32(sum, weights[0], inputs, 0);
    sum = vfmaq_laneq_f32(sum, weights[1], inputs, 1);
    sum = vfmaq_laneq_f32(sum, weights[2], inputs, 2);
    return vfmaq_laneq_f32(sum, weights[3], inputs, 3);
}

// Eight inputs of a tile: a vector of outputs is decoded, then multiplied with one row after the
// other.
template <int kM, int kV>
FPC_INLINE void add_octet(const Values& values, const uint8_t* at, const Rows<float, kM>& a,
                          int64_t input, F (&sum)[kM][kV]) {
    F four = vld1q_f32(a.row[0] + input), others = vld1q_f32(a.row[0] + input + 4);
    FPC_UNROLL for (int v = 0; v < kV; v++) {
        Values::Eight weights;
        values.decode(at + 16 * v, weights);
        FPC_UNROLL for (int i = 0; i < kM; i++) {
            if (kM > 1) four = vld1q_f32(a.row[i] + input), others = vld1q_f32(a.row[i] + input + 4);
            sum[i][v] = add_four(sum[i][v], weights, four);
            sum[i][v] = add_four(sum[i][v], weights + 4, others);
        }
        keep_order<kM == 1>();
    }
}

template <int kM, int kV>
FPC_INLINE void add_octets(const Values& values, const uint8_t* at, const Rows<float, kM>& a,
                           int64_t input, int64_t octets, F (&sum)[kM][kV]) {
    const int64_t end = input + 8 * octets;
    do {
        add_octet<kM, kV>(values, at, a, input, sum);
        at += kOctet, input += 8;
    } while (input != end);
}

// Add a chunk to the sums of rows from `m` on, for kV vectors from output `n` of the block on. What
// has no scales is one group with scales of 1.
template <int kM, int kV>
void f32_tile(const Tiles& at, const Values values, int64_t m, int64_t n) {
    const Chunk& chunk = at.chunk;
    const Rows<float, kM> a(at.gemm, m);
    const float* scales = at.scales + n;
    const uint8_t* codes = chunk.codes + 4 * n;
    int32_t* sums = at.sums_of(m, n);
    int64_t input = chunk.input;
    for (int64_t g = 0; g < chunk.groups; g++) {
        F sum[kM][kV] = {};
        add_octets<kM, kV>(values, codes, a, input, chunk.octets, sum);
        F scale[kV];
        FPC_UNROLL for (int v = 0; v < kV; v++) scale[v] = vld1q_f32(scales + 4 * v);
        FPC_UNROLL for (int i = 0; i < kM; i++) add_scaled<kV>(sums + kBlock * i, sum[i], scale);
        codes += at.gemm.layout.group_bytes, scales += kBlock;
        input += 8 * chunk.octets;
    }
}

struct F32Tiles : Tiles {
    static constexpr bool kIntegers = false;
    typedef Values Source;
    const Values& values;

    template <int kM>
    void run(int64_t m) const {
        constexpr int kV = kM == 1 ? 8 : 2;
        for (int64_t n = from; n < to; n += 4 * kV) f32_tile<kM, kV>(*this, values, m, n);
    }
};

Kernels f32_kernels() { return {run_task<F32Tiles>, 0}; }
