// Vectors of the width of one instruction set. Included once per instruction set, inside a namespace
// of its own and with FPC_LANES defined. GCC's vector types do almost everything; what they turn into
// slow code is written with intrinsics.

typedef float F __attribute__((vector_size(4 * FPC_LANES)));
typedef int32_t I __attribute__((vector_size(4 * FPC_LANES)));
typedef uint32_t U __attribute__((vector_size(4 * FPC_LANES)));

static constexpr int kLanes = FPC_LANES;

template <class V, class T>
static inline V load(const T* from) {
    V vector;
    __builtin_memcpy(&vector, from, sizeof vector);
    return vector;
}

template <class V, class T>
static inline void store(T* to, V vector) {
    __builtin_memcpy(to, &vector, sizeof vector);
}

static inline I splat(int32_t value) { return I{} + value; }
static inline F splat(float value) {
    // Adding zeros to a float is an instruction: it changes -0.
    int32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return (F)splat(bits);
}
static inline I magnitude(F value) { return (I)value & 0x7FFFFFFF; }
static inline I larger(I a, I b) { return a > b ? a : b; }
static inline I smaller(I a, I b) { return a < b ? a : b; }

static constexpr int32_t kExponentMask = 0x7F800000;

static inline F with_sign_of(F size, F sign) {
    return (F)(((I)size & 0x7FFFFFFF) | ((I)sign & (int32_t)0x80000000));
}

// Store the low byte of each lane.
static inline void store_bytes(uint8_t* to, I values) {
#if FPC_LANES == 16
    store(to, _mm512_maskz_cvtepi32_epi8(0xFFFF, (__m512i)values));
#elif FPC_LANES == 8
    __m256i words = _mm256_packus_epi32((__m256i)values, (__m256i)values);
    __m256i bytes = _mm256_packus_epi16(words, words);
    int32_t low = _mm256_extract_epi32(bytes, 0), high = _mm256_extract_epi32(bytes, 4);
    store(to, low), store(to + 4, high);
#else
    for (int lane = 0; lane < kLanes; lane++) to[lane] = (uint8_t)values[lane];
#endif
}

// As many doubles as a vector has lanes. A vector of two registers would be kept in memory.
typedef double H __attribute__((vector_size(4 * FPC_LANES)));
struct D {
    H low, high;

    D& operator+=(const D& other) {
        low += other.low, high += other.high;
        return *this;
    }
};

static inline D wide(F v) {
#if FPC_LANES == 16
    return {(H)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)),
            (H)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1))};
#elif FPC_LANES == 8
    return {(H)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)),
            (H)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1))};
#else
    return {H{v[0], v[1]}, H{v[2], v[3]}};
#endif
}

// Halves are added until four lanes are left, and then neighbours.
static inline double total(D v) {
#if FPC_LANES == 16
    typedef double D4 __attribute__((vector_size(32)));
    H sum = v.low + v.high;
    D4 four = __builtin_shufflevector(sum, sum, 0, 1, 2, 3) +
              __builtin_shufflevector(sum, sum, 4, 5, 6, 7);
    return (four[0] + four[1]) + (four[2] + four[3]);
#elif FPC_LANES == 8
    H four = v.low + v.high;
    return (four[0] + four[1]) + (four[2] + four[3]);
#else
    return (v.low[0] + v.low[1]) + (v.high[0] + v.high[1]);
#endif
}

typedef int32_t I4 __attribute__((vector_size(16)));
static inline I4 larger4(I4 a, I4 b) { return a > b ? a : b; }

static inline int32_t largest(I v) {
#if FPC_LANES == 16
    typedef int32_t I8 __attribute__((vector_size(32)));
    I8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
    I8 b = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    I8 eight = a > b ? a : b;
#elif FPC_LANES == 8
    I eight = v;
#endif
#if FPC_LANES >= 8
    I4 four = larger4(__builtin_shufflevector(eight, eight, 0, 1, 2, 3),
                      __builtin_shufflevector(eight, eight, 4, 5, 6, 7));
#else
    I four = v;
#endif
    four = larger4(four, __builtin_shufflevector(four, four, 2, 3, 0, 1));
    return larger4(four, __builtin_shufflevector(four, four, 1, 0, 3, 2))[0];
}
