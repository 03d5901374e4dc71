// GEMM of packed weights for few tokens: D^T = W X^T by mma.sync, W decoded in registers.
//
// Reading W bounds the speed, so that everything is arranged around one stream of it: a block has some
// tiles of 16 rows, its warps divide their units (16 rows by 128 of K, 1024 bytes) among them without
// gaps, and each warp loads its part from global memory straight into registers, some units ahead. X is
// in shared memory as a whole. A warp's sums of a tile are written when it is through with the tile,
// and added once, in a fixed order, at the end: no other synchronization, no atomics. A block loads
// weights before it waits for the kernel that makes X (programmatic dependent launch).

namespace fpc {

constexpr int kFewWarps = 16, kFewThreads = kFewWarps * 32;
constexpr int kMostFewTokens = 16;
constexpr int kUnitBytes = 16 * kUnitK / 2;
constexpr int kSumPitch = 20;           // of 16 rows: without conflicts of banks
constexpr int kMostTiles = 64;          // of a block

struct FewParameters {
    const uint8_t *x, *weights, *scales;
    const float *token_scale, *row_scale, *bias, *scalar_a, *scalar_b;
    void* d;
    const void* residual;
    float alpha;
    int m, n, k;                // K in elements, a multiple of kUnitK
    int low_tiles, more_tiles;  // tiles of each block; the first blocks have one more
    int units;                  // of a tile
    int part;                   // units of a tile that a block of a cluster has
    uint32_t over_part, over_row, over_m;  // for divide_by
    int pitch;                  // bytes of a row of X in shared memory
};

// floor(a / b) for a below 2**16, with ceil(2**32 / b); for b = 1 that is 2**32, given as 0.
FPC_DEVICE int divide_by(int a, uint32_t over) {
    return over ? (int)__umulhi((uint32_t)a, over) : a;
}

FPC_DEVICE uint32_t bits_of_sum(int32_t sum) { return (uint32_t)sum; }
FPC_DEVICE uint32_t bits_of_sum(float sum) { return (uint32_t)bits_of(sum); }

FPC_DEVICE uint16_t bits_of_f16(float value) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

template <class P>
struct FewTraits {
    static constexpr bool kIntegers = P::kMode == kInt8;
    static constexpr bool kBytes = P::kMode != kFloats;  // X in global memory
    static constexpr int kScaleBytes = P::kBlock ? 16 * kUnitK / P::kBlock : 0;  // of a unit
    static constexpr int kXBytes = kIntegers ? 1 : 2;  // of an element in shared memory
    static constexpr int kPad = P::kMode == kE4m3 ? 64 : 16;
    using Sum = typename Choose<kIntegers, int32_t, float>::type;
};

// Units in flight: more of them take registers, and time before the first one is used.
template <class P, int kTiles>
constexpr int kAhead = P::kMode == kInt8 && kTiles == 1 ? 3 : 2;

// A warp's part of the stream of weights: units in flight, and where the next one comes from.
template <class P, int kDepth>
struct Stream {
    using T = FewTraits<P>;
    static constexpr int kWords = P::kBlock == 16 ? 2 : 1;
    Quad codes[kDepth][2];
    uint32_t scales[kDepth][2][kWords];  // of rows g and g + 8
    const uint8_t *next, *next_scales;
    int left, left_of_tile, part, skip;

    FPC_DEVICE void load(int slot) {
        if (left > 0) {
            codes[slot][0] = load_stream(next);
            codes[slot][1] = load_stream(next + kUnitBytes / 2);
            if (P::kBlock) {
#pragma unroll
                for (int i = 0; i < 2 * kWords; i++)
                    scales[slot][i / kWords][i % kWords] = load_stream_word(
                        next_scales + i / kWords * (T::kScaleBytes / 2) + i % kWords * 4);
            }
        }
        left--;
        next += kUnitBytes;
        next_scales += T::kScaleBytes;
        if (--left_of_tile == 0) {  // the other units of this tile are another block's
            left_of_tile = part;
            next += (int64_t)skip * kUnitBytes;
            next_scales += (int64_t)skip * T::kScaleBytes;
        }
    }
};

// E4M3 values of k = 4t .. 4t + 3 and of k = 16 + 4t .. as pairs of bf16, exactly.
FPC_DEVICE Quad widened_pairs(uint32_t low, uint32_t high) {
    Quad q;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        // Sign to bit 15, exponent and mantissa to bits 10..4: the value times 2**-120.
        const uint32_t pair = look_up(low, high, 0x0040 | i | (4 + i) << 8) & 0x00FF00FF;
        const uint32_t spread = (pair << 8 & 0x80008000) | (pair << 4 & 0x07F007F0);
        q.words[i] = multiply_pair(spread, 0x7B807B80);
    }
    return q;
}

