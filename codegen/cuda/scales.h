// The scale of a group of values from their largest magnitude: fpcompiler/numerics/scales.py, bit
// for bit. P is a problem; its members are in fpcompiler/codegen/cuda/quantize.py.

namespace fpc {

enum Outer { kNoOuter = 0, kPerTensor = 1, kPerRow = 2 };
enum BlockScale { kNoBlockScale = -1, kRealScale = 0, kE8M0Scale = 1, kE4M3Scale = 2 };
enum Rounding { kFloor = 0, kCeil = 1, kNearest = 2, kLeastError = 3 };

constexpr float kSmallest = 0x1p-126f;

FPC_DEVICE float power_below(float value) { return float_of(bits_of(value) & kExponentMask); }

template <class P>
FPC_DEVICE float real_scale(float amax) {
    constexpr bool kE4M3 = P::kBlockScale == kE4M3Scale;
    constexpr float kMost = P::Element::kMax * (kE4M3 ? 448.0f : 1.0f);
    constexpr float kLeast = kE4M3 ? 0x1p-117f : kSmallest;
    const float scale = divide(amax, kMost);
    if (amax == 0) return 1;
    return scale < kLeast ? kLeast : scale;
}

// The scales of a block to choose from: the same one twice unless the error decides.
struct Pair {
    float low, high;
};

template <class P>
FPC_DEVICE Pair e8m0_pair(float amax, float outer, float ratio) {
    float least = kSmallest;
    if constexpr (P::kOuter != kNoOuter) {
        least = divide(kSmallest, power_below(outer));
        least = least < kSmallest ? kSmallest : least;
    }
    if constexpr (P::kRounding == kFloor) {
        const float inner = P::kOuter == kNoOuter ? amax : divide(amax, outer);
        const int32_t power = bits_of(inner) & kExponentMask;
        const int32_t exponent = power - P::Element::kMaxExponent * (1 << 23);
        const float scale = float_of(larger(exponent, 1 << 23));
        const float held = scale < least ? least : scale;
        return {held, held};
    }
    ratio = ratio < least ? least : ratio;
    ratio = ratio > 0x1p127f ? 0x1p127f : ratio;
    if constexpr (P::kRounding == kNearest) {
        const float scale = float_of((bits_of(ratio) + (1 << 22)) & kExponentMask);
        return {scale, scale};
    }
    const float low = power_below(ratio), high = low < ratio ? low * 2 : low;
    return {P::kRounding == kCeil ? high : low, high};
}

FPC_DEVICE float e4m3_value(int32_t code) {
    return code < 8 ? (float)code * 0x1p-9f : float_of(code * (1 << 20) + (120 << 23));
}

FPC_DEVICE uint8_t e4m3_code(float scale) {
    if (scale < 0x1p-6f) return (uint8_t)(scale * 512);
    return (uint8_t)((bits_of(scale) >> 20) - (120 << 3));
}

template <class P>
FPC_DEVICE Pair e4m3_pair_around(float ratio) {
    ratio = ratio < 0x1p-9f ? 0x1p-9f : ratio;
    ratio = ratio > 448.0f ? 448.0f : ratio;
    const Rounded<E4M3> rounded(ratio);
    const float nearest = rounded.value();
    if constexpr (P::kRounding == kNearest) return {nearest, nearest};
    const int32_t code = rounded.code();
    const float low = e4m3_value(code - (nearest > ratio));
    const float high = e4m3_value(code + (nearest < ratio));
    if constexpr (P::kRounding == kFloor) return {low, low};
    return {P::kRounding == kCeil ? high : low, high};
}

template <class P>
FPC_DEVICE Pair scale_pair(float amax, float outer) {
    float most = P::kOuter == kNoOuter ? P::Element::kMax : multiply(outer, P::Element::kMax);
    // With the largest fp32 number in the row the product can be half a unit beyond it.
    most = most > 0x1.FFFFFEp127f ? 0x1.FFFFFEp127f : most;
    const float ratio = divide(amax, most);
    if constexpr (P::kBlockScale == kE8M0Scale) return e8m0_pair<P>(amax, outer, ratio);
    else return e4m3_pair_around<P>(ratio);
}

// Call `set` with each value, its place in the chunk, and store what it returns.
template <class Set>
FPC_DEVICE void each(float (&values)[kChunk], const Set& set) {
#pragma unroll
    for (int i = 0; i < kChunk; i++) values[i] = set(values[i], i);
}

// The rounded quotient of a number that is not 0, as a corrected product with the rounded inverse
// (Markstein, IBM Journal of Research and Development 34, 1990). In general that takes two
// corrections; that one is enough for fp32 was found by trying all quotients that it could round
// wrongly (tests/codegen/cuda/hard_quotients.h).
//
// It is not the quotient of magnitudes below 2**-100, whose remainders are not exact. With a total
// between 2**-60 and 2**60 these have quotients below 2**-39, and the code 0 either way. Beyond
// 2**128 the correction gives NaN. Zeros lose their sign.
FPC_DEVICE float corrected_quotient(float value, float total, float inverse) {
    const float rough = multiply(value, inverse);
    return fused(fused(-rough, total, value), inverse, rough);
}

// Divide values by one total. By a power of two it is the product with the inverse; if the scale is
// given, quotients may be beyond fp32, and then are its largest number. Integers need no -0, and can
// have their quotients times a factor, a power of two.
template <bool kPower, bool kGiven, bool kInteger = false>
FPC_DEVICE void divide_all(float (&values)[kChunk], float total, float factor = 1) {
    const float inverse = reciprocal(total);
    if constexpr (kPower) {
        each(values, [=](float x, int) { return multiply(x, inverse); });
    } else if (total > 0x1p-60f && total < 0x1p60f) {
        const float other = multiply(total, 1.0f / factor), inverse_of_it = multiply(inverse, factor);
        each(values, [=](float x, int) {
            if constexpr (kInteger) return corrected_quotient(x, other, inverse_of_it);
            const float size = corrected_quotient(magnitude(x), total, inverse);
            return with_sign_of(magnitude(kGiven ? smaller(size, 0x1.FFFFFEp127f) : size), x);
        });
    } else {
        each(values, [=](float x, int) {
            return kInteger ? multiply(divide(x, total), factor) : divide(x, total);
        });
    }
}

// How much smaller the squared error is than with a scale twice as large; _gain_of_half of
// fpcompiler/numerics/scales.py.
template <class E>
FPC_DEVICE float gain_of_half(float quotient) {
    const float value = magnitude(quotient);
    const float a = Rounded<E>(value).value(), c = Rounded<E, 1>(value).value();
    // Twice the value is exact, so this sum is rounded once, fused or not.
    return multiply(subtract(c, a), fused(-2.0f, value, add(c, a)));
}

template <class E>
FPC_DEVICE float squared_error(float quotient) {
    const float value = magnitude(quotient), error = subtract(Rounded<E>(value).value(), value);
    return multiply(error, error);
}

}  // namespace fpc
