// The values that are quantized: fpcompiler/runtime/fused.py says where results are rounded, and
// fpcompiler/native/csrc/produce_rows.h is the same for the CPU.

namespace fpc {

enum Head {
    kNoHead = -1,
    kRmsNorm = 0,
    kRmsNormWide = 1,
    kLayerNorm = 2,
    kSilu = 3,
    kGelu = 4,
    kGeluTanh = 5,
    kRelu = 6
};
enum Tail { kNoTail = 0, kMul = 1, kAdd = 2, kModulate = 3 };

template <Head head>
constexpr bool kIsNorm = head >= kRmsNorm && head <= kLayerNorm;

template <Head kHead>
FPC_DEVICE float activation_of(float x) {
    if constexpr (kHead == kSilu) return silu(x);
    if constexpr (kHead == kGelu) return gelu(x);
    if constexpr (kHead == kGeluTanh) return gelu_tanh(x);
    return x < 0.0f ? 0.0f : x;
}

// What a norm knows of its whole row.
struct Statistics {
    float mean = 0, factor = 1;
};

// The sum of what `term` gives for each value, by halves: five roundings deep at most.
template <class Term>
FPC_DEVICE float sum_of(const float (&values)[kChunk], const Term& term) {
    float sums[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; i++) sums[i] = term(values[i], i);
    // The inner loop has as many turns each time: otherwise compilers may not unroll both, and then
    // keep the sums in memory.
#pragma unroll
    for (int half = kChunk / 2; half; half /= 2)
#pragma unroll
        for (int i = 0; i < kChunk / 2; i++)
            if (i < half) sums[i] = add(sums[i], sums[i + half]);
    return sums[0];
}

// The transform of fpcompiler/numerics/hadamard.py, for the part of a block that a lane has.
template <int kBlock>
FPC_DEVICE void hadamard(float (&values)[kChunk]) {
#pragma unroll
    for (int half = 1; half < kChunk; half *= 2)
#pragma unroll
        for (int i = 0; i < kChunk; i++)
            if (!(i & half)) {
                const float a = values[i], b = values[i + half];
                values[i] = add(a, b);
                values[i + half] = subtract(a, b);
            }
#pragma unroll
    for (int lanes = 1; lanes < kBlock / kChunk; lanes *= 2)
        each(values, [=](float own, int) {
            const float other = exchange(own, lanes);
            return threadIdx.x & lanes ? subtract(other, own) : add(own, other);
        });
    constexpr float kFactor = kBlock == 16   ? 0.25f
                              : kBlock == 32 ? 0.17677669529663687f
                              : kBlock == 64 ? 0.125f
                                             : 0.08838834764831845f;
    each(values, [](float value, int) { return multiply(value, kFactor); });
}

// The results of an activation of bf16 values: of zero and of those between 2**-16 and 16, of either
// sign. What a block looks up it has computed by the same operations as others do.
template <class P>
struct ActivationTable {
    static constexpr bool kPossible =
        P::kInput == kBf16 && (P::kHead == kSilu || P::kHead == kGelu || P::kHead == kGeluTanh);
    static constexpr int kFirst = (127 - 16) << 7, kCount = 20 << 7;  // magnitudes, as bits
    static constexpr int kOfSign = kCount + 1, kSize = 2 * kOfSign;
    uint16_t* results;

    // All threads of a block take part.
    FPC_DEVICE static ActivationTable made() {
        const ActivationTable table{block_memory<uint16_t, kSize>()};
        const int threads = (int)(blockDim.x * blockDim.y);
        for (int i = (int)(threadIdx.y * blockDim.x + threadIdx.x); i < kSize; i += threads) {
            const uint32_t place = i % kOfSign, size = place ? kFirst + place - 1 : 0;
            const uint32_t bits = size | (uint32_t)(i / kOfSign) << 15;
            table.results[i] = (uint16_t)(bits_of(computed(float_of((int32_t)(bits << 16)))) >> 16);
        }
        barrier();
        return table;
    }

    FPC_DEVICE static float computed(float x) {
        return rounded<P::kInput>(activation_of<P::kHead>(x));
    }

    FPC_DEVICE void apply(float (&values)[kChunk]) const {
        bool known = true;
#pragma unroll
        for (int i = 0; i < kChunk; i++) {
            const uint32_t size = size_of(values[i]);
            known = known && (size == 0 || size - kFirst < kCount);
        }
        if (known) each(values, [&](float x, int) { return look_up(x); });
        else each(values, [](float x, int) { return computed(x); });
    }

   private:
    FPC_DEVICE static uint32_t size_of(float x) { return (uint32_t)bits_of(x) >> 16 & 0x7FFF; }

