// Activations of fp32 values; the formulas are in fpcompiler/runtime/fused.py. Included once per
// instruction set, after vectors.h.

#include "functions.h"

struct Silu {
    F operator()(F x) const { return x / (exp_of(-x) + 1.0f); }
};
struct Gelu {
    F operator()(F x) const { return x * 0.5f * (erf_of(x * 0.707106781186547524f) + 1.0f); }
};
struct GeluTanh {
    F operator()(F x) const {
        const F inner = (x + x * x * x * 0.044715f) * 0.797884560802865356f;
        return x * 0.5f * (tanh_of(inner) + 1.0f);
    }
};
struct Relu {
    F operator()(F x) const { return x < 0.0f ? F{} : x; }
};

// Call `use` with the function that an FpcHead is, one of activations.
template <class Use>
static inline void with_activation(int32_t head, const Use& use) {
    switch (head) {
        case FPC_SILU: return use(Silu{});
        case FPC_GELU: return use(Gelu{});
        case FPC_GELU_TANH: return use(GeluTanh{});
        default: return use(Relu{});
    }
}
