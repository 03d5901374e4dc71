// exp, erf and tanh, to within two units in the last place: fpcompiler/native/csrc/functions.h for
// one value, with the same operations in the same order, so the same bits.

namespace fpc {

// The coefficient of the highest power comes first.
template <class... Rest>
FPC_DEVICE float polynomial(float x, Rest... rest) {
    constexpr int kCount = sizeof...(rest), kFirst = kCount % 2 ? 1 : 2;
    const float c[] = {rest...};
    const float square = multiply(x, x);
    float sum = kFirst == 1 ? c[0] : add(multiply(x, c[0]), c[1]);
#pragma unroll
    for (int i = kFirst; i < kCount; i += 2)
        sum = add(multiply(sum, square), add(multiply(x, c[i]), c[i + 1]));
    return sum;
}

// exp(x) as a value near 1 times 2**power; x is from -104 to 89.
struct Power {
    float value;
    int32_t power;
};

FPC_DEVICE Power exp_parts(float x) {
    const float to_integer = 0x1.8p23f;
    const float sum = add(multiply(x, 1.44269504088896341f), to_integer);
    const float turns = subtract(sum, to_integer);
    const float most = subtract(x, multiply(turns, 0.693359375f));
    const float r = add(most, multiply(turns, 2.12194440e-4f));
    const float rest = polynomial(r, 1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                  4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f);
    return {add(add(multiply(rest, multiply(r, r)), r), 1.0f), bits_of(sum) - 0x4B400000};
}

FPC_DEVICE float power_of_two(int32_t exponent) { return float_of((exponent + 127) * (1 << 23)); }

FPC_DEVICE float exp_of(float x) {
    x = x > 89.0f ? 89.0f : x;
    x = x < -104.0f ? -104.0f : x;
    const Power parts = exp_parts(x);
    // Two factors: 2**128 is no fp32, and subnormal results must be rounded once.
    const int32_t half = parts.power >> 1;
    return multiply(multiply(parts.value, power_of_two(half)), power_of_two(parts.power - half));
}

// exp(x) + 1, the bits of add(exp_of(x), 1): what is less than half a unit of 1 need not be right.
FPC_DEVICE float exp_plus_one(float x) {
    x = smaller(x, 89.0f);
    x = x < -80.0f ? -80.0f : x;
    const Power parts = exp_parts(x);
    // Doubled, as 2**128 is no fp32.
    const float half = multiply(parts.value, power_of_two(parts.power - 1));
    return add(add(half, half), 1.0f);
}

FPC_DEVICE float erf_of(float x) {
    const float t = magnitude(x), square = multiply(t, t);
    const float p = polynomial(square, 8.267465e-05f, -8.1180764e-4f, 5.19883e-3f, -2.6858497e-2f,
                               1.1283679e-1f, -3.7612632e-1f, 1.2837917e-1f);
    const float held = t > 4.0f ? 4.0f : t;
    const float q = polynomial(held, 2.1337497e-4f, -3.2099052e-3f, 2.2873688e-2f, -1.05236314e-1f,
                               -6.3573784e-1f, -1.2850855e-1f);
    const Power rest = exp_parts(subtract(multiply(held, q), held));
    const float large = subtract(1.0f, multiply(rest.value, power_of_two(rest.power)));
    const float size = t < 0.9375f ? add(t, multiply(t, p)) : large;
    return with_sign_of(magnitude(size), x);
}

FPC_DEVICE float tanh_of(float x) {
    const float t = magnitude(x), square = multiply(t, t);
    const float p = polynomial(square, -5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f,
                               1.33314422036e-1f, -3.33332819422e-1f);
    const float large = subtract(1.0f, divide(2.0f, exp_plus_one(add(t, t))));
    const float size = t < 0.625f ? add(t, multiply(t, multiply(square, p))) : large;
    return with_sign_of(magnitude(size), x);
}

}  // namespace fpc
