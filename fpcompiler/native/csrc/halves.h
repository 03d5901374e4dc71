// Values of 16 bits, which are computed with in fp32. Included once per instruction set, after
// vectors.h.

typedef uint16_t Halves __attribute__((vector_size(2 * FPC_LANES)));

// GCC 12 converts halves of a vector of 512 bits, and puts them together in memory.
static inline U wide_bits(Halves halves) {
#if FPC_LANES == 16
    return (U)_mm512_cvtepu16_epi32((__m256i)halves);
#else
    return __builtin_convertvector(halves, U);
#endif
}

static inline Halves low_bits(U bits) {
#if FPC_LANES == 16
    return (Halves)_mm512_cvtepi32_epi16((__m512i)bits);
#else
    return __builtin_convertvector(bits, Halves);
#endif
}

static inline F widen(const uint16_t* from, int32_t input) {
    U bits = wide_bits(load<Halves>(from));
    if (input == FPC_INPUT_BF16) return (F)(bits << 16);
    // fp16: shifted to the place of an fp32, the exponent is off by 112, which a product with a
    // power of two puts right for subnormal numbers as well; infinity and NaN keep their exponent.
    U sign = (bits & 0x8000) << 16, rest = (bits & 0x7FFF) << 13;
    F scaled = (F)rest * 0x1p112f;
    U special = rest | 0x7F800000;
    return (F)(sign | (rest >= 0x0F800000 ? special : (U)scaled));
}

static inline F rounded_to_bf16(F value) {
    const U bits = (U)value, nearest = bits + 0x7FFF + (bits >> 16 & 1);
    return value == value ? (F)(nearest & 0xFFFF0000) : value;
}

static inline F rounded_to_f16(F value) {
    const I size = magnitude(value), exponent = larger(size & kExponentMask, splat(113 << 23));
    // See Rounded in grid.h; the exponent of infinity runs over, and is not used.
    const F big = (F)((U)exponent + ((13 << 23) | 0x400000));
    const F infinite = splat(__builtin_inff()), nearest = ((F)size + big) - big;
    const F finite = nearest > 65504.0f ? infinite : nearest;
    const F special = value == value ? infinite : value;
    return with_sign_of((F)size < 65536.0f ? finite : special, value);
}

// To FpcInput other than fp32, of values that are rounded to it.
static inline Halves narrow(F value, int32_t type) {
    if (type == FPC_INPUT_BF16) return low_bits((U)value >> 16);
    // The inverse of what `widen` does; infinity and NaN lose the top bit of their exponent, which
    // fp16 does not have.
    const U sign = (U)value >> 16 & 0x8000, rest = (U)((F)magnitude(value) * 0x1p-112f) >> 13;
    return low_bits(sign | (rest & 0x7FFF));
}
