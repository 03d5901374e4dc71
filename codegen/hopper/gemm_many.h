// GEMM of packed weights for many tokens: D^T = W X^T by the tensor cores of Hopper, W in registers,
// where its codes are decoded, and X in shared memory.
//
// A block has one thread that copies and two warpgroups that multiply; they share a ring of slots in
// shared memory, each with 128 bytes of K of a tile of W and of a tile of X. Blocks stay and take
// one tile after another. Blocks of a cluster either have neighbouring tiles of W and copy a part of
// the same tile of X for each other, or share a tile and have a part of K each.

namespace fpc {

constexpr int kGroupThreads = 128, kGroups = 2;  // of a warpgroup; warpgroups that multiply
constexpr int kManyThreads = kGroupThreads * (kGroups + 1);
constexpr int kStepK = 128;             // bytes of K in a slot
constexpr int kSharedBytes = 227 << 10;  // of a block
constexpr int kStagedBytes = 4096;      // of a part of D on its way out

enum Activation { kIdentity, kActSilu, kActGelu, kActGeluTanh };

struct ManyParameters {
    CUtensorMap x, weights, exponents, d;
    const float *token_scale, *row_scale, *bias, *scalar_a, *scalar_b;
    const int32_t* x_sum;
    float alpha;
    int32_t m, n, steps;      // steps: k / kStepK
    int32_t row_tiles;        // of a cluster
    int32_t token_tiles;
    int32_t together;         // tiles of tokens that are taken in turn for each tile of rows
};

// kHeight: tiles of 64 rows that a warpgroup has; kSharing: blocks of a cluster that share X;
// kSplit: blocks of a cluster that share K; kInFlight: int8 products that run while codes are decoded;
// kDelay: nanoseconds that the second warpgroup starts later.
template <int kTokens_, int kHeight_ = 1, int kSharing_ = 1, int kSplit_ = 1, int kInFlight_ = 2,
          int kDelay_ = 0>
struct ManyTile {
    static constexpr int kInFlight = kInFlight_, kDelay = kDelay_;
    static constexpr int kTokens = kTokens_, kHeight = kHeight_, kSharing = kSharing_;
    static constexpr int kSplit = kSplit_, kCluster = kSharing * kSplit;
    static constexpr int kRows = 64 * kGroups * kHeight;
    static_assert(kSharing == 1 || kSplit == 1, "a cluster has one purpose");
    static_assert(kSplit == 1 || kHeight == 1, "parts of K are added for one tile of 64 rows");
};

template <class P, class T>
struct ManyLayout {
    static constexpr bool kExponents = P::kExponents;
    static constexpr int kX = T::kTokens * kStepK, kCodes = T::kRows * kStepK / 2;
    static constexpr int kExponentBytes = kExponents ? T::kRows * kStepK / 32 : 0;
    static constexpr int kCopied = kX + kCodes + kExponentBytes;
    static constexpr int kSlot = (kCopied + 1023) / 1024 * 1024;
    static constexpr int kStaged = kGroups * 2 * kStagedBytes;
    static constexpr int kParts = T::kSplit > 1 ? T::kRows * T::kTokens * 4 : 0;
    static constexpr int kOfTokens = T::kTokens * 8, kOfRows = 64 * T::kHeight * 8;
    static constexpr int kScales = kGroups * (kOfTokens + kOfRows);
    static constexpr int kBarriers = 256;
    static constexpr int kMost = (kSharedBytes - kStaged - kParts - kScales - kBarriers) / kSlot;
    static constexpr int kSlots = kMost > 16 ? 16 : kMost;
    static_assert(kSlots >= 3, "too few slots to hide the copies");

    static constexpr int kStagedAt = kSlots * kSlot, kPartsAt = kStagedAt + kStaged;
    static constexpr int kScalesAt = kPartsAt + kParts, kFullAt = kScalesAt + kScales;
    static constexpr int kEmptyAt = kFullAt + 8 * kSlots, kBytes = kFullAt + kBarriers;
};

// A place in the ring, and how often the ring was gone round, modulo 2.
template <int kSlots>
struct Ring {
    int slot = 0;
    uint32_t phase = 0;

