// exp, erf and tanh, to within two units in the last place (tests/native/test_functions.py).
// Included once per instruction set, after vectors.h. No product is fused with a sum, so all
// instruction sets give the same bits.

// The coefficient of the highest power comes first. Two steps of Horner's rule at a time make chains
// of dependent operations half as long.
template <class... Rest>
static inline F polynomial(F x, Rest... rest) {
    constexpr int kCount = sizeof...(rest), kFirst = kCount % 2 ? 1 : 2;
    const float c[] = {rest...};
    const F square = x * x;
    F sum = kFirst == 1 ? splat(c[0]) : x * c[0] + c[1];
    for (int i = kFirst; i < kCount; i += 2) sum = sum * square + (x * c[i] + c[i + 1]);
    return sum;
}

// exp(x) as a value near 1 times 2**power; x is from -104 to 89.
struct Power {
    F value;
    I power;
};

// Cody and Waite, Software Manual for the Elementary Functions (1980); the polynomial is that of
// expf in Cephes. log(2) is split so that its first part times `turns` is exact.
static inline Power exp_parts(F x) {
    const float to_integer = 0x1.8p23f;
    const F sum = x * 1.44269504088896341f + to_integer;
    const F turns = sum - to_integer;
    const F r = (x - turns * 0.693359375f) + turns * 2.12194440e-4f;
    const F rest = polynomial(r, 1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                              4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f);
    return {(rest * (r * r) + r) + 1.0f, (I)((U)sum - 0x4B400000u)};
}

static inline F power_of_two(I exponent) { return (F)((exponent + 127) << 23); }

static inline F exp_of(F x) {
    x = x > 89.0f ? splat(89.0f) : x;
    x = x < -104.0f ? splat(-104.0f) : x;
    const Power parts = exp_parts(x);
    // Two factors: 2**128 is no fp32, and subnormal results must be rounded once.
    const I half = parts.power >> 1;
    return parts.value * power_of_two(half) * power_of_two(parts.power - half);
}

// Below 15/16 an odd polynomial, above it 1 - exp(-t + t q(t)). Both were fitted for this file, so
// that the largest error is least (Lawson's algorithm): 0.009 and 0.05 units in the last place, to
// which roundings add the rest.
static inline F erf_of(F x) {
    const F t = (F)magnitude(x), square = x * x;
    const F p = polynomial(square, 8.267465e-05f, -8.1180764e-4f, 5.19883e-3f, -2.6858497e-2f,
                           1.1283679e-1f, -3.7612632e-1f, 1.2837917e-1f);
    const F held = t > 4.0f ? splat(4.0f) : t;
    const F q = polynomial(held, 2.1337497e-4f, -3.2099052e-3f, 2.2873688e-2f, -1.05236314e-1f,
                           -6.3573784e-1f, -1.2850855e-1f);
    const Power rest = exp_parts(held * q - held);
    const F large = 1.0f - rest.value * power_of_two(rest.power);
    return with_sign_of(t < 0.9375f ? t + t * p : large, x);
}

// tanhf in Cephes: a polynomial below 5/8, and 1 - 2 / (exp(2t) + 1).
static inline F tanh_of(F x) {
    const F t = (F)magnitude(x), square = x * x;
    const F p = polynomial(square, -5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f,
                           1.33314422036e-1f, -3.33332819422e-1f);
    const F large = 1.0f - 2.0f / (exp_of(t + t) + 1.0f);
    return with_sign_of(t < 0.625f ? t + t * (square * p) : large, x);
}
