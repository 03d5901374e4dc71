// Attention of a few queries over many keys: softmax(Q K^T * scale) V, as a decoder runs it for each
// token. Reading keys and values bounds the speed.
//
// A cluster has one head of keys and values and all queries that read it, at most 16 rows of one
// tile. Its warps take steps of 16 keys in turn, and each keeps a softmax of its own (T. Dao et al.,
// "FlashAttention", 2022); at the end those of a block are joined, then those of the cluster. The
// order of all sums depends on sizes only.
//
// Keys and values go from global memory to the tensor cores without shared memory between: a sum
// does not care which of its terms an instruction calls its first, so each lane loads 16 bytes of a
// row, and queries, probabilities and results are laid out to match.

namespace fpc {

constexpr int kAttendWarps = 4, kAttendThreads = 32 * kAttendWarps;
constexpr int kMostRows = 16;   // queries of a head of keys
constexpr int kStepKeys = 16;   // of a warp
constexpr int kMostSplit = 8;   // blocks of a cluster
constexpr float kMinusInfinity = -__builtin_inff();
constexpr float kLogTwoOfE = 1.4426950408889634f;

// Two E4M3 codes as bf16, exactly. Sign, exponent and mantissa are put where bf16 has them, which
// gives the value times 2**-120.
template <bool kHigh>
FPC_DEVICE uint32_t pair_of_codes(uint32_t codes) {
    const uint32_t spread = spread_bytes<kHigh>(codes);
    return multiply_bf16((spread << 8 & 0x80008000u) | (spread << 4 & 0x07F007F0u), 0x7B807B80u);
}

// What a warp has of the rows g and g + 8, g = lane / 4: softmax relative to the largest product so
// far, and sums of values. In tile [c][e] column 2t + j is channel 64c + 8(2t + j) + e, t = lane % 4.
template <int kWidth>
struct Partial {
    float largest[2] = {kMinusInfinity, kMinusInfinity}, total[2] = {0, 0};
    float sums[kWidth / 64][8][4] = {};
};

template <class P>
struct Attention {
    static constexpr int kWidth = P::kWidth, kChunks = kWidth / 32, kTiles = kWidth / 64;
    // In shared memory, for each warp and then for the block: sums, largest products, totals.
    static constexpr int kFloats = kMostRows * (kWidth + 2);
    static constexpr int kBytes = P::kCodes ? 1 : 2;  // of a number of a key

    const FpcAttendArguments& a;
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int batch, group, rows;
    const uint8_t *keys, *values;
    Quad queries[2][kChunks];