    FPC_DEVICE void advance() {
        if (++slot < kSlots) return;
        slot = 0;
        phase ^= 1;
    }
};

// Where a block's work is.
template <class T>
struct Work {
    int row, token;    // first ones
    int first, last;   // steps of K

    FPC_DEVICE Work(const ManyParameters& p, int tile, int rank) {
        const int each = p.together * p.row_tiles, before = tile / each * p.together;
        const int side = min(p.together, p.token_tiles - before), within = tile % each;
        const int row_tile = within / side * T::kSharing + (T::kSharing > 1 ? rank : 0);
        row = row_tile * T::kRows;
        token = (before + within % side) * T::kTokens;
        const int part = T::kSplit > 1 ? rank : 0;
        first = (int)((int64_t)p.steps * part / T::kSplit);
        last = (int)((int64_t)p.steps * (part + 1) / T::kSplit);
    }
};

template <class T>
FPC_DEVICE int first_tile() {
    return (int)blockIdx.x / T::kCluster;
}

template <class T>
FPC_DEVICE int next_tile(int tile) {
    return tile + (int)gridDim.x / T::kCluster;
}

// --- the thread that copies ----------------------------------------------------------------------

template <class P, class T>
FPC_DEVICE void copy_tiles(const ManyParameters& p, uint32_t shared, int rank) {
    using L = ManyLayout<P, T>;
    constexpr int kShare = T::kTokens / T::kSharing;
    const int tiles = p.row_tiles * p.token_tiles;
    Ring<L::kSlots> ring;
    for (int tile = first_tile<T>(); tile < tiles; tile = next_tile<T>(tile)) {
        const Work<T> work(p, tile, rank);
        for (int step = work.first; step < work.last; step++, ring.advance()) {
            const uint32_t to = shared + ring.slot * L::kSlot;
            const uint32_t full = shared + L::kFullAt + 8 * ring.slot;
            barrier_wait(shared + L::kEmptyAt + 8 * ring.slot, ring.phase ^ 1);
            barrier_expect(full, L::kCopied);
            load_tile(p.weights, to + L::kX, full, 0, step, work.row / 16);
            if constexpr (L::kExponents)
                load_tile(p.exponents, to + L::kX + L::kCodes, full, 0, step, work.row / 16);
            if constexpr (T::kSharing == 1)
                load_tile(p.x, to, full, step * kStepK, work.token);
            else
                load_tile_cluster(p.x, to + rank * kShare * kStepK, full, step * kStepK,
                                  work.token + rank * kShare, (1 << T::kSharing) - 1);
        }
    }
}

// --- the warpgroups that multiply ----------------------------------------------------------------

// The codes that a thread has of a tile of 64 rows and 128 bytes of K.
template <class P>
struct WeightCodes {
    Quad quads[2];
    uint32_t exponents[2];  // of the rows g and g + 8: a byte for each 32 of K

    FPC_DEVICE void load(uint32_t codes, uint32_t exponents_at, int row_group, int lane) {
        const uint32_t from = codes + row_group * 1024 + lane * 16;
        quads[0] = load_shared_quad(from);
        quads[1] = load_shared_quad(from + 512);
        if constexpr (P::kExponents) {
            const uint32_t at = exponents_at + row_group * 64 + lane / 4 * 4;
            exponents[0] = load_shared(at);
            exponents[1] = load_shared(at + 32);
        }
    }

    // Bytes for 32 of K.
    FPC_DEVICE void decode(const Decoder<P>& decoder, int part, uint32_t (&a)[4]) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint32_t word = quads[part / 2].words[part % 2 * 2 + half];
            if constexpr (P::kExponents)
                decoder.decode(word, exponents[half] >> 8 * part & 0xFF, a[half], a[half + 2]);
            else
                decoder.decode(word, a[half], a[half + 2]);
        }
    }
};

template <class P, class T>
struct Multiplier {
    using L = ManyLayout<P, T>;
    uint32_t shared;
    int group, warp, lane;  // warp of the group
    Ring<L::kSlots> ring;
    Decoder<P> decoder;

    FPC_DEVICE uint32_t wait_for_slot() const {
        barrier_wait(shared + L::kFullAt + 8 * ring.slot, ring.phase);
        return shared + ring.slot * L::kSlot;
    }

