// What the kernels for NEON share: scales, chunks of inputs, results. Included by gemm_neon.cpp only.
//
// A vector has four outputs, so that a "vector" of layout.h is four of them. Registers are too few
// for a tile over all outputs of a block, except for one row; tiles read memory in steps, in a chunk
// that is small enough to stay in the nearest cache.

constexpr int kRows = 6;               // of activations that a tile has at most
constexpr int64_t kMostRows = 24;      // whose sums are kept at a time
constexpr int64_t kChunkOctets = 32;   // 8 KiB of codes of four bits

// Scales of kV vectors of outputs. Those of E4M3 are 2**-8 of what they should be.
template <int kV>
struct Scales {
    F of[kV];

    FPC_INLINE_MEMBER Scales(const uint8_t* group, int32_t format, int64_t n) {
        if (format == FPC_F32) {
            FPC_UNROLL for (int v = 0; v < kV; v++) of[v] = vld1q_f32((const float*)group + n + 4 * v);
            return;
        }
        FPC_UNROLL for (int v = 0; v < kV; v += 2) {
            // The exponent of E8M0 and that of E4M3 both lie 7 bits up in the upper half.
            const uint16x8_t halves = vshll_n_u8(vld1_u8(group + n + 4 * v), 7);
            const uint16x4_t low = vget_low_u16(halves), high = vget_high_u16(halves);
            if (format == FPC_E8M0) {
                of[v] = vreinterpretq_f32_u32(vshll_n_u16(low, 16));
                of[v + 1] = vreinterpretq_f32_u32(vshll_n_u16(high, 16));
            } else {
                of[v] = vcvt_f32_f16(vreinterpret_f16_u16(low));
                of[v + 1] = vcvt_f32_f16(vreinterpret_f16_u16(high));
            }
        }
    }
};

FPC_INLINE float scale_unit(const FpcWeights& weights) {
    return weights.block_scale == FPC_E4M3 ? 256 : 1;
}

// What stands for the scales of weights that have none: ones of E8M0.
#define FPC_16(value) value, value, value, value, value, value, value, value, \
                      value, value, value, value, value, value, value, value
constexpr uint8_t kOnes[kBlock] = {FPC_16(127), FPC_16(127), FPC_16(127), FPC_16(127)};
#undef FPC_16

// Some inputs of a block: groups of them, or a part of the only one.
struct Chunk {
    const uint8_t* codes;   // of the first group
    const uint8_t* scales;
    int64_t scale_stride;   // from one group to the next
    int32_t scale_format;   // FpcBlockScale
    int64_t group;          // the first
    int64_t groups;
    int64_t octets;         // of each
    int64_t input;          // the first
};

// Call `work(chunk)` for all inputs of a block.
template <class Work>
FPC_INLINE void for_chunks(const Gemm& gemm, int64_t block, const Work& work) {
    const Layout& layout = gemm.layout;
    const int32_t format = layout.scale_bytes ? gemm.weights.block_scale : FPC_E8M0;
    const int64_t stride = layout.scale_bytes ? layout.group_bytes : 0;
    // A group is never cut: its sum is scaled as a whole.
    const int64_t most = gemm.weights.group ? layout.octets : kChunkOctets;
    const int64_t at_once = most < kChunkOctets ? kChunkOctets / most : 1;
    for (int64_t g = 0; g < layout.groups; g += at_once) {
        const uint8_t* group = gemm.block(block) + g * layout.group_bytes;
        const uint8_t* codes = group + layout.scale_bytes;
        const int64_t left = layout.groups - g, groups = left < at_once ? left : at_once;
        for (int64_t o = 0; o < layout.octets; o += most) {
            const int64_t rest = layout.octets - o;
            work(Chunk{codes + o * layout.octet_bytes, layout.scale_bytes ? group : kOnes, stride,
                       format, g, groups, rest < most ? rest : most, 8 * (g * layout.octets + o)});
        }
    }
}

// To bf16, rounding to nearest even.
FPC_INLINE uint16x4_t to_bf16(F value) {
    const uint32x4_t bits = vreinterpretq_u32_f32(value);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    return vshrn_n_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7FFF)), odd), 16);
}

// Apply the scales of the token and of the outputs and the bias, each rounded as the definition
// does it (fpcompiler/runtime/reference.py), and store four results, or as many as there are.
FPC_INLINE void finish(const Gemm& gemm, int64_t m, int64_t n, F sum) {
    const FpcWeights& weights = gemm.weights;
    const int64_t left = weights.n - n, count = left < 4 ? left : 4;
    if (count <= 0) return;
    F value = vmulq_n_f32(sum, gemm.activations.token_scale[m]);
    value = vmulq_f32(value, vld1q_f32(weights.row_scale + n));
    if (weights.bias) value = vaddq_f32(value, vld1q_f32(weights.bias + n));
    const int64_t size = gemm.output == FPC_INPUT_F32 ? 4 : 2;
    uint8_t* const to = gemm.y + m * gemm.y_stride + n * size;
    uint8_t bytes[16];
    if (gemm.output == FPC_INPUT_F32)
        vst1q_u8(bytes, vreinterpretq_u8_f32(value));
    else if (gemm.output == FPC_INPUT_BF16)
        vst1_u8(bytes, vreinterpret_u8_u16(to_bf16(value)));
    else
        vst1_u8(bytes, vreinterpret_u8_f16(vcvt_f16_f32(value)));
    memcpy(to, bytes, count * size);
}