    FPC_DEVICE explicit Attention(const FpcAttendArguments& arguments)
        : a(arguments),
          batch((int)blockIdx.y / a.groups),
          group((int)blockIdx.y % a.groups),
          rows(a.heads / a.groups * a.queries),
          keys((const uint8_t*)a.k + place(a.k_strides) * kBytes),
          values((const uint8_t*)a.v + place(a.v_strides) * kBytes) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = g + 8 * half;
            const uint16_t* from = (const uint16_t*)a.q + batch * a.q_strides[0] +
                                   head_of(row) * a.q_strides[1] + query_of(row) * a.q_strides[2];
#pragma unroll
            for (int c = 0; c < kChunks; c++)
                queries[half][c] = row < rows ? load_quad(from + 32 * c + 8 * t) : Quad{};
        }
    }

    FPC_DEVICE int64_t place(const int64_t (&strides)[3]) const {
        return batch * strides[0] + group * strides[1];
    }
    FPC_DEVICE int64_t head_of(int row) const {
        return group * (a.heads / a.groups) + row / a.queries;
    }
    FPC_DEVICE int64_t query_of(int row) const { return row % a.queries; }

    // Whether a lane's two rows see its four keys of a step, by bits: 4 half + 2 tile + j.
    FPC_DEVICE uint32_t seen_of(int step) const {
        uint32_t seen = 0;
#pragma unroll
        for (int bit = 0; bit < 8; bit++) {
            const int row = g + bit / 4 * 8, key = step * kStepKeys + bit / 2 % 2 * 8 + 2 * t + bit % 2;
            bool sees = row < rows && key < a.keys;
            if (sees && a.mask)
                sees = a.mask[batch * a.mask_strides[0] + head_of(row) * a.mask_strides[1] +
                              query_of(row) * a.mask_strides[2] + key * a.mask_strides[3]];
            if (a.causal) sees = sees && key <= query_of(row);
            seen |= (uint32_t)sees << bit;
        }
        return seen;
    }

    // Products of keys that are not there are not seen; the last one is read in their place.
    FPC_DEVICE int there(int key) const { return key < a.keys ? key : a.keys - 1; }

    FPC_DEVICE Quad load_row(const uint8_t* from, int64_t stride, int key, int channel) const {
        from += (there(key) * stride + channel) * kBytes;
        if constexpr (!P::kCodes) return load_quad(from);
        // Weights times scales would leave the range of fp16.
        static_assert(!P::kCodes || P::kType == kBf16, "codes are multiplied as bf16");
        const Twin codes = load_twin(from);
        Quad values;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            values.words[2 * i] = pair_of_codes<false>(codes.words[i]);
            values.words[2 * i + 1] = pair_of_codes<true>(codes.words[i]);
        }
        return values;
    }

    // The scales of a lane's four keys of a step.
    FPC_DEVICE void load_scales(const float* from, const int64_t (&strides)[3], int step,
                                float (&scales)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            scales[i] = 1;
            const int key = step * kStepKeys + i / 2 * 8 + 2 * t + i % 2;
            if constexpr (P::kCodes)
                scales[i] = load_number(from + place(strides) + there(key) * strides[2]);
        }
    }

    // Add a step of keys to what a warp has.
    FPC_DEVICE void add(Partial<kWidth>& to, int step, uint32_t seen) const {
        const int first = step * kStepKeys;
        Quad k[2][kChunks], v[4][kTiles];
#pragma unroll
        for (int tile = 0; tile < 2; tile++)
#pragma unroll
            for (int c = 0; c < kChunks; c++)
                k[tile][c] = load_row(keys, a.k_strides[2], first + 8 * tile + g, 32 * c + 8 * t);
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int c = 0; c < kTiles; c++)
                v[j][c] = load_row(values, a.v_strides[2], first + j / 2 * 8 + 2 * t + j % 2,
                                   64 * c + 8 * g);
        float of_keys[4], of_values[4], products[2][4] = {};
        load_scales(a.k_scales, a.k_scale_strides, step, of_keys);
        load_scales(a.v_scales, a.v_scale_strides, step, of_values);
        multiply_keys(products, k);
        uint32_t weights[4];
        weigh(to, products, of_keys, of_values, seen, weights);
#pragma unroll
        for (int c = 0; c < kTiles; c++)