    // The blocks that copy into a slot can do it again.
    FPC_DEVICE void release(int slot) const {
        const uint32_t empty = shared + L::kEmptyAt + 8 * slot;
        if constexpr (T::kSharing == 1) {
            if (lane == 0) barrier_arrive(empty);
        } else {
            if (lane < T::kSharing) barrier_arrive_cluster(empty, lane);
        }
    }

    FPC_DEVICE WeightCodes<P> load_codes(uint32_t slot, int tile) const {
        WeightCodes<P> codes;
        const int row_group = (group * T::kHeight + tile) * 4 + warp;
        codes.load(slot + L::kX, slot + L::kX + L::kCodes, row_group, lane);
        return codes;
    }
};

// int32 sums of a tile. Some products run while the codes of the next ones are decoded.
template <class P, class T, Mode kMode = P::kMode>
struct Sums {
    static constexpr int kColumns = T::kTokens, kUnits = T::kHeight, kInFlight = T::kInFlight;
    int32_t values[kUnits][kColumns / 2];

    FPC_DEVICE static constexpr int tile_of(int unit) { return unit; }
    FPC_DEVICE static constexpr int column_of(int) { return 0; }

    FPC_DEVICE void multiply(Multiplier<P, T>& by, int steps) {
        int last = 0;
        for (int step = 0; step < steps; step++, by.ring.advance()) {
            const uint32_t slot = by.wait_for_slot();
            const uint64_t matrix = matrix_descriptor(slot);
            WeightCodes<P> codes[T::kHeight];
#pragma unroll
            for (int i = 0; i < T::kHeight; i++) codes[i] = by.load_codes(slot, i);
#pragma unroll
            for (int i = 0; i < 4 * T::kHeight; i++) {
                const int part = i / T::kHeight, tile = i % T::kHeight;
                uint32_t a[4];
                codes[tile].decode(by.decoder, part, a);
                products_begin();
                add_products(values[tile], a, matrix + 2 * part, step > 0 || part > 0);
                products_commit();
                products_wait<kInFlight>();
                if (i == kInFlight - 1 && step > 0) by.release(last);
            }
            last = by.ring.slot;
        }
        products_wait<0>();
        by.release(last);
#pragma unroll
        for (int i = 0; i < kUnits; i++) pin(values[i]);
    }
};

// fp32 sums: the tensor cores keep 14 bits of sums of FP8 products, so that these are taken for no
// more than 128 of K, and added up here.
template <class P, class T>
struct Sums<P, T, kE4m3> {
    static constexpr int kColumns = T::kTokens < 128 ? T::kTokens : 128;
    static constexpr int kAcross = T::kTokens / kColumns, kUnits = T::kHeight * kAcross;
    float values[kUnits][kColumns / 2];

    FPC_DEVICE static constexpr int tile_of(int unit) { return unit / kAcross; }
    FPC_DEVICE static constexpr int column_of(int unit) { return unit % kAcross * kColumns; }

    FPC_DEVICE void multiply(Multiplier<P, T>& by, int steps) {
#pragma unroll
        for (int i = 0; i < kUnits; i++)
#pragma unroll
            for (int j = 0; j < kColumns / 2; j++) values[i][j] = 0;
        for (int step = 0; step < steps; step++, by.ring.advance()) {
            const uint32_t slot = by.wait_for_slot();
            const uint64_t matrix = matrix_descriptor(slot);
#pragma unroll
            for (int tile = 0; tile < T::kHeight; tile++) {
                const WeightCodes<P> codes = by.load_codes(slot, tile);
                uint32_t a[4][4];
#pragma unroll
                for (int across = 0; across < kAcross; across++) {
                    const int unit = tile * kAcross + across;
                    float partial[kColumns / 2];
#pragma unroll
                    for (int part = 0; part < 4; part++) {
                        if (across == 0) codes.decode(by.decoder, part, a[part]);
                        products_begin();
                        add_products(partial, a[part],
                                     matrix + (across * kColumns * kStepK >> 4) + 2 * part,
                                     part > 0);
                    }
                    products_commit();
                    products_wait<0>();
                    if (unit == kUnits - 1) by.release(by.ring.slot);
                    pin(partial);
#pragma unroll
                    for (int j = 0; j < kColumns / 2; j++) values[unit][j] += partial[j];
                }
            }
        }
    }
};