    FPC_DEVICE float look_up(float x) const {
        const int32_t place = larger((int32_t)size_of(x) - kFirst + 1, 0);
        const uint16_t found = results[place + (bits_of(x) < 0 ? kOfSign : 0)];
        return float_of((int32_t)((uint32_t)found << 16));
    }
};

// kTable: activations are looked up.
template <class P, bool kTable = false>
struct Producer {
    static constexpr bool kWeighted = P::kHead == kRmsNorm && P::kWeight != kNoType;
    static constexpr Type kHeadType = kWeighted ? kWider<P::kInput, P::kWeight> : P::kInput;
    static constexpr Type kScaledType =
        P::kScale == kNoType ? kHeadType : kWider<kHeadType, P::kScale>;
    static constexpr Type kType =
        P::kShift == kNoType ? kScaledType : kWider<kScaledType, P::kShift>;

    const FpcQuantizeArguments& a;
    const uint8_t* scale;
    const uint8_t* shift;
    ActivationTable<P> table;

    FPC_DEVICE Producer(const FpcQuantizeArguments& arguments, int64_t m, ActivationTable<P> table)
        : a(arguments), scale(row_of(a.scale, m)), shift(row_of(a.shift, m)), table(table) {}

    // Make the values of a chunk, which begins at `at`, those that are quantized. Behind the last
    // one of the row they are 0.
    FPC_DEVICE void apply(int at, const Statistics& known, float (&values)[kChunk]) const {
        const int count = (int)a.k - at;
        head(at, count, known, values);
        tail(at, count, values);
        if ((P::kHead != kNoHead || P::kTail != kNoTail) && count < kChunk)
            each(values, [=](float value, int i) { return i < count ? value : 0.0f; });
        if constexpr (P::kHadamard != 0) {
            hadamard<P::kHadamard>(values);
            each(values, [](float value, int) { return rounded<kType>(value); });
        }
    }

   private:
    FPC_DEVICE static const uint8_t* row_of(const FpcBeside& rows, int64_t m) {
        // Both are below 2**31, and division of 64 bits is slow.
        const uint32_t index = (uint32_t)m / (uint32_t)rows.repeat;
        return (const uint8_t*)rows.data + index * rows.stride;
    }

    FPC_DEVICE void head(int at, int count, const Statistics& known,
                         float (&values)[kChunk]) const {
        const float r = known.factor;
        if constexpr (P::kHead == kRmsNorm || P::kHead == kRmsNormWide) {
            constexpr bool kWide = P::kHead == kRmsNormWide || P::kInput == kF32;
            each(values, [=](float value, int) {
                return kWide ? multiply(value, r) : rounded<P::kInput>(multiply(value, r));
            });
            if constexpr (P::kWeight != kNoType)
                combine<P::kWeight, kWide ? P::kInput : kHeadType>(
                    a.weight, at, count, values, [](float x, float w) { return multiply(x, w); });
            else each(values, [](float value, int) { return rounded<P::kInput>(value); });
        } else if constexpr (P::kHead == kLayerNorm) {
            const float mean = known.mean;
            each(values, [=](float value, int) { return multiply(subtract(value, mean), r); });
            if constexpr (P::kWeight != kNoType)
                combine<P::kWeight, kF32>(a.weight, at, count, values,
                                          [](float x, float w) { return multiply(x, w); });
            if constexpr (P::kBias != kNoType)
                combine<P::kBias, kF32>(a.bias, at, count, values,
                                        [](float x, float b) { return add(x, b); });
            each(values, [](float value, int) { return rounded<P::kInput>(value); });
        } else if constexpr (P::kHead != kNoHead) {
            if constexpr (kTable) table.apply(values);
            else each(values, [](float x, int) { return ActivationTable<P>::computed(x); });
        }
    }

    FPC_DEVICE void tail(int at, int count, float (&values)[kChunk]) const {
        if constexpr (P::kScale != kNoType)
            combine<P::kScale, kScaledType>(scale, at, count, values, [](float x, float s) {
                return multiply(x, P::kTail == kModulate ? rounded<P::kScale>(add(s, 1.0f)) : s);
            });
        if constexpr (P::kShift != kNoType)
            combine<P::kShift, kType>(shift, at, count, values,
                                      [](float x, float s) { return add(x, s); });
    }

    // Combine each value with one beside it, and round to a type.
    template <Type kBeside, Type kResult, class Join>
    FPC_DEVICE static void combine(const void* row, int at, int count, float (&values)[kChunk],
                                   const Join& join) {
        float others[kChunk];
        load_chunk<kBeside>((const uint8_t*)row + (int64_t)at * kSizeOf<kBeside>, count, others);
        each(values, [&](float x, int i) { return rounded<kResult>(join(x, others[i])); });
    }
};

}  // namespace fpc