template <class P>
FPC_DEVICE void stage_x(const FewParameters& p, uint8_t* to, int first_unit, int tokens) {
    using T = FewTraits<P>;
    const int thread = threadIdx.x, bytes = p.part * kUnitK * T::kXBytes, per_row = bytes / 16;
    const int64_t pitch = (int64_t)p.k * (T::kBytes ? 1 : 2);
    const uint8_t* from = p.x + (int64_t)first_unit * kUnitK * (T::kBytes ? 1 : 2);
#pragma unroll 4
    for (int i = thread; i < per_row * p.m; i += kFewThreads) {
        const int row = divide_by(i, p.over_row), column = i - row * per_row;
        Quad* at = (Quad*)(to + row * p.pitch + column * 16);
        if (P::kMode == kE4m3) {
            const uint8_t* k32 = from + row * pitch + column / 4 * 32 + column % 4 * 4;
            *at = widened_pairs(*(const uint32_t*)k32, *(const uint32_t*)(k32 + 16));
        } else {
            *at = load_quad(from + row * pitch + column * 16);
        }
    }
    if (p.m < tokens)  // one row for all tokens that are not there
        for (int i = thread; i < per_row; i += kFewThreads)
            *(Quad*)(to + p.m * p.pitch + i * 16) = Quad{{0, 0, 0, 0}};
}

// Sums, or other numbers, of four rows of a tile.
template <class T>
struct alignas(16) Four {
    T rows[4];
};

// What is added to a result, once that is rounded: as by a kernel of its own. It may be of the
// kernel before this one, so it does not come from the first cache.
template <class P>
FPC_DEVICE float residual_of(const FewParameters& p, int64_t at) {
    if constexpr (P::kOutput == kF32) return __ldcg((const float*)p.residual + at);
    return widened<P::kOutput>(__ldcg((const uint16_t*)p.residual + at));
}

template <class P>
FPC_DEVICE uint16_t half_of(float value) {
    if constexpr (P::kOutput == kF16) return bits_of_f16(value);
    return (uint16_t)(bits_of(rounded_to_bf16(value)) >> 16);
}

// Store the results of rows n to n + 3 for a token, as far as there are such rows.
template <class P>
FPC_DEVICE void store_results(const FewParameters& p, int m, int n, Four<float> results) {
    const int64_t at = (int64_t)m * p.n + n;
    const int count = min(p.n - n, 4);
    if (p.residual) {
        Four<float> others;
#pragma unroll
        for (int i = 0; i < 4; i++) others.rows[i] = i < count ? residual_of<P>(p, at + i) : 0;
#pragma unroll
        for (int i = 0; i < 4; i++)
            results.rows[i] = add(rounded<P::kOutput>(results.rows[i]), others.rows[i]);
    }
    if constexpr (P::kOutput == kF32) {
        float* d = (float*)p.d + at;
        if (p.n % 4 == 0) *(Four<float>*)d = results;
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (p.n % 4 && i < count) d[i] = results.rows[i];
    } else {
        uint16_t halves[4], *d = (uint16_t*)p.d + at;
#pragma unroll
        for (int i = 0; i < 4; i++) halves[i] = half_of<P>(results.rows[i]);
        if (p.n % 4 == 0)
            *(Twin*)d = Twin{{halves[0] | (uint32_t)halves[1] << 16,
                              halves[2] | (uint32_t)halves[3] << 16}};
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (p.n % 4 && i < count) d[i] = halves[i];
    }
}

