// Codes to bf16. Included by files of AVX-512 kernels, after gemm_avx512.h.
//
// An octet of an output gives four words of two inputs: 0 and 2, 4 and 6, 1 and 3, 5 and 7. It is
// decoded in kTurns; turn t gives every kTurns'th word from word t on.

namespace {

// A nibble is the index of its value in a table of words.
struct NibblePairs {
    static constexpr int64_t kStride = kOctet;
    static constexpr int kTurns = 1;
    typedef I Codes;
    I table;

    explicit NibblePairs(const Gemm& gemm) {
        const __m256i halves = _mm256_loadu_si256((const __m256i*)gemm.weights.halves);
        table = _mm512_broadcast_i64x4(halves);
    }
    FPC_INLINE_MEMBER I codes(const uint8_t* at, int) const { return load(at); }
    FPC_INLINE_MEMBER I pair(I codes, int s) const {
        return _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * s), table);
    }
};

// Bytes are looked up twice, for the low and the high byte of their value. Of an index only the seven
// bits of the magnitude count.
struct BytePairs {
    static constexpr int64_t kStride = 2 * kOctet;
    static constexpr int kTurns = 2;

    struct Codes {
        I low, high;  // bytes of the values
    };
    Codes least, most;  // tables of the magnitudes below 64 and the others

    explicit BytePairs(const Gemm& gemm) {
        least = table(gemm.weights.halves), most = table(gemm.weights.halves + 64);
    }

    // The first four inputs of an octet, or the others.
    FPC_INLINE_MEMBER Codes codes(const uint8_t* at, int turn) const {
        const I bytes = load(at + turn * kOctet), sign = _mm512_set1_epi8((char)0x80);
        const I low = _mm512_permutex2var_epi8(least.low, bytes, most.low);
        const I high = _mm512_permutex2var_epi8(least.high, bytes, most.high);
        return {low, _mm512_or_si512(high, _mm512_and_si512(bytes, sign))};
    }

    // Even or odd bytes, each with its other half.
    FPC_INLINE_MEMBER I pair(const Codes& codes, int s) const {
        constexpr __mmask64 kOdd = 0xAAAAAAAAAAAAAAAA;
        if (s < 2) return _mm512_mask_blend_epi8(kOdd, codes.low, _mm512_slli_epi16(codes.high, 8));
        return _mm512_mask_blend_epi8(kOdd, _mm512_srli_epi16(codes.low, 8), codes.high);
    }

   private:
    static Codes table(const uint16_t* halves) {
        alignas(64) uint8_t low[64], high[64];
        for (int i = 0; i < 64; i++) low[i] = (uint8_t)halves[i], high[i] = (uint8_t)(halves[i] >> 8);
        return {load(low), load(high)};
    }
};

}  // namespace
