// Vectors of the width of one instruction set. Included once per instruction set, inside a namespace
// of its own and with FPC_LANES defined. GCC's vector types do almost everything; what they turn into
// slow code is written with intrinsics.

typedef float F __attribute__((vector_size(4 * FPC_LANES)));
typedef int32_t I __attribute__((vector_size(4 * FPC_LANES)));
typedef uint32_t U __attribute__((vector_size(4 * FPC_LANES)));
typedef double D __attribute__((vector_size(8 * FPC_LANES)));

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
static inline F splat(float value) { return F{} + value; }
static inline I magnitude(F value) { return (I)value & 0x7FFFFFFF; }
static inline I larger(I a, I b) { return a > b ? a : b; }

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

// The two halves of a vector, added or compared: what the reductions below are made of.
#if FPC_LANES == 16
typedef double D8 __attribute__((vector_size(64)));
typedef int32_t I8 __attribute__((vector_size(32)));
static inline D8 fold(D v) {
    return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
           __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
}
static inline I8 fold_largest(I v) {
    I8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
    I8 b = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    return a > b ? a : b;
}
#elif FPC_LANES == 8
typedef D D8;
typedef I I8;
static inline D8 fold(D v) { return v; }
static inline I8 fold_largest(I v) { return v; }
#endif

#if FPC_LANES >= 8
typedef double D4 __attribute__((vector_size(32)));
typedef int32_t I4 __attribute__((vector_size(16)));
static inline D4 fold4(D v) {
    D8 w = fold(v);
    return __builtin_shufflevector(w, w, 0, 1, 2, 3) + __builtin_shufflevector(w, w, 4, 5, 6, 7);
}
static inline I4 fold4_largest(I v) {
    I8 w = fold_largest(v);
    I4 a = __builtin_shufflevector(w, w, 0, 1, 2, 3), b = __builtin_shufflevector(w, w, 4, 5, 6, 7);
    return a > b ? a : b;
}
#else
typedef D D4;
typedef I I4;
static inline D4 fold4(D v) { return v; }
static inline I4 fold4_largest(I v) { return v; }
#endif

static inline int32_t largest(I values) {
    I4 v = fold4_largest(values);
    int32_t a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
}

static inline double total(D values) {
    D4 v = fold4(values);
    return (v[0] + v[1]) + (v[2] + v[3]);
}
