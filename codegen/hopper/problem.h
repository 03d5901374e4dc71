// What the GEMMs of packed 4-bit weights for Hopper have in common.
//
// A generated source defines a problem P:
//   Mode kMode; int kBlock (values of a row of W that share a scale: 0, for kFloats also 16 or 32);
//   uint64_t kMagnitudes (kInt8, kE4m3: the bytes of codes 0..7, lowest first);
//   Type kOutput; Activation kActivation.
//
// Weights are [ceil(n/16)][k/64][32 lanes][16 bytes], with zeros for rows behind the last one. Of
// index [r][s], lane 4g + t has four words of eight codes: word 2j + h those of row 16r + g + 8h at
// K = 64s + 32j + c, by order:
//   order 8 (kInt8, kE4m3): nibbles 0..3 c = 4t.., nibbles 4..7 c = 16 + 4t..;
//   order 16 (kFloats): pairs 0..3 c = 2t.., 8 + 2t.., 16 + 2t.., 24 + 2t.., a pair's first code in
//   the low half of the word, with its sign, exponent and mantissa where spread_word() finds them.
// Scales of blocks are [ceil(n/16)][k/128][16 rows][128/kBlock bytes].

namespace fpc {

enum Mode {
    kInt8,    // X is int8, with a sum for each row; exact
    kE4m3,    // X is E4M3
    kFloats,  // X is bf16; a scale of 32 is an exponent, of 16 a number with five bits of exponent
};

enum Activation { kIdentity, kActSilu, kActGelu, kActGeluTanh };

constexpr int kUnitK = 128;              // K is a multiple of it
constexpr int kSharedBytes = 227 << 10;  // of a block

template <bool kFirst, class First, class Second>
struct Choose {
    using type = First;
};

template <class First, class Second>
struct Choose<false, First, Second> {
    using type = Second;
};

template <Activation kActivation>
FPC_DEVICE float activated(float x) {
    if constexpr (kActivation == kActSilu) return silu(x);
    if constexpr (kActivation == kActGelu) return gelu(x);
    if constexpr (kActivation == kActGeluTanh) return gelu_tanh(x);
    return x;
}

// The result of a sum, each step rounded as the definition rounds it (fpcompiler/runtime/reference.py),
// so that exact sums give the bits of the CPU.
template <class P>
FPC_DEVICE float result_of(float sum, float of_token, float of_row, float bias) {
    const float value = add(multiply(multiply(sum, of_token), of_row), bias);
    if constexpr (P::kActivation == kIdentity) return value;
    return activated<P::kActivation>(rounded<P::kOutput>(value));
}

}  // namespace fpc
