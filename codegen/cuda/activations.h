// Activations, of one fp32 value each.

namespace fpc {

FPC_DEVICE float silu(float x) { return divide(x, exp_plus_one(-x)); }

FPC_DEVICE float gelu(float x) {
    return multiply(multiply(x, 0.5f), add(erf_of(multiply(x, 0.707106781186547524f)), 1.0f));
}

FPC_DEVICE float gelu_tanh(float x) {
    const float cube = multiply(multiply(multiply(x, x), x), 0.044715f);
    const float inner = multiply(add(x, cube), 0.797884560802865356f);
    return multiply(multiply(x, 0.5f), add(tanh_of(inner), 1.0f));
}

}  // namespace fpc
