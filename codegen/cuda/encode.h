// A chunk as codes and scales, where they belong.

namespace fpc {

// Where CUTLASS has the scale of a row and a column: atoms of 128 rows by 4 columns.
FPC_DEVICE int64_t swizzled(int64_t row, int column, int columns) {
    const int64_t atom = row / 128 * ((columns + 3) / 4) + column / 4;
    return atom * 512 + row % 32 * 16 + row % 128 / 32 * 4 + column % 4;
}

template <class P>
struct Encoder {
    static constexpr int kLanes = P::kBlock ? P::kBlock / kChunk : 1;
    // A quotient by a power of two is the product with its inverse.
    static constexpr bool kPower = P::kBlockScale == kE8M0Scale && P::kOuter == kNoOuter;
    typedef typename P::Element Element;
    typedef fpc::Codes<Element, P::kStored, P::kCodeBits> Codes;
    // Quotients are made with it.
    static constexpr float kFactor = Codes::kFactor;
    static_assert(kFactor == 1 || (P::kBlockScale == kNoBlockScale && P::kOuter == kPerRow),
                  "other quotients are made without it");

    const FpcQuantizeArguments& a;
    const int64_t m;
    const float outer;

    // Store a chunk, and return the sum of its integers if they are stored as such. All lanes of a
    // warp take part. Values may change.
    FPC_DEVICE int32_t encode(int chunk, float (&values)[kChunk]) const {
        float amax = 0;
        if constexpr (P::kBlockScale != kNoBlockScale || P::kOuter != kPerRow) {  // else it was seen
            amax = largest_of(values);
#pragma unroll
            for (int lanes = 1; lanes < kLanes; lanes *= 2)
                amax = larger_magnitude(amax, exchange(amax, lanes));
            if (bits_of(amax) >= kExponentMask) *a.status = 1;
        }
        if constexpr (P::kBlockScale == kE8M0Scale && P::kRounding == kLeastError) {
            return encode_better_power(chunk, amax, values);
        } else if constexpr (P::kBlockScale != kNoBlockScale) {
            const float scale = amax == 0 ? 1 : scale_of(amax, values);
            divide(values, scale);
            return store(chunk, values, scale);
        } else {
            if constexpr (P::kOuter != kNoOuter)
                divide_all<kPower, P::kGiven, P::kStored == kIntegers>(values, outer, kFactor);
            return store(chunk, values, 1);
        }
    }

    // Padding of swizzled scales that belongs to rows behind the last one.
    FPC_DEVICE void clear_scales(int chunk) const { store_scale(chunk, 0); }

   private:
    FPC_DEVICE float total_of(float scale) const {
        return P::kOuter == kNoOuter ? scale : multiply(scale, outer);
    }

    FPC_DEVICE void divide(float (&values)[kChunk], float scale) const {
        divide_all<kPower, P::kGiven>(values, total_of(scale));
    }

    // Sum a number of each value over the block, in fp64.
    template <class Term>
    FPC_DEVICE static double sum_over_block(const float (&values)[kChunk], const Term& term) {
        double sum = 0;
#pragma unroll
        for (int i = 0; i < kChunk; i++) sum = add(sum, (double)term(values[i]));
#pragma unroll
        for (int lanes = 1; lanes < kLanes; lanes *= 2) sum = add(sum, exchange(sum, lanes));
        return sum;
    }

    FPC_DEVICE float scale_of(float amax, const float (&values)[kChunk]) const {
        if constexpr (P::kBlockScale == kRealScale) return real_scale<P>(amax);
        const Pair pair = scale_pair<P>(amax, outer);
        if constexpr (P::kBlockScale == kE4M3Scale && P::kRounding == kLeastError) {
            const bool low = loss(pair.high, values) > loss(pair.low, values);
            return low ? pair.low : pair.high;
        }
        return pair.high;
    }

    FPC_DEVICE double loss(float scale, const float (&values)[kChunk]) const {
        float quotients[kChunk];
#pragma unroll
        for (int i = 0; i < kChunk; i++) quotients[i] = values[i];
        divide(quotients, scale);
        const double sum =
            sum_over_block(quotients, [](float x) { return squared_error<Element>(x); });
        const double total = total_of(scale);
        return multiply(sum, multiply(total, total));
    }

    // Quotients by the larger of the two scales are half of those by the smaller one.
    FPC_DEVICE int32_t encode_better_power(int chunk, float amax, float (&values)[kChunk]) const {
        const Pair pair = scale_pair<P>(amax, outer);
        divide(values, pair.low);
        const double gain =
            sum_over_block(values, [](float x) { return gain_of_half<Element>(x); });
        const bool low = gain > 0 || pair.low == pair.high;
        const float factor = low ? 1.0f : 0.5f;
        each(values, [=](float x, int) { return multiply(x, factor); });
        return store(chunk, values, amax == 0 ? 1 : low ? pair.low : pair.high);
    }

    // Store quotients by a scale of the block, and the scale: in products, or beside the codes.
    FPC_DEVICE int32_t store(int chunk, float (&values)[kChunk], float scale) const {
        if constexpr (P::kStored == kProducts)
            each(values, [=](float x, int) { return multiply(nearest<Element>(x), scale); });
        else if constexpr (P::kBlockScale != kNoBlockScale) store_scale(chunk, scale);
        Codes codes;
#pragma unroll
        for (int i = 0; i < kChunk / 2; i++) codes.set(i, values[2 * i], values[2 * i + 1]);
        codes.finish();
        const int64_t begin = (int64_t)chunk * kChunk * P::kCodeBits / 8;
        store_words(a.codes + m * a.pitch + begin, codes.words, a.pitch - begin);
        return P::kStored == kIntegers ? codes.sum() : 0;
    }

    FPC_DEVICE void store_scale(int chunk, float scale) const {
        if (chunk % kLanes) return;
        const int column = chunk / kLanes, columns = ((int)a.k + P::kBlock - 1) / P::kBlock;
        const bool there = column < columns && m < a.m;
        if constexpr (P::kSwizzled) {
            if (column >= (a.scale_pitch + 3) / 4 * 4) return;
            uint8_t* to = (uint8_t*)a.block_scale + swizzled(m, column, (int)a.scale_pitch);
            *to = there ? code_of(scale) : 0;
        } else if (there) {
            const int64_t index = m * a.scale_pitch + column;
            if constexpr (P::kBlockScale == kRealScale) ((float*)a.block_scale)[index] = scale;
            else ((uint8_t*)a.block_scale)[index] = code_of(scale);
        }
    }

    FPC_DEVICE static uint8_t code_of(float scale) {
        return P::kBlockScale == kE8M0Scale ? (uint8_t)(bits_of(scale) >> 23) : e4m3_code(scale);
    }
};

}  // namespace fpc
