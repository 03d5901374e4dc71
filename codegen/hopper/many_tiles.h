// The tiles of gemm_many: where they are, how they lie in shared memory, and the thread that
// copies.

namespace fpc {

constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr int kStepBytes = 128;     // of a token in a slot
constexpr int kStagedBytes = 4096;  // of a part of D on its way out

struct ManyParameters {
    CUtensorMap x, weights, scales, d;
    const float *token_scale, *row_scale, *bias, *scalar_a, *scalar_b;
    const uint8_t* residual;
    float alpha;
    int32_t m, n, units;  // units: k / kUnitK
    int32_t row_tiles, token_tiles;
    int32_t tokens;       // of a copy of X
    int32_t together;     // tiles of tokens that are taken in turn for each tile of rows
};

// kSplit: blocks of a cluster that share K; kGroups: warpgroups that multiply, with 64 rows each.
template <int kTokens_, int kSplit_ = 1, int kGroups_ = 2>
struct ManyTile {
    static constexpr int kTokens = kTokens_, kSplit = kSplit_, kGroups = kGroups_;
    static constexpr int kRows = 64 * kGroups, kThreads = kGroupThreads * (kGroups + 1);
};

// A slot has kStepK of K. Scales come with the first of the slots of a unit.
template <class P>
struct ManyStep {
    static constexpr int kStepK = P::kMode == kFloats ? kStepBytes / 2 : kStepBytes;
    static constexpr int kCodeBytes = kStepK / 2;  // of a row
    static constexpr int kSteps = kUnitK / kStepK;  // of a unit
    static constexpr int kScaleBytes = P::kBlock ? kUnitK / P::kBlock : 0;  // of a row and unit
};

template <class P, class T>
struct ManyLayout {
    using S = ManyStep<P>;
    static constexpr int kX = T::kTokens * kStepBytes, kCodes = T::kRows * S::kCodeBytes;
    static constexpr int kScales = T::kRows * S::kScaleBytes;
    static constexpr int kSlot = (kX + kCodes + kScales + 1023) / 1024 * 1024;
    static constexpr int kStaged = T::kGroups * 2 * kStagedBytes;
    static constexpr int kParts = T::kSplit > 1 ? T::kRows * T::kTokens * 4 : 0;
    static constexpr int kOfTokens = T::kTokens * 8, kOfRows = 64 * 8;
    static constexpr int kFactors = T::kGroups * (kOfTokens + kOfRows), kBarriers = 256;
    static constexpr int kMost = (kSharedBytes - kStaged - kParts - kFactors - kBarriers) / kSlot;
    static constexpr int kSlots = kMost > 16 ? 16 : kMost;
    static_assert(kSlots >= 3, "too few slots to hide the copies");

    static constexpr int kStagedAt = kSlots * kSlot, kPartsAt = kStagedAt + kStaged;
    static constexpr int kFactorsAt = kPartsAt + kParts, kFullAt = kFactorsAt + kFactors;
    static constexpr int kEmptyAt = kFullAt + 8 * kSlots, kBytes = kFullAt + kBarriers;
};

// A place in the ring of slots, and how often the ring was gone round, modulo 2.
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
template <class P, class T>
struct Work {
    int row, token;   // first ones
    int first, last;  // steps of K

    FPC_DEVICE Work(const ManyParameters& p, int tile, int rank) {
        const int each = p.together * p.row_tiles, before = tile / each * p.together;
        const int side = min(p.together, p.token_tiles - before), within = tile % each;
        row = within / side * T::kRows;
        token = (before + within % side) * T::kTokens;
        first = first_step(p, rank);
        last = first_step(p, rank + 1);
    }

    FPC_DEVICE static int first_step(const ManyParameters& p, int rank) {
        return (int)((int64_t)p.units * rank / T::kSplit) * ManyStep<P>::kSteps;
    }
};

template <class T>
FPC_DEVICE int first_tile() {
    return (int)blockIdx.x / T::kSplit;
}

template <class T>
FPC_DEVICE int next_tile(int tile) {
    return tile + (int)gridDim.x / T::kSplit;
}

// Weights do not depend on the kernels before this one: those of the first slot are loaded at once.
template <class P, class T>
FPC_DEVICE void copy_tiles(const ManyParameters& p, uint32_t shared, int rank) {
    using L = ManyLayout<P, T>;
    using S = ManyStep<P>;
    const int tiles = p.row_tiles * p.token_tiles, of_x = p.tokens * kStepBytes;
    bool waited = false;
    Ring<L::kSlots> ring;
    for (int tile = first_tile<T>(); tile < tiles; tile = next_tile<T>(tile)) {
        const Work<P, T> work(p, tile, rank);
        for (int step = work.first; step < work.last; step++) {
            const uint32_t to = shared + ring.slot * L::kSlot;
            const uint32_t full = shared + L::kFullAt + 8 * ring.slot;
            const bool with_scales = L::kScales && step % S::kSteps == 0;
            barrier_wait(shared + L::kEmptyAt + 8 * ring.slot, ring.phase ^ 1);
            barrier_expect(full, of_x + L::kCodes + (with_scales ? L::kScales : 0));
            load_tile(p.weights, to + L::kX, full, 0, step, work.row / 16);
            if (with_scales)
                load_tile(p.scales, to + L::kX + L::kCodes, full, 0, step / S::kSteps,
                          work.row / 16);
            if (!waited) wait_for_inputs();
            waited = true;
            load_tile(p.x, to, full, step * S::kStepK, work.token);
            ring.advance();
        }
    }
}

}  // namespace fpc
