// Codes of 4 bits as bytes or bf16 numbers that the tensor cores multiply: those of a word of
// packed weights. In order 8, a code's sign is bit 3 of its nibble.

namespace fpc {

// Selector bits 0..2 choose one of eight bytes of a table; bit 3 asks for its sign bit, eight
// times.
FPC_DEVICE uint32_t look_up(uint32_t low, uint32_t high, uint32_t selector) {
    uint32_t bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selector));
    return bytes;
}

// A constant in a register of its own. If the compiler knew it, it would move it to a register anew
// for each use; it does not know that lanes are numbered below 32.
template <uint32_t kValue>
FPC_DEVICE uint32_t held_constant() {
    uint32_t lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return kValue + (lane >> 5);
}

constexpr uint64_t in_each_byte(uint64_t value) { return value * 0x0101010101010101ull; }

constexpr uint64_t largest_byte(uint64_t bytes) {
    uint64_t largest = 0;
    for (int i = 0; i < 8; i++)
        if ((bytes >> 8 * i & 0xFF) > largest) largest = bytes >> 8 * i & 0xFF;
    return largest;
}

// The bytes of kMagnitudes, lowest first, belong to the codes 0..7.
template <class P, Mode kMode = P::kMode>
struct Decoder;

// Unsigned bytes spare the negation of bytes: u = offset + value comes from one table for codes of
// either sign, whose other one then gives 0x00, the sign bit of a byte below 0x80. The products
// hold offset * sum(x) too much.
template <class P>
struct Decoder<P, kInt8> {
    static constexpr uint64_t kOffset = largest_byte(P::kMagnitudes);
    static constexpr uint64_t kPositive = in_each_byte(kOffset) + P::kMagnitudes;
    static constexpr uint64_t kNegative = in_each_byte(kOffset) - P::kMagnitudes;
    static_assert(kOffset < 64, "bytes of the table have no sign bit");
    static_assert(P::kBlock == 0, "sums of integers have no scales inside");

    uint32_t positive = held_constant<(uint32_t)kPositive>();  // codes 0..3
    uint32_t negative = held_constant<(uint32_t)kNegative>();

    FPC_DEVICE void decode(uint32_t codes, uint32_t& low, uint32_t& high) const {
        const uint32_t flipped = codes ^ 0x88888888;
        low = either(codes, flipped);
        high = either(codes >> 16, flipped >> 16);
    }

    FPC_DEVICE uint32_t either(uint32_t codes, uint32_t flipped) const {
        return look_up(positive, (uint32_t)(kPositive >> 32), codes) |
               look_up(negative, (uint32_t)(kNegative >> 32), flipped);
    }
};

template <class P>
struct Decoder<P, kE4m3> {
    static constexpr uint32_t kLow = (uint32_t)P::kMagnitudes;
    static constexpr uint32_t kHigh = (uint32_t)(P::kMagnitudes >> 32);
    static_assert(largest_byte(P::kMagnitudes) < 0x7F, "magnitudes are finite");
    static_assert(P::kBlock == 0, "products of blocks are those of bf16");

    uint32_t table = held_constant<kLow>();  // codes 0..3

    FPC_DEVICE void decode(uint32_t codes, uint32_t& low, uint32_t& high) const {
        const uint32_t magnitudes = codes & 0x77777777, moved = codes << 4;
        low = look_up(table, kHigh, magnitudes) |
              (look_up(codes, moved, 0x1504) & 0x80808080);
        high = look_up(table, kHigh, magnitudes >> 16) |
               (look_up(codes, moved, 0x3726) & 0x80808080);
    }
};

// Codes of E2M1 in order 16 as pairs of bf16 values times 2**-126: E2M1's exponent and mantissa bit
// are put where those of bf16 are, and its zero and its subnormal number become bf16's.
FPC_DEVICE void spread_word(uint32_t codes, uint32_t (&pairs)[4]) {
    pairs[0] = codes & 0x81C081C0;
    pairs[1] = codes << 3 & 0x81C081C0;
    pairs[2] = codes << 6 & 0x81C081C0;
    pairs[3] = (codes << 1 & 0x80008000) | (codes >> 5 & 0x01000100) | (codes >> 4 & 0x00C000C0);
}

constexpr uint32_t kUnspread = 0x7E807E80;  // 2**126, twice

FPC_DEVICE uint32_t multiply_pair(uint32_t a, uint32_t b) {
    uint32_t result;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}

// The bf16 factor of codes in a block whose scale is a byte of `scales`, twice, times 2**126. A
// scale of 32 is the exponent field of the factor. A scale of 16 has five bits of exponent, with a
// bias of 18, and three of mantissa: E4M3 without subnormal numbers. Its factor is 2**-7 times the
// scale, so that none exceeds bf16.
template <int kBlock>
FPC_DEVICE uint32_t unspread_factor(uint32_t scales, int byte) {
    if constexpr (kBlock == 0) return kUnspread;
    const uint32_t twice = look_up(scales, 0, 0x4040 | byte | byte << 8);
    return kBlock == 16 ? twice * 16 + 0x72007200 : twice << 7;
}

template <class P>
struct Decoder<P, kFloats> {
    static_assert(P::kBlock == 0 || P::kBlock == 16 || P::kBlock == 32, "");

    // The codes of k16 step `step` of 64 of K, whose scales begin with the lowest byte.
    FPC_DEVICE void decode(uint32_t codes, uint32_t scales, int step, uint32_t& low,
                           uint32_t& high) const {
        uint32_t pairs[4];
        spread_word(codes, pairs);
        const int block = P::kBlock == 16 ? step : step / 2;
        const uint32_t factor = unspread_factor<P::kBlock>(scales, block);
        low = multiply_pair(pairs[step % 2 * 2], factor);
        high = multiply_pair(pairs[step % 2 * 2 + 1], factor);
    }
};

}  // namespace fpc
