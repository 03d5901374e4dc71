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

// Values over one scale, each quotient rounded once.
//
// Over a power of two it is a product. Otherwise two corrections of a product with the rounded
// inverse give the rounded quotient (Markstein, IBM Journal of Research and Development 34, 1990),
// as long as remainders are exact. Where they are not, because |x| < 2**-100, the quotient is below
// 2**-40 and its code 0 either way; the sign is that of x. Beyond 2**128, which only a given scale
// allows, the corrections give NaN, which stands for a number that saturates.
template <bool kPower, bool kGiven>
struct Quotient {
    float total, inverse;
    bool divides;

    FPC_DEVICE explicit Quotient(float by) : total(by), inverse(reciprocal(by)), divides(false) {
        if constexpr (!kPower) divides = !(total > 0x1p-60f && total < 0x1p60f);
    }

    FPC_DEVICE float of(float x) const {
        if constexpr (kPower) return multiply(x, inverse);
        if (divides) return divide(x, total);
        const float size = magnitude(x);
        const float rough = multiply(size, inverse);
        const float close = fused(fused(-rough, total, size), inverse, rough);
        const float exact = fused(fused(-close, total, size), inverse, close);
        return with_sign_of(magnitude(kGiven ? smaller(exact, 0x1.FFFFFEp127f) : exact), x);
    }
};

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
