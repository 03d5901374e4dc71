// The results of gemm_many: sums scaled, with a bias and an activation, and with what is added to
// them, stored by the copy engine.

namespace fpc {

// What belongs to the tokens and rows of a warpgroup's tile: a thread has some of each. Loaded
// before the products, it has arrived when it is needed. Loads of what the kernel before this one
// may have written pass by the first cache, which could have it from before.
template <class P, class T>
struct Scales {
    static constexpr int kRows = 64;
    static constexpr int kEach = (T::kTokens + kGroupThreads - 1) / kGroupThreads;
    float token[kEach], row, bias;
    int32_t sum[kEach];

    FPC_DEVICE Scales(const ManyParameters& p, int first_row, int first_token, int thread) {
#pragma unroll
        for (int i = 0; i < kEach; i++) {
            const int m = first_token + thread + i * kGroupThreads;
            token[i] = m < p.m && p.token_scale ? __ldcg(p.token_scale + m) : 1.0f;
            if (p.residual && m < p.m) fetch(p, m, first_row);
            if constexpr (P::kMode == kInt8) {
                const int32_t* sums = (const int32_t*)p.token_scale + p.m;
                sum[i] = m < p.m ? (int32_t)Decoder<P>::kOffset * __ldcg(sums + m) : 0;
            }
        }
        const int n = first_row + thread;
        const bool there = thread < kRows && n < p.n;
        row = there && p.row_scale ? __ldg(p.row_scale + n) : 1.0f;
        bias = there && p.bias ? __ldg(p.bias + n) : 0.0f;
    }

    // The residual's values of a token, of which each thread will load a few.
    FPC_DEVICE static void fetch(const ManyParameters& p, int m, int first_row) {
        constexpr int kSize = kSizeOf<P::kOutput>;
#pragma unroll
        for (int i = 0; i < kRows; i += 128 / kSize)
            if (first_row + i < p.n)
                prefetch_line(p.residual + ((int64_t)m * p.n + first_row + i) * kSize);
    }

    // To shared memory: pairs of scale and sum, and pairs of scale and bias.
    FPC_DEVICE void share(const ManyParameters& p, uint32_t of_tokens, uint32_t of_rows,
                          int thread) const {
#pragma unroll
        for (int i = 0; i < kEach; i++) {
            const int at = thread + i * kGroupThreads;
            if (at >= T::kTokens) continue;
            const float scale = of_token(p, token[i]);
            store_shared(of_tokens + at * 8, (uint32_t)bits_of(scale));
            if constexpr (P::kMode == kInt8) store_shared(of_tokens + at * 8 + 4, (uint32_t)sum[i]);
        }
        if (thread >= kRows) return;
        store_shared(of_rows + thread * 8, (uint32_t)bits_of(row));
        store_shared(of_rows + thread * 8 + 4, (uint32_t)bits_of(bias));
    }

    // All but the scale of the row, rounded in the order of gemm_few: results are the same bits.
    FPC_DEVICE static float of_token(const ManyParameters& p, float scale) {
        scale = multiply(scale, p.alpha);
        if (p.scalar_a) scale = multiply(scale, __ldcg(p.scalar_a));
        if (p.scalar_b) scale = multiply(scale, __ldcg(p.scalar_b));
        return scale;
    }
};

FPC_DEVICE float without(int32_t excess, int32_t sum) { return (float)(sum - excess); }
FPC_DEVICE float without(int32_t, float sum) { return sum; }

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
                    pairs[j] = pair_of(v[i + j / 2][j % 2 * 2], v[i + j / 2][j % 2 * 2 + 1]);
                const int token = i * 8 + lane / 16 * 8 + lane % 8;
                const uint32_t place = (warp * 2 + lane / 8 % 2 ^ lane % 8) * 16;
                store_transposed(buffer() + token * 128 + place, pairs);
            }
        }
    }

    FPC_DEVICE static uint32_t pair_of(float first, float second) {
        uint32_t pair;
        if constexpr (P::kOutput == kF16)
            asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
        else
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

// The sum of a number of fp32, or of two of 16 bits, with others.
template <Type kType>
FPC_DEVICE uint32_t sum_of(uint32_t a, uint32_t b) {
    if constexpr (kType == kF32)
        return (uint32_t)bits_of(add(widened<kType>(a), widened<kType>(b)));
    else
        return pair_in<kType>(add(widened<kType>(a & 0xFFFF), widened<kType>(b & 0xFFFF)),
                              add(widened<kType>(a >> 16), widened<kType>(b >> 16)));
}

// Add to the results in a Staging, which are rounded, as a kernel of its own would. The residual was
// fetched into the second cache before the products; tiles that leave no register free load a piece
// of 16 bytes at a time.
template <class P, class T>
FPC_DEVICE void add_residual(const ManyParameters& p, const Staging<P, T>& staging, int row,
                             int token) {
    using S = Staging<P, T>;
    constexpr int kSize = kSizeOf<P::kOutput>, kLines = S::kTokens * (64 / S::kBoxRows);
    constexpr int kUnroll = T::kTokens > 128 ? 1 : 2;
    const int piece = staging.lane % 8;
#pragma unroll kUnroll
    for (int line = staging.warp * 4 + staging.lane / 8; line < kLines; line += kGroupThreads / 8) {
        const int m = token + line % S::kTokens;
        const int n = row + line / S::kTokens * S::kBoxRows + piece * (16 / kSize);
        if (m >= p.m || n >= p.n) continue;
        const Quad other = load_past_first_cache(p.residual + ((int64_t)m * p.n + n) * kSize);
        const uint32_t place = staging.buffer() + line * 128 + (piece ^ line % 8) * 16;
        Quad sum = load_shared_quad(place);
#pragma unroll
        for (int j = 0; j < 4; j++) sum.words[j] = sum_of<P::kOutput>(sum.words[j], other.words[j]);
        store_shared(place, sum);
    }
}

// Add the parts of K, in their order; what is left in `own` are the sums of this block's tokens.
template <class T, class Value, int kCount, int kOwn>
FPC_DEVICE void add_parts(uint32_t parts, int rank, int thread, const Value (&values)[kCount],
                          Value (&own)[kOwn]) {
    constexpr int kSplit = T::kSplit, kQuads = kOwn / 4, kThreads = kGroupThreads * T::kGroups;
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
                const float sum = without(q.words[j % 2 * 2 + 1], values[(first + i) * 4 + j]);
                results[i][j] = result_of<P>(sum, float_of(q.words[j % 2 * 2]), row_scale[j / 2],
                                             bias[j / 2]);
            }
        }
        staging.begin();
        staging.write(results);
        if (p.residual) {
            staging.sync();
            add_residual(p, staging, row, token + at + first * 8);
        }
        staging.send(p.d, row, token + at + first * 8, p.n);
    }
}

}  // namespace fpc
