// What the kernels for NEON share: scales, chunks of inputs, tasks. Included by gemm_neon.cpp only.
//
// A vector has four outputs; what layout.h calls a vector is four of them. Registers are too few for
// a tile over all outputs of a block, except for one row, so tiles read memory in steps. They do so
// in a chunk that is small enough to stay in the nearest cache, and leave their sums in memory.

constexpr int kRows = 6;              // of activations that a tile has at most
constexpr int64_t kMostRows = 24;     // whose sums are kept at a time
constexpr int64_t kChunkOctets = 32;  // 8 KiB of codes of four bits; groups are not more

// Sixteen scales of a group. Those of E4M3 are 2**-8 of what they should be.
template <FpcBlockScale kFormat>
FPC_INLINE void decode_scales(const uint8_t* codes, float* to) {
    const uint8x16_t bytes = vld1q_u8(codes);
    // The exponent of E8M0 and that of E4M3 both lie 7 bits up in the upper half.
    const uint16x8_t halves[2] = {vshll_n_u8(vget_low_u8(bytes), 7), vshll_high_n_u8(bytes, 7)};
    FPC_UNROLL for (int i = 0; i < 2; i++) {
        F low, high;
        if (kFormat == FPC_E8M0) {
            low = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(halves[i]), 16));
            high = vreinterpretq_f32_u32(vshll_high_n_u16(halves[i], 16));
        } else {
            low = vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(halves[i])));
            high = vcvt_high_f32_f16(vreinterpretq_f16_u16(halves[i]));
        }
        vst1q_f32(to + 8 * i, low), vst1q_f32(to + 8 * i + 4, high);
    }
}

// The scales of groups of a block, [groups][kBlock]; ones where weights have none.
void decode_groups(const Gemm& gemm, const uint8_t* group, int64_t groups, float* to) {
    const int32_t format = gemm.weights.block_scale;
    for (int64_t g = 0; g < groups; g++, group += gemm.layout.group_bytes, to += kBlock) {
        if (format < 0)
            for (int64_t n = 0; n < kBlock; n++) to[n] = 1;
        else if (format == FPC_F32)
            memcpy(to, group, kBlock * sizeof *to);
        else if (format == FPC_E8M0)
            for (int64_t n = 0; n < kBlock; n += 16) decode_scales<FPC_E8M0>(group + n, to + n);
        else
            for (int64_t n = 0; n < kBlock; n += 16) decode_scales<FPC_E4M3>(group + n, to + n);
    }
}

FPC_INLINE float scale_unit(const FpcWeights& weights) {
    return weights.block_scale == FPC_E4M3 ? 256 : 1;
}

// Some inputs of a block: groups of them, or a part of the only one.
struct Chunk {
    const uint8_t* at;      // the first group, with its scales
    const uint8_t* codes;   // its first ones
    int64_t group;          // its number
    int64_t groups;
    int64_t octets;         // of each
    int64_t input;          // the first
};

// Call `work(chunk)` for all inputs of a block.
template <class Work>
FPC_INLINE void for_chunks(const Gemm& gemm, int64_t block, const Work& work) {
    const Layout& layout = gemm.layout;
    // A group is never cut: its sum is scaled as a whole.
    const int64_t most = gemm.weights.group ? layout.octets : kChunkOctets;
    const int64_t at_once = most < kChunkOctets ? kChunkOctets / most : 1;
    for (int64_t g = 0; g < layout.groups; g += at_once) {
        const uint8_t* group = gemm.block(block) + g * layout.group_bytes;
        const int64_t left = layout.groups - g, groups = left < at_once ? left : at_once;
        for (int64_t o = 0; o < layout.octets; o += most) {
            const int64_t rest = layout.octets - o, octets = rest < most ? rest : most;
            work(Chunk{group, group + layout.scale_bytes + o * layout.octet_bytes, g, groups,
                       octets, 8 * (g * layout.octets + o)});
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

// Rows of prepared activations.
template <class Value, int kM>
struct Rows {
    const Value* row[kM];

    FPC_INLINE_MEMBER Rows(const Gemm& gemm, int64_t m) {
        FPC_UNROLL for (int i = 0; i < kM; i++)
            row[i] = (const Value*)(gemm.activations.a + (m + i) * gemm.activations.stride);
    }
};

// Where many vectors are decoded one after the other, GCC 12 would load all of them first and run out
// of registers: what is read after this stays there.
template <bool kHere>
FPC_INLINE void keep_order() {
    if (kHere) asm volatile("" ::: "memory");
}

// Where tiles of a chunk are: for some rows all outputs of a task, then for the next ones.
struct Tiles {
    const Gemm& gemm;
    const Chunk& chunk;
    const float* const scales;  // of the chunk, [groups][kBlock]
    const int64_t begin;        // row
    int32_t* const sums;        // [rows][kBlock] from that row on: int32, or the bits of fp32
    const int64_t from, to;     // outputs of the block

    int32_t* sums_of(int64_t m, int64_t n) const { return sums + (m - begin) * kBlock + n; }
};

// Add sums times scales to sums that are the bits of fp32. `kCount` vectors lie one after the other:
// all are read before the first one is written, so that two can be read or written at a time.
template <int kCount>
FPC_INLINE void add_scaled(int32_t* to, const F* sum, const F* scale) {
    F total[kCount];
    FPC_UNROLL for (int v = 0; v < kCount; v++)
        total[v] = vfmaq_f32(vreinterpretq_f32_s32(vld1q_s32(to + 4 * v)), sum[v], scale[v]);
    FPC_UNROLL for (int v = 0; v < kCount; v++)
        vst1q_s32(to + 4 * v, vreinterpretq_s32_f32(total[v]));
}

template <bool kIntegers>
void finish_rows(const Gemm& gemm, const Task& task, int64_t begin, int64_t end,
                 const int32_t* sums) {
    const float unit = gemm.weights.unit * scale_unit(gemm.weights);
    for (int64_t m = begin; m < end; m++, sums += kBlock)
        for (int64_t n = 16 * task.first; n < 16 * (task.first + task.count); n += 4) {
            const I sum = vld1q_s32(sums + n);
            const F value = kIntegers ? vcvtq_f32_s32(sum) : vreinterpretq_f32_s32(sum);
            finish(gemm, m, task.block * kBlock + n, vmulq_n_f32(value, unit));
        }
}

// A RunTask. `Some` are Tiles and what decodes weights, a Some::Source; their sums are integers
// without scales if Some::kIntegers.
template <class Some>
void run_task(const Gemm& gemm, const Task& task, uint8_t*) {
    const typename Some::Source source(gemm.weights);
    const int64_t from = 16 * task.first, to = from + 16 * task.count;
    for (int64_t begin = task.begin; begin < task.end; begin += kMostRows) {
        const int64_t end = begin + kMostRows < task.end ? begin + kMostRows : task.end;
        alignas(64) int32_t sums[kMostRows * kBlock];
        alignas(64) float scales[kChunkOctets * kBlock];
        memset(sums, 0, (end - begin) * kBlock * sizeof *sums);
        for_chunks(gemm, task.block, [&](const Chunk& chunk) {
            if (!Some::kIntegers) decode_groups(gemm, chunk.at, chunk.groups, scales);
            for_tiles<kRows>(begin, end,
                             Some{{gemm, chunk, scales, begin, sums, from, to}, source});
        });
        finish_rows<Some::kIntegers>(gemm, task, begin, end, sums);
    }
}