#pragma unroll
            for (int e = 0; e < 8; e++) {
                uint32_t b[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const uint32_t one = v[2 * i][c].words[e / 2], other = v[2 * i + 1][c].words[e / 2];
                    b[i] = e % 2 ? high_halves(one, other) : low_halves(one, other);
                }
                multiply_add_16<P::kType>(to.sums[c][e], weights, b[0], b[1]);
            }
    }

    FPC_DEVICE void multiply_keys(float (&products)[2][4], const Quad (&k)[2][kChunks]) const {
#pragma unroll
        for (int c = 0; c < kChunks; c++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint32_t(&low)[4] = queries[0][c].words, (&high)[4] = queries[1][c].words;
                const uint32_t q[4] = {low[2 * half], high[2 * half], low[2 * half + 1],
                                       high[2 * half + 1]};
#pragma unroll
                for (int tile = 0; tile < 2; tile++)
                    multiply_add_16<P::kType>(products[tile], q, k[tile][c].words[2 * half],
                                              k[tile][c].words[2 * half + 1]);
            }
    }

    // The weights of a step's values, two to a word, as a left operand; earlier sums are rescaled.
    FPC_DEVICE void weigh(Partial<kWidth>& to, const float (&products)[2][4],
                          const float (&of_keys)[4], const float (&of_values)[4], uint32_t seen,
                          uint32_t (&weights)[4]) const {
        const float scale = multiply(a.scale, kLogTwoOfE);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float scores[4], largest = to.largest[half];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const bool sees = seen >> (4 * half + i) & 1;
                float product = multiply(products[i / 2][2 * half + i % 2], scale);
                if constexpr (P::kCodes) product = multiply(product, of_keys[i]);
                scores[i] = sees ? product : kMinusInfinity;
                largest = larger_number(largest, scores[i]);
            }
            largest = larger_number(largest, exchange(largest, 1));
            largest = larger_number(largest, exchange(largest, 2));
            const float base = largest == kMinusInfinity ? 0 : largest;
            const float correction = power_of_two(subtract(to.largest[half], base));
            float sum = 0;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                scores[i] = power_of_two(subtract(scores[i], base));
                sum = fpc::add(sum, scores[i]);
                if constexpr (P::kCodes) scores[i] = multiply(scores[i], of_values[i]);
            }
            to.largest[half] = largest;
            to.total[half] = fused(to.total[half], correction, sum);
            weights[half] = pair_in<P::kType>(scores[0], scores[1]);
            weights[2 + half] = pair_in<P::kType>(scores[2], scores[3]);
#pragma unroll
            for (int c = 0; c < kTiles; c++)
#pragma unroll
                for (int e = 0; e < 8; e++)
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        float& x = to.sums[c][e][2 * half + j];
                        x = multiply(x, correction);
                    }
        }
    }

    // Leave a warp's part in shared memory.
    FPC_DEVICE void store(Partial<kWidth>& from, float* to) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = g + 8 * half;
            float total = from.total[half];
            total = fpc::add(total, exchange(total, 1));
            total = fpc::add(total, exchange(total, 2));
            if (t == 0) {
                to[kMostRows * kWidth + row] = from.largest[half];
                to[kMostRows * (kWidth + 1) + row] = total;
            }
#pragma unroll
            for (int c = 0; c < kTiles; c++)
#pragma unroll
                for (int e = 0; e < 8; e++)
#pragma unroll
                    for (int j = 0; j < 2; j++)
                        to[row * kWidth + 64 * c + 8 * (2 * t + j) + e] = from.sums[c][e][2 * half + j];
        }
    }
};

// A row's number joined from several parts, with the largest product and the total behind it.
struct Joined {
    float sum = 0, largest = kMinusInfinity, total = 0;
};

// `load(part, index)` gives the numbers that a part has in shared memory.
template <class P, class Load>
FPC_DEVICE Joined joined(int row, int channel, int parts, const Load& load) {
    constexpr int kWidth = P::kWidth;
    Joined result;
#pragma unroll 4
    for (int i = 0; i < parts; i++)
        result.largest = larger_number(result.largest, load(i, kMostRows * kWidth + row));
    const float base = result.largest == kMinusInfinity ? 0 : result.largest;
#pragma unroll 4
    for (int i = 0; i < parts; i++) {
        const float factor = power_of_two(subtract(load(i, kMostRows * kWidth + row), base));
        result.total = fused(factor, load(i, kMostRows * (kWidth + 1) + row), result.total);
        result.sum = fused(factor, load(i, row * kWidth + channel), result.sum);
    }
    return result;
}