// --- sums to results -----------------------------------------------------------------------------

// What belongs to the tokens and rows of a warpgroup's tile: a thread has some of each. Loaded before
// the products, it has arrived when it is needed.
template <class P, class T>
struct Scales {
    static constexpr int kRows = 64 * T::kHeight;
    static constexpr int kEach = (T::kTokens + kGroupThreads - 1) / kGroupThreads;
    static_assert(kRows <= kGroupThreads, "a thread has one row");
    float token[kEach], row, bias;
    int32_t sum[kEach];

    FPC_DEVICE Scales(const ManyParameters& p, int first_row, int first_token, int thread) {
#pragma unroll
        for (int i = 0; i < kEach; i++) {
            const int m = first_token + thread + i * kGroupThreads;
            token[i] = m < p.m && p.token_scale ? __ldg(p.token_scale + m) : 1.0f;
            if constexpr (P::kMode == kInt8)
                sum[i] = m < p.m ? (int32_t)Decoder<P>::kOffset * __ldg(p.x_sum + m) : 0;
        }
        const int n = first_row + thread;
        const bool there = thread < kRows && n < p.n;
        row = there && p.row_scale ? __ldg(p.row_scale + n) : 1.0f;
        bias = there && p.bias ? __ldg(p.bias + n) : 0.0f;
    }

    // To shared memory: pairs of scale and sum, and pairs of scale and bias.
    FPC_DEVICE void share(const ManyParameters& p, uint32_t of_tokens, uint32_t of_rows,
                          int thread) const {
#pragma unroll
        for (int i = 0; i < kEach; i++) {
            const int at = thread + i * kGroupThreads;
            if (at >= T::kTokens) continue;
            store_shared(of_tokens + at * 8, (uint32_t)bits_of(token[i]));
            if constexpr (P::kMode == kInt8) store_shared(of_tokens + at * 8 + 4, (uint32_t)sum[i]);
        }
        if (thread >= kRows) return;
        float scale = multiply(row, p.alpha);
        if (p.scalar_a) scale = multiply(scale, __ldg(p.scalar_a));
        if (p.scalar_b) scale = multiply(scale, __ldg(p.scalar_b));
        store_shared(of_rows + thread * 8, (uint32_t)bits_of(scale));
        store_shared(of_rows + thread * 8 + 4, (uint32_t)bits_of(bias));
    }
};

template <class P>
FPC_DEVICE float activated(float x) {
    if constexpr (P::kActivation == kActSilu) return silu(x);
    if constexpr (P::kActivation == kActGelu) return gelu(x);
    if constexpr (P::kActivation == kActGeluTanh) return gelu_tanh(x);
    return x;
}

FPC_DEVICE float scaled(int32_t value, int32_t excess, float scale, float bias) {
    return fused((float)(value - excess), scale, bias);
}

FPC_DEVICE float scaled(float value, int32_t, float scale, float bias) {
    return fused(value, scale, bias);
}

// Tokens of D that leave together: a box of [tokens][64 rows], 128 bytes a line, or for fp32 two
// boxes of 32 rows each. Lines are swizzled, so that the 32 lanes write to different banks.
template <class P, class T>
struct Staging {
    static constexpr int kAtOnce = P::kOutput == kF32 ? 16 : 32;
    static constexpr int kOwn = T::kTokens / T::kSplit;  // tokens of a block
    static constexpr int kTokens = kOwn < kAtOnce ? kOwn : kAtOnce;
    static constexpr int kBlocks = kTokens / 8, kBoxRows = P::kOutput == kF32 ? 32 : 64;
    uint32_t at;
    int barrier, warp, lane;
    uint32_t turn = 0;

    FPC_DEVICE uint32_t buffer() const { return at + (turn & 1) * kStagedBytes; }

