// A block of values that one thread has, or that several share: its scale, and quotients by it. The
// same operations as Encoder's, whose lanes have a chunk each, in the same order: the same bits.

namespace fpc {

template <class P>
struct ScaledBlock {
    static_assert(P::kBlockScale == kE8M0Scale && P::kOuter == kNoOuter, "powers of two alone");
    static constexpr int kChunks = P::kBlock / kChunk;
    static_assert(kChunks == 1 || kChunks == 2, "sums of more chunks have another order");

    float inverse, factor;
    uint8_t code;  // of the scale
    bool finite;

    FPC_DEVICE explicit ScaledBlock(const float (&values)[P::kBlock]) {
        float amax = largest_of(chunk_of(values, 0));
        if constexpr (kChunks == 2)
            amax = larger_magnitude(amax, largest_of(chunk_of(values, 1)));
        finite = bits_of(amax) < kExponentMask;
        const Pair pair = scale_pair<P>(amax, 1.0f);
        float scale = pair.high;
        factor = 1;
        if constexpr (P::kRounding == kLeastError) {
            inverse = reciprocal(pair.low);
            // Quotients by the larger of the two scales are half of those by the smaller one.
            const bool low = gain_of(values) > 0 || pair.low == pair.high;
            factor = low ? 1.0f : 0.5f;
            scale = low ? pair.low : pair.high;
        }
        scale = amax == 0 ? 1.0f : scale;
        if constexpr (P::kRounding != kLeastError) inverse = reciprocal(scale);
        code = (uint8_t)(bits_of(scale) >> 23);
    }

    FPC_DEVICE float quotient(float value) const {
        return multiply(multiply(value, inverse), factor);
    }

   private:
    FPC_DEVICE static const float (&chunk_of(const float (&values)[P::kBlock], int i))[kChunk] {
        return *(const float(*)[kChunk])(values + i * kChunk);
    }

    FPC_DEVICE double gain_of(const float (&values)[P::kBlock]) const {
        double sums[kChunks] = {};
#pragma unroll
        for (int i = 0; i < P::kBlock; i++)
            sums[i / kChunk] = add(sums[i / kChunk],
                                   (double)gain_of_half<typename P::Element>(
                                       multiply(values[i], inverse)));
        return kChunks == 2 ? add(sums[0], sums[kChunks - 1]) : sums[0];
    }
};

// What is quantized of an output that is not stored: rounded to its type, and an activation of it.
template <class P>
FPC_DEVICE float produced_of(float output) {
    const float value = rounded<P::kInput>(output);
    if constexpr (P::kHead == kNoHead) return value;
    return rounded<P::kInput>(activation_of<P::kHead>(value));
}

}  // namespace fpc
