// Numbers in memory, and runs of them: a chunk is sixteen neighbouring values of a row.

namespace fpc {

enum Type { kNoType = -1, kF32 = 0, kF16 = 1, kBf16 = 2 };  // FpcInput of the native library

constexpr int kChunk = 16;

// The type of a sum or product: two that differ have no common one but fp32.
template <Type a, Type b>
constexpr Type kWider = a == b ? a : kF32;

template <Type type>
constexpr int kSizeOf = type == kF32 ? 4 : 2;

template <Type kType>
FPC_DEVICE float rounded(float value) {
    if constexpr (kType == kF16) return rounded_to_f16(value);
    if constexpr (kType == kBf16) return rounded_to_bf16(value);
    return value;
}

template <Type kType>
FPC_DEVICE float widened(uint32_t bits) {
    if constexpr (kType == kF32) return float_of((int32_t)bits);
    if constexpr (kType == kF16) return from_f16((uint16_t)bits);
    return float_of((int32_t)(bits << 16));
}

// Two values of a type of 16 bits, the first one in the low bits.
template <Type kType>
FPC_DEVICE uint32_t pair_in(float first, float second) {
    return kType == kF16 ? f16_pair(first, second) : bf16_pair(first, second);
}

FPC_DEVICE bool is_aligned(const void* address, int bytes) {
    return ((uintptr_t)address & (uintptr_t)(bytes - 1)) == 0;
}

// A chunk as it lies in memory.
template <Type kType>
constexpr int kWordsOf = kChunk * kSizeOf<kType> / 4;

// Read a chunk, of which `count` values are there: the others are 0.
template <Type kType>
FPC_DEVICE void load_words(const void* from, int count, uint32_t (&to)[kWordsOf<kType>]) {
    if (count >= kChunk && is_aligned(from, 16)) {
#pragma unroll
        for (int i = 0; i < kWordsOf<kType> / 4; i++) {
            const Quad quad = load_quad((const uint8_t*)from + 16 * i);
#pragma unroll
            for (int j = 0; j < 4; j++) to[4 * i + j] = quad.words[j];
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < kWordsOf<kType>; i++) to[i] = 0;
#pragma unroll
    for (int i = 0; i < kChunk; i++) {
        if (i >= count) continue;
        if constexpr (kType == kF32) to[i] = ((const uint32_t*)from)[i];
        else to[i / 2] |= (uint32_t)((const uint16_t*)from)[i] << 16 * (i % 2);
    }
}

template <Type kType>
FPC_DEVICE void widen(const uint32_t (&words)[kWordsOf<kType>], float (&to)[kChunk]) {
#pragma unroll
    for (int i = 0; i < kChunk; i++) {
        const uint32_t word = words[kType == kF32 ? i : i / 2];
        to[i] = widened<kType>(kType == kF32 ? word : i % 2 ? word >> 16 : word & 0xFFFF);
    }
}

template <Type kType>
FPC_DEVICE void load_chunk(const void* from, int count, float (&to)[kChunk]) {
    uint32_t words[kWordsOf<kType>];
    load_words<kType>(from, count, words);
    widen<kType>(words, to);
}

// Write the first `count` bytes of words.
template <int kWords>
FPC_DEVICE void store_words(uint8_t* to, const uint32_t (&words)[kWords], int64_t count) {
    if (count >= 4 * kWords && kWords % 4 == 0 && is_aligned(to, 16)) {
#pragma unroll
        for (int i = 0; i + 3 < kWords; i += 4)
            *(Quad*)(to + 4 * i) = Quad{{words[i], words[i + 1], words[i + 2], words[i + 3]}};
    } else if (count >= 4 * kWords && kWords == 2 && is_aligned(to, 8)) {
        *(Twin*)to = Twin{{words[0], words[1]}};
    } else if (count >= 4 * kWords && is_aligned(to, 4)) {
#pragma unroll
        for (int i = 0; i < kWords; i++) ((uint32_t*)to)[i] = words[i];
    } else {
#pragma unroll
        for (int i = 0; i < 4 * kWords; i++)
            if (i < count) to[i] = (uint8_t)(words[i / 4] >> 8 * (i % 4));
    }
}

// Chunks in registers. More than one of a type of 16 bits are packed, as their values fit exactly.
template <Type kType, int kCount>
struct Held {
    static constexpr bool kPacked = kCount > 1 && kSizeOf<kType> == 2;
    static constexpr int kWords = kPacked ? kChunk / 2 : kChunk;
    uint32_t words[kCount ? kCount : 1][kWords];

    FPC_DEVICE void set(int at, const float (&values)[kChunk]) {
#pragma unroll
        for (int i = 0; i < kWords; i++) {
            const int even = 2 * i % kChunk;
            words[at][i] = kPacked ? pair_in<kType>(values[even], values[even + 1])
                                   : (uint32_t)bits_of(values[i]);
        }
    }

    FPC_DEVICE void set_words(int at, const uint32_t (&of)[kWordsOf<kType>]) {
        if constexpr (kPacked) {
#pragma unroll
            for (int i = 0; i < kWords; i++) words[at][i] = of[i];
        } else {
            float values[kChunk];
            widen<kType>(of, values);
            set(at, values);
        }
    }

    FPC_DEVICE void get(int at, float (&values)[kChunk]) const {
#pragma unroll
        for (int i = 0; i < kChunk; i++) {
            const uint32_t word = words[at][kPacked ? i / 2 : i];
            values[i] = kPacked ? widened<kType>(i % 2 ? word >> 16 : word & 0xFFFF)
                                : float_of((int32_t)word);
        }
    }
};

}  // namespace fpc