template <class P>
__global__ void __launch_bounds__(kAttendThreads)
attend(const __grid_constant__ FpcAttendArguments a) {
    using Work = Attention<P>;
    constexpr int kWidth = P::kWidth;
    float* const memory = block_memory<float, (kAttendWarps + 1) * Work::kFloats>();
    follow();
    const Work work(a);
    const int rank = (int)blockIdx.x, split = (int)gridDim.x, stride = split * kAttendWarps;
    const int steps = (a.keys + kStepKeys - 1) / kStepKeys;
    Partial<kWidth> own;
    int step = rank * kAttendWarps + work.warp;
    uint32_t seen = step < steps ? work.seen_of(step) : 0;
    while (step < steps) {
        const int next = step + stride;
        const uint32_t then = next < steps ? work.seen_of(next) : 0;  // on its way meanwhile
        if (any_lane(seen)) work.add(own, step, seen);
        seen = then, step = next;
    }
    work.store(own, memory + work.warp * Work::kFloats);
    barrier();
    float* const of_block = memory + kAttendWarps * Work::kFloats;
    const auto of_warp = [&](int i, int index) { return memory[i * Work::kFloats + index]; };
    const int numbers = work.rows * kWidth;
    for (int i = (int)threadIdx.x; i < numbers; i += kAttendThreads) {
        const int row = i / kWidth, channel = i % kWidth;
        const Joined found = joined<P>(row, channel, kAttendWarps, of_warp);
        of_block[i] = found.sum;
        if (channel == 0) {
            of_block[kMostRows * kWidth + row] = found.largest;
            of_block[kMostRows * (kWidth + 1) + row] = found.total;
        }
    }
    if (split > 1) cluster_barrier(); else barrier();
    const auto of_cluster = [&](int i, int index) {
        return split > 1 ? load_remote(of_block + index, i) : of_block[index];
    };
    for (int i = rank * kAttendThreads + (int)threadIdx.x; i < numbers; i += split * kAttendThreads) {
        const int row = i / kWidth, channel = i % kWidth;
        const Joined found = joined<P>(row, channel, split, of_cluster);
        const float value = found.total == 0 ? 0 : divide(found.sum, found.total);
        const int64_t at = (work.batch * a.queries + work.query_of(row)) * a.heads + work.head_of(row);
        ((uint16_t*)a.y)[at * kWidth + channel] = (uint16_t)pair_in<P::kType>(value, 0);
    }
    if (split > 1) cluster_barrier();  // others read this block's memory until then
}

// How many blocks share the keys: while each warp has a step, and no more than two blocks to an SM.
inline int split_of(const FpcAttendArguments& a) {
    const int64_t steps = (a.keys + kStepKeys - 1) / kStepKeys, heads = (int64_t)a.batch * a.groups;
    int split = 1;
    while (split < kMostSplit && 2 * split * kAttendWarps <= steps && 2 * split * heads <= 2 * a.sm_count)
        split *= 2;
    return split;
}

// Whether rows begin where they are loaded in pieces of `bytes`, 8 numbers each.
inline bool in_pieces(const void* address, const int64_t (&strides)[3], int bytes) {
    return (uintptr_t)address % bytes == 0 && strides[0] % 8 == 0 && strides[1] % 8 == 0 &&
           strides[2] % 8 == 0;
}

template <class P>
int32_t launch_attend(const FpcAttendArguments& a, void* stream) {
    constexpr int64_t kMostHeads = 65535;
    const bool sizes = a.batch > 0 && a.groups > 0 && a.heads > 0 && a.queries > 0 && a.keys > 0;
    if (!sizes || a.heads % a.groups || (int64_t)a.heads / a.groups * a.queries > kMostRows)
        return FPC_ATTEND_REFUSED;
    constexpr int kPiece = 8 * Attention<P>::kBytes;
    if ((int64_t)a.batch * a.groups > kMostHeads || !in_pieces(a.q, a.q_strides, 16) ||
        !in_pieces(a.k, a.k_strides, kPiece) || !in_pieces(a.v, a.v_strides, kPiece))
        return FPC_ATTEND_REFUSED;
    if (P::kCodes && !(a.k_scales && a.v_scales)) return FPC_ATTEND_REFUSED;
    const dim3 grid((unsigned)split_of(a), (unsigned)(a.batch * a.groups));
    return launch(attend<P>, grid, dim3(kAttendThreads), a, stream, true, grid.x);
}

}  // namespace fpc