    // Values of four tokens' pairs: rows g (tokens 2t and 2t + 1), then rows g + 8.
    FPC_DEVICE void write(const float (&v)[kBlocks][4]) const {
        if constexpr (P::kOutput == kF32) {
            const uint32_t box = buffer() + warp / 2 * (kTokens * 128);
#pragma unroll
            for (int i = 0; i < kBlocks * 4; i++) {
                const int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
                const int row = warp % 2 * 16 + i % 4 / 2 * 8 + lane / 4;
                const uint32_t place = (row / 4 ^ token % 8) * 16 + row % 4 * 4;
                store_shared(box + token * 128 + place, (uint32_t)bits_of(v[i / 4][i % 4]));
            }
        } else {
            constexpr int kMatrices = kBlocks % 2 ? 2 : 4;
#pragma unroll
            for (int i = 0; i < kBlocks; i += kMatrices / 2) {
                uint32_t pairs[kMatrices];
#pragma unroll
                for (int j = 0; j < kMatrices; j++)
                    pairs[j] = bf16_pair(v[i + j / 2][j % 2 * 2], v[i + j / 2][j % 2 * 2 + 1]);
                const int token = i * 8 + lane / 16 * 8 + lane % 8;
                const uint32_t place = (warp * 2 + lane / 8 % 2 ^ lane % 8) * 16;
                store_transposed(buffer() + token * 128 + place, pairs);
            }
        }
    }

    FPC_DEVICE static uint32_t bf16_pair(float first, float second) {
        uint32_t pair;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
        return pair;
    }

    FPC_DEVICE bool leads() const { return warp == 0 && lane == 0; }
    FPC_DEVICE void sync() const { named_barrier(barrier, kGroupThreads); }

    // The buffer's earlier contents have left.
    FPC_DEVICE void begin() const {
        if (leads()) wait_stores_read<1>();
        sync();
    }

    FPC_DEVICE void send(const CUtensorMap& d, int row, int token, int rows) {
        publish_writes();
        sync();
        if (leads()) {
#pragma unroll
            for (int i = 0; i < 64 / kBoxRows; i++)
                if (row + i * kBoxRows < rows)
                    store_tile(d, buffer() + i * kTokens * 128, row + i * kBoxRows, token);
            commit_stores();
        }
        turn++;
    }
};

// Add the parts of K, in their order; what is left in `own` are the sums of this block's tokens.
template <int kSplit, class Value, int kCount, int kOwn>
FPC_DEVICE void add_parts(uint32_t parts, int rank, int thread, const Value (&values)[kCount],
                          Value (&own)[kOwn]) {
    constexpr int kQuads = kOwn / 4, kThreads = kGroupThreads * kGroups;
    static_assert(kOwn * kSplit == kCount && kOwn % 4 == 0, "");
#pragma unroll
    for (int to = 0; to < kSplit; to++)
#pragma unroll
        for (int i = 0; i < kQuads; i++) {
            uint32_t words[4];
#pragma unroll
            for (int j = 0; j < 4; j++) memcpy(&words[j], &values[to * kOwn + i * 4 + j], 4);
            store_cluster(parts + ((rank * kQuads + i) * kThreads + thread) * 16, to, words);
        }
    cluster_barrier();
#pragma unroll
    for (int from = 0; from < kSplit; from++)
#pragma unroll
        for (int i = 0; i < kQuads; i++) {
            const Quad q = load_shared_quad(parts + ((from * kQuads + i) * kThreads + thread) * 16);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                Value value;
                memcpy(&value, &q.words[j], 4);
                own[i * 4 + j] = from ? own[i * 4 + j] + value : value;
            }
        }
}

// Scale and store the sums of 64 rows; `at` is their first token's place in the tile.
template <class P, class T, class Value, int kCount>
FPC_DEVICE void store_sums(const ManyParameters& p, Staging<P, T>& staging, uint32_t of_tokens,
                           uint32_t of_rows, const Value (&values)[kCount], int row, int token,
                           int at) {
    constexpr int kBlocks = Staging<P, T>::kBlocks;
    float row_scale[2], bias[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int in_tile = staging.warp * 16 + staging.lane / 4 + 8 * i;
        row_scale[i] = float_of((int32_t)load_shared(of_rows + in_tile * 8));
        bias[i] = float_of((int32_t)load_shared(of_rows + in_tile * 8 + 4));
    }
#pragma unroll
    for (int first = 0; first < kCount / 4; first += kBlocks) {
        float results[kBlocks][4];
#pragma unroll
        for (int i = 0; i < kBlocks; i++) {
            const int column = at + (first + i) * 8 + staging.lane % 4 * 2;
            const Quad q = load_shared_quad(of_tokens + column * 8);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float scale = multiply(row_scale[j / 2], float_of(q.words[j % 2 * 2]));
                results[i][j] = activated<P>(scaled(values[(first + i) * 4 + j],
                                                    q.words[j % 2 * 2 + 1], scale, bias[j / 2]));
            }
        }
        staging.begin();
        staging.write(results);
        staging.send(p.d, row, token + at + first * 8, p.n);
    }
}

