// The products of gemm_many: codes from shared memory to registers, decoded, and multiplied with X.

namespace fpc {

// Scales of blocks that a thread has of a tile of 64 rows: of rows g and g + 8, those of a slot,
// the first one in the lowest byte. `later` are those of the unit's second slot.
template <class P>
struct BlockScales {
    using S = ManyStep<P>;
    uint32_t words[2], later[2];

    FPC_DEVICE void load(uint32_t scales, int row_group, int lane) {
        static_assert(S::kSteps == 2 && (S::kScaleBytes == 4 || S::kScaleBytes == 8), "");
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint32_t at = scales + (row_group * 16 + lane / 4 + 8 * half) * S::kScaleBytes;
            words[half] = load_shared(at);
            later[half] = S::kScaleBytes == 8 ? load_shared(at + 4) : words[half] >> 16;
        }
    }

    FPC_DEVICE void advance() {
        words[0] = later[0];
        words[1] = later[1];
    }
};

// The codes that a thread has of a tile of 64 rows in a slot.
template <class P>
struct WeightCodes {
    static constexpr int kQuads = ManyStep<P>::kStepK / 64;
    Quad quads[kQuads];

    FPC_DEVICE void load(uint32_t codes, int row_group, int lane) {
        const uint32_t from = codes + row_group * 16 * ManyStep<P>::kCodeBytes + lane * 16;
#pragma unroll
        for (int i = 0; i < kQuads; i++) quads[i] = load_shared_quad(from + i * 512);
    }

    // What 32 bytes of K of X are multiplied with.
    FPC_DEVICE void decode(const Decoder<P>& decoder, const BlockScales<P>& scales, int part,
                           uint32_t (&a)[4]) const {
        constexpr bool kPairs = P::kMode == kFloats;  // two parts from each word
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int at = kPairs ? part / 2 : part;
            const uint32_t word = quads[at / 2].words[at % 2 * 2 + half];
            if constexpr (kPairs)
                decoder.decode(word, scales.words[half], part, a[half], a[half + 2]);
            else
                decoder.decode(word, a[half], a[half + 2]);
        }
    }
};

// Small tiles have their codes loaded one slot ahead, behind the decoding of those before.
template <class P, class T>
struct Multiplier {
    using L = ManyLayout<P, T>;
    static constexpr bool kAhead = T::kTokens <= 64;
    uint32_t shared;
    int group, warp, lane;  // warp of the group
    Ring<L::kSlots> ring;   // the next slot that is loaded
    int slot;               // that has the codes
    Decoder<P> decoder;
    WeightCodes<P> codes, next_codes;
    BlockScales<P> scales, next_scales;

    FPC_DEVICE void load(int step, WeightCodes<P>& to, BlockScales<P>& scales_to) {
        barrier_wait(shared + L::kFullAt + 8 * ring.slot, ring.phase);
        const uint32_t from = shared + ring.slot * L::kSlot + L::kX;
        to.load(from, group * 4 + warp, lane);
        if constexpr (P::kBlock > 0) {
            if (step % ManyStep<P>::kSteps == 0)
                scales_to.load(from + L::kCodes, group * 4 + warp, lane);
            else
                scales_to.advance();
        }
    }

    // Have the codes of a step; the X of its slot is the matrix that is returned.
    FPC_DEVICE uint64_t begin(int step, int steps) {
        if (!kAhead) load(step, codes, scales);
        if (kAhead && step == 0) load(step, next_codes, next_scales);
        slot = ring.slot;
        ring.advance();
        if constexpr (kAhead) {
            codes = next_codes;
            scales = next_scales;
            if (step + 1 < steps) load(step + 1, next_codes, next_scales);
        }
        return matrix_descriptor(shared + slot * L::kSlot);
    }

    FPC_DEVICE void decode(int part, uint32_t (&a)[4]) const {
        codes.decode(decoder, scales, part, a);
    }

    // The thread that copies into a slot can do it again.
    FPC_DEVICE void release(int released) const {
        if (lane == 0) barrier_arrive(shared + L::kEmptyAt + 8 * released);
    }
};

// Sums of a tile, exact ones or those of fp32. Some products run while the next codes are decoded.
template <class P, class T, Mode kMode = P::kMode>
struct Sums {
    static constexpr int kColumns = T::kTokens, kUnits = 1;
    static constexpr int kInFlight = T::kTokens > 64 ? 2 : 3;
    typename Choose<kMode == kInt8, int32_t, float>::type values[kUnits][kColumns / 2];

    FPC_DEVICE void add_products(const uint32_t (&a)[4], uint64_t matrix, bool adding) {
        if constexpr (kMode == kInt8)
            add_int8_products(values[0], a, matrix, adding);
        else
            add_bf16_products(values[0], a, matrix, adding);
    }

    FPC_DEVICE void multiply(Multiplier<P, T>& by, int steps) {
        int last = 0;
        for (int step = 0; step < steps; step++) {
            const uint64_t matrix = by.begin(step, steps);
#pragma unroll
            for (int part = 0; part < 4; part++) {
                uint32_t a[4];
                by.decode(part, a);
                products_begin();
                add_products(a, matrix + 2 * part, step > 0 || part > 0);
                products_commit();
                products_wait<kInFlight>();
                if (part == kInFlight - 1 && step > 0) by.release(last);
            }
            last = by.slot;
        }
        products_wait<0>();
        by.release(last);
        pin(values[0]);
    }
};

// The tensor cores keep 14 bits of sums of FP8 products, so that these are taken for no more than
// 128 of K, and added up here: those of 64 tokens while the products of the next 64 run.
template <class P, class T>
struct Sums<P, T, kE4m3> {
    static constexpr int kColumns = T::kTokens < 64 ? T::kTokens : 64;
    static constexpr int kUnits = T::kTokens / kColumns, kTurns = kUnits > 1 ? 2 : 1;
    static_assert(T::kTokens % kColumns == 0, "tokens are whole units");
    float values[kUnits][kColumns / 2];

    FPC_DEVICE void take(int unit, float (&partial)[kColumns / 2]) {
        pin(partial);
#pragma unroll
        for (int i = 0; i < kColumns / 2; i++) values[unit][i] += partial[i];
    }

    FPC_DEVICE void multiply(Multiplier<P, T>& by, int steps) {
#pragma unroll
        for (int i = 0; i < kUnits; i++)
#pragma unroll
            for (int j = 0; j < kColumns / 2; j++) values[i][j] = 0;
        for (int step = 0; step < steps; step++) {
            const uint64_t matrix = by.begin(step, steps);
            uint32_t a[4][4];
            float partial[kTurns][kColumns / 2];
#pragma unroll
            for (int unit = 0; unit < kUnits; unit++) {
#pragma unroll
                for (int part = 0; part < 4; part++) {
                    if (unit == 0) by.decode(part, a[part]);
                    products_begin();
                    add_e4m3_products(partial[unit % kTurns], a[part],
                                      matrix + (unit * kColumns * kStepBytes >> 4) + 2 * part,
                                      part > 0);
                }
                products_commit();
                if (unit == 0) continue;
                products_wait<1>();
                take(unit - 1, partial[(unit - 1) % kTurns]);
            }
            products_wait<0>();
            by.release(by.slot);
            take(kUnits - 1, partial[(kUnits - 1) % kTurns]);
        }
    }
};

}  // namespace fpc