// kTiles: tiles of 8 tokens; kCluster: blocks that share the K of their tiles.
template <class P, int kTiles, int kCluster>
__global__ void __launch_bounds__(kFewThreads, 1) gemm_few(const __grid_constant__ FewParameters p) {
    using T = FewTraits<P>;
    using Sum = typename T::Sum;
    constexpr int kTokens = 8 * kTiles, kSums = kTokens * kSumPitch, kDepth = kAhead<P, kTiles>;
    extern __shared__ __align__(128) uint8_t memory[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, thread = threadIdx.x;
    const int block = blockIdx.x / kCluster, rank = kCluster > 1 ? blockIdx.x % kCluster : 0;
    const int tiles = p.low_tiles + (block < p.more_tiles), most = p.low_tiles + 1;
    const int first_tile = block * p.low_tiles + min(block, p.more_tiles), total = tiles * p.part;
    const int begin = total * warp / kFewWarps, end = total * (warp + 1) / kFewWarps;
    int tile = divide_by(begin, p.over_part), unit = begin - tile * p.part;

    Stream<P, kDepth> stream;
    const int64_t from = (int64_t)(first_tile + tile) * p.units + rank * p.part + unit;
    stream.next = p.weights + from * kUnitBytes + lane * 16;
    stream.next_scales = p.scales + from * T::kScaleBytes + lane / 4 * (T::kScaleBytes / 16);
    stream.left = end - begin, stream.left_of_tile = p.part - unit;
    stream.part = p.part, stream.skip = p.units - p.part;
#pragma unroll
    for (int slot = 0; slot < kDepth; slot++) stream.load(slot);

    float* row_scales = (float*)memory;
    float* biases = row_scales + most * 16;
    float* token_scales = biases + most * 16;
    int32_t* x_sums = (int32_t*)(token_scales + kMostFewTokens);
    Sum* sums = (Sum*)(x_sums + kMostFewTokens);           // [warps + tiles][kSums]
    Sum* parts = sums + (kFewWarps + most) * kSums;        // [kCluster][tiles][tokens][16]
    uint8_t* x = (uint8_t*)(parts + (kCluster > 1 ? kCluster * most * kTokens * 16 : 0));
    for (int i = thread; i < tiles * 16; i += kFewThreads) {
        const int n = first_tile * 16 + i;
        if (p.row_scale && n < p.n)
            copy_word(shared_address(row_scales + i), p.row_scale + n);
        else
            row_scales[i] = 1;
        if (p.bias && n < p.n)
            copy_word(shared_address(biases + i), p.bias + n);
        else
            biases[i] = 0;
    }

    wait_for_inputs();
    let_next_start();
    if (thread < p.m) {
        float scale = p.token_scale ? p.token_scale[thread] : 1.0f;
        scale = multiply(scale, p.alpha);
        if (p.scalar_a) scale = multiply(scale, *p.scalar_a);
        if (p.scalar_b) scale = multiply(scale, *p.scalar_b);
        token_scales[thread] = scale;
        if (T::kIntegers) x_sums[thread] = ((const int32_t*)p.token_scale)[p.m + thread];
    }
    stage_x<P>(p, x, rank * p.part, kTokens);
    wait_copies();
    if (kCluster > 1) cluster_barrier();  // all blocks run, and may be written to
    __syncthreads();

    const FewStep<P> step;
    uint32_t x_at[kTiles];
#pragma unroll
    for (int i = 0; i < kTiles; i++) {
        const int token = min(8 * i + step.token_of_lane(lane), p.m);
        x_at[i] = shared_address(x) + token * p.pitch + step.x_of_lane(lane);
    }
    Sum even[kTiles][4] = {}, odd[kTiles][4] = {};  // two chains of dependent products
#pragma unroll 1
    for (int done = begin; done < end;) {
#pragma unroll
        for (int slot = 0; slot < kDepth; slot++) {
            if (done >= end) break;
#pragma unroll
            for (int s = 0; s < 2; s++) {
                uint32_t scales[2] = {};
                if (P::kBlock) {
                    scales[0] = stream.scales[slot][0][P::kBlock == 16 ? s : 0];
                    scales[1] = stream.scales[slot][1][P::kBlock == 16 ? s : 0];
                }
                step.run(even, odd, stream.codes[slot][s], scales, s, x_at,
                         (2 * unit + s) * step.kBytesX);
            }
            stream.load(slot);
            done++;
            if (++unit < p.part && done < end) continue;
            // Warp w has a part of tile t: w + t is its place, no two warps have the same.
            Sum* at = sums + (warp + tile) * kSums + lane % 4 * 2 * kSumPitch + lane / 4;
#pragma unroll
            for (int i = 0; i < kTiles; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    at[i * 8 * kSumPitch + j % 2 * kSumPitch + j / 2 * 8] = even[i][j] + odd[i][j];
                    even[i][j] = odd[i][j] = 0;
                }
            }
            unit = 0;
            tile++;
        }
    }
    __syncthreads();

    // The first warp whose units end behind unit `at` of the block, or begin there or behind it;
    // found from a guess that is not too high.
    const float warps_per_unit = (float)kFewWarps / (float)total;
    const auto first_warp = [&](int at, int ahead) {
        int w = max((int)((float)at * warps_per_unit) - 1, 0);
        while (w < kFewWarps && total * (w + ahead) / kFewWarps < at + ahead) w++;
        return w;
    };
    // Every warp's sums of four rows of tile t, in the warps' order.
    const auto sums_of = [&](int t, int m, int row) {
        constexpr int kTogether = 4;  // loads that wait for no other
        const int last = first_warp((t + 1) * p.part, 0);
        Four<Sum> found = {};
        for (int w = first_warp(t * p.part, 1); w < last; w += kTogether) {
            Four<Sum> some[kTogether] = {};
#pragma unroll
            for (int j = 0; j < kTogether; j++) {
                const int v = w + j;
                if (v < last && total * (v + 1) / kFewWarps > total * v / kFewWarps)
                    some[j] = *(const Four<Sum>*)(sums + (v + t) * kSums + m * kSumPitch + row);
            }
#pragma unroll
            for (int j = 0; j < kTogether; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) found.rows[i] += some[j].rows[i];
        }
        return found;
    };
    const int fours = p.m * 4;  // of a tile
    if (kCluster > 1) {
        for (int i = thread; i < fours * tiles; i += kFewThreads) {
            const int t = divide_by(i >> 2, p.over_m), within = i - t * fours;
            const auto found = sums_of(t, within >> 2, (within & 3) * 4);
            const Sum* at = parts + (rank * most + t) * kTokens * 16 + within * 4;
            store_cluster(shared_address(at), t % kCluster,
                          {bits_of_sum(found.rows[0]), bits_of_sum(found.rows[1]),
                           bits_of_sum(found.rows[2]), bits_of_sum(found.rows[3])});
        }
        cluster_barrier();
    }
    for (int i = thread; i < fours * tiles; i += kFewThreads) {
        const int t = divide_by(i >> 2, p.over_m), within = i - t * fours;
        const int row = (within & 3) * 4, m = within >> 2, n = (first_tile + t) * 16 + row;
        if (n >= p.n || (kCluster > 1 && t % kCluster != rank)) continue;
        Four<Sum> found = {};
        if (kCluster > 1) {
            for (int r = 0; r < kCluster; r++) {
                const Sum* at = parts + (r * most + t) * kTokens * 16 + within * 4;
                for (int j = 0; j < 4; j++) found.rows[j] += at[j];
            }
        } else {
            found = sums_of(t, m, row);
        }
        const auto scales = *(const Four<float>*)(row_scales + t * 16 + row);
        const auto added = *(const Four<float>*)(biases + t * 16 + row);
        Four<float> results;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            Sum sum = found.rows[j];
            if constexpr (T::kIntegers) sum -= (int32_t)Decoder<P>::kOffset * x_sums[m];
            results.rows[j] =
                result_of<P>((float)sum, token_scales[m], scales.rows[j], added.rows[j]);
        }
        store_results<P>(p, m, n, results);
    }
}

}  // namespace fpc