template <class P, class T>
FPC_DEVICE void multiply_tiles(const ManyParameters& p, uint32_t shared, int rank) {
    using L = ManyLayout<P, T>;
    const int group = (int)threadIdx.x / kGroupThreads - 1, thread = (int)threadIdx.x % 128;
    const int warp = thread / 32, lane = thread % 32, tiles = p.row_tiles * p.token_tiles;
    const uint32_t of_tokens = shared + L::kScalesAt + group * (L::kOfTokens + L::kOfRows);
    const uint32_t of_rows = of_tokens + L::kOfTokens;
    Multiplier<P, T> by{shared, group, warp, lane};
    Staging<P, T> staging{shared + L::kStagedAt + group * 2 * kStagedBytes, group + 1, warp, lane};
    if (T::kDelay && group) __nanosleep(T::kDelay);
    for (int tile = first_tile<T>(); tile < tiles; tile = next_tile<T>(tile)) {
        const Work<T> work(p, tile, rank);
        const int row = work.row + group * T::kHeight * 64;
        const Scales<P, T> scales(p, row, work.token, thread);
        Sums<P, T> sums;
        sums.multiply(by, work.last - work.first);
        scales.share(p, of_tokens, of_rows, thread);
        staging.sync();
        if constexpr (T::kSplit > 1) {
            constexpr int kOwn = T::kTokens / T::kSplit;
            decltype(sums.values[0][0] + 0) own[kOwn / 2];
            add_parts<T::kSplit>(shared + L::kPartsAt, rank, group * kGroupThreads + thread,
                                 sums.values[0], own);
            store_sums(p, staging, of_tokens, of_rows, own, row, work.token, rank * kOwn);
        } else {
#pragma unroll
            for (int i = 0; i < Sums<P, T>::kUnits; i++) {
                const int in_group = sums.tile_of(i) * 64;
                store_sums(p, staging, of_tokens, of_rows + in_group * 8, sums.values[i],
                           row + in_group, work.token, sums.column_of(i));
            }
        }
    }
    if (staging.leads()) wait_stores_read<0>();
}

template <class P, class T>
__global__ void __launch_bounds__(kManyThreads, 1)
gemm_many(const __grid_constant__ ManyParameters p) {
    using L = ManyLayout<P, T>;
    extern __shared__ __align__(1024) uint8_t memory[];
    const uint32_t shared = shared_address(memory);
    const int rank = T::kCluster > 1 ? (int)cluster_rank() : 0;
    if (threadIdx.x == 0) {
        prefetch_map(p.x);
        prefetch_map(p.weights);
        prefetch_map(p.d);
        for (int i = 0; i < L::kSlots; i++) {
            barrier_init(shared + L::kFullAt + 8 * i, 1);
            barrier_init(shared + L::kEmptyAt + 8 * i, kGroups * 4 * T::kSharing);
        }
        barrier_init_done();
    }
    if constexpr (T::kCluster > 1)
        cluster_barrier();
    else
        __syncthreads();
    if (threadIdx.x < kGroupThreads) {
        lower_registers<40>();
        if (threadIdx.x == 0) copy_tiles<P, T>(p, shared, rank);
        if constexpr (T::kSplit > 1) cluster_barrier();
    } else {
        raise_registers<232>();
        multiply_tiles<P, T>(p, shared, rank);
    }
    // Others still copy to this block and arrive at its barriers.
    if constexpr (T::kSharing > 1) cluster_barrier();
}

}  // namespace fpc
