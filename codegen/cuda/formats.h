// Rounding to the values of a format, and the codes of sixteen values as they lie in memory.
//
// An element format E has the members that fpcompiler/codegen/cuda/quantize.py writes:
// kMantissaBits, kMagnitudeBits, kMinExponent, kMaxExponent, kMax, kStorageBits, kConvert.

namespace fpc {

constexpr int32_t kExponentMask = 0x7F800000;

// The instruction that makes two codes of a format, where the target has one. It rounds to nearest
// even and saturates, and keeps the sign of zero, as Rounded with signed_code does; on NaN they
// differ, which is refused before.
enum Convert { kSoftware, kConvertE4M3, kConvertE2M1, kConvertE2M3, kConvertE3M2 };

struct E4M3 {
    static constexpr int kMantissaBits = 3, kMagnitudeBits = 7, kMinExponent = -6;
    static constexpr int kMaxExponent = 8, kStorageBits = 8;
    static constexpr float kMax = 448.0f;
    static constexpr Convert kConvert = FPC_CONVERTS ? kConvertE4M3 : kSoftware;
};

// A magnitude rounded by adding and subtracting 1.5 * 2**(e + 23 - m); the low bits of the sum
// count steps. See fpcompiler/numerics/rounding.py. With a bias of 1, numbers are twice those of
// the format.
template <class E, int kBias = 0>
struct Rounded {
    static constexpr int32_t kLeast = (E::kMinExponent + kBias + 127) * (1 << 23);
    static constexpr int32_t kMagic = (23 - E::kMantissaBits) * (1 << 23) + 0x400000;
    int32_t exponent;
    float big, sum;

    FPC_DEVICE explicit Rounded(float magnitude) {
        const float held = smaller(magnitude, kBias ? 2 * E::kMax : E::kMax);
        exponent = larger(bits_of(held) & kExponentMask, kLeast);
        big = float_of(exponent + kMagic);
        sum = add(held, big);
    }

    FPC_DEVICE float value() const { return subtract(sum, big); }

    FPC_DEVICE int32_t code() const {
        return bits_of(sum) - bits_of(big) + ((exponent - kLeast) >> (23 - E::kMantissaBits));
    }
};

FPC_DEVICE float magnitude(float value) { return float_of(bits_of(value) & 0x7FFFFFFF); }

FPC_DEVICE float with_sign_of(float magnitude, float sign) {
    return float_of(bits_of(magnitude) | (bits_of(sign) & (int32_t)0x80000000));
}

template <class E>
FPC_DEVICE uint32_t signed_code(float value) {
    const uint32_t sign = (uint32_t)bits_of(value) >> 31;
    return (uint32_t)Rounded<E>(magnitude(value)).code() | sign << E::kMagnitudeBits;
}

// Return the codes of two numbers, the first one in the low E::kStorageBits.
template <class E>
FPC_DEVICE uint32_t pair_of(float first, float second) {
    if constexpr (E::kConvert == kConvertE4M3) return e4m3_pair(first, second);
#if FPC_CONVERTS >= 2
    if constexpr (E::kConvert == kConvertE2M1) return e2m1_pair(first, second);
    if constexpr (E::kConvert == kConvertE2M3) return e2m3_pair(first, second);
    if constexpr (E::kConvert == kConvertE3M2) return e3m2_pair(first, second);
#endif
    return signed_code<E>(first) | signed_code<E>(second) << E::kStorageBits;
}

// The number of a format next to a value, with the sign of the value.
template <class E>
FPC_DEVICE float nearest(float value) {
    return with_sign_of(Rounded<E>(magnitude(value)).value(), value);
}

// How many of the steps that all numbers of a format are multiples of make up 1: a power of two.
template <class E>
constexpr float kUnits = (float)(1u << (E::kMantissaBits - E::kMinExponent));

// The form in which values are stored: fpcompiler/runtime/cuda/stored.py.
enum Stored { kPacked, kE4M3Bytes, kIntegers, kProducts };

// The codes of four numbers of E4M3, the magnitudes of which are below 32, as those of E2M3: what
// they count, in eighths, as signed bytes. From code 16 on it is two at a time, from 24 on four.
FPC_DEVICE uint32_t eighths_of(uint32_t codes) {
    const uint32_t sizes = codes & 0x1F1F1F1F, beyond_16 = sizes >> 4 & 0x01010101;
    const uint32_t beyond_24 = beyond_16 & sizes >> 3;
    const uint32_t counts =
        sizes + (sizes & beyond_16 * 15) + 2 * (sizes & beyond_24 * 7);  // 60 at most
    const uint32_t negative = counts & (codes >> 7 & 0x01010101) * 255;
    return (0x80808080u + counts - 2 * negative) ^ 0x80808080u;
}

// The values of a chunk as they lie in memory, kBits each.
template <class E, Stored kStored, int kBits>
struct Codes {
    static constexpr int kWords = kChunk * kBits / 32;
    // E4M3 has the numbers of E2M3 times 2**-6, with the same codes, and is converted to at once.
    static constexpr bool kByE4M3 = kStored == kIntegers && E4M3::kConvert != kSoftware &&
                                    E::kMantissaBits == 3 && E::kMinExponent == 0;
    static constexpr float kFactor = kByE4M3 ? 0x1p-6f : 1.0f;  // of the values that are set
    static_assert(!kByE4M3 || E::kMax < 8, "eighths_of knows codes below 32");
    uint32_t words[kWords] = {};

    FPC_DEVICE void set(int pair, float first, float second) {
        if constexpr (kStored == kE4M3Bytes)
            put(pair, pair_of<E4M3>(nearest<E>(first), nearest<E>(second)));
        else if constexpr (kByE4M3) put(pair, pair_of<E4M3>(first, second));
        else if constexpr (kStored == kIntegers)
            put(pair, integer_of(first) | integer_of(second) << 8);
        else if constexpr (kStored == kProducts) put(pair, bf16_pair(first, second));
        else put(pair, pair_of<E>(first, second));
    }

    // After all have been set.
    FPC_DEVICE void finish() {
        if constexpr (kByE4M3)
#pragma unroll
            for (int i = 0; i < kWords; i++) words[i] = eighths_of(words[i]);
    }

    // The sum of the chunk's integers.
    FPC_DEVICE int32_t sum() const {
        int32_t sum = 0;
#pragma unroll
        for (int i = 0; i < kWords; i++) sum = plus_bytes(words[i], sum);
        return sum;
    }

   private:
    // The number of E next to a value, as an integer: a byte. It is rounded as by Rounded, but with
    // its sign, and not held: a quotient by the scale of its row is kMax or next to it at most.
    FPC_DEVICE static uint32_t integer_of(float value) {
        const int32_t power = larger(bits_of(value) & kExponentMask, Rounded<E>::kLeast);
        const float big = float_of(power + Rounded<E>::kMagic);
        const float number = subtract(add(value, big), big);
        // The low bits of the sum are those of the integer.
        return (uint32_t)bits_of(fused(number, kUnits<E>, 0x1.8p23f)) & 0xFF;
    }

    FPC_DEVICE void put(int pair, uint32_t codes) {
        const int word = pair * 2 * kBits / 32, bit = pair * 2 * kBits % 32;
        words[word] |= codes << bit;
        if constexpr (32 % (2 * kBits) != 0)
            if (bit + 2 * kBits > 32) words[(word + 1) % kWords] |= codes >> (32 - bit);
    }
};

}  // namespace fpc
