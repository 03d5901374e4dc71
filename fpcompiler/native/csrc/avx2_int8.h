// Integer products in vectors of 256 bits. Included by gemm_avx2.cpp only.
//
// As for AVX-512, weights are decoded to unsigned integers, an offset above what they are, and sums
// start from a correction. How products are added is a parameter of the tiles, one of the three
// classes below: a sum begins as `start`, takes four products for each of its outputs at a time, of
// at most `run` octets of inputs, and is a vector of int32 after `end`.

// vpdpbusd, encoded as in AVX-VNNI or as in AVX-512. The intrinsics make GCC 12 copy sums.
template <bool kVex>
struct Vnni {
    static constexpr int64_t run = INT64_MAX;

    explicit Vnni(const FpcWeights&) {}
    FPC_INLINE_MEMBER I start(int32_t correction) const { return _mm256_set1_epi32(correction); }
    FPC_INLINE_MEMBER void add(I& sum, I weights, I activations) const {
        if (kVex)
            asm("%{vex%} vpdpbusd %2,%1,%0" : "+x"(sum) : "x"(weights), "x"(activations));
        else
            asm("%{evex%} vpdpbusd %2,%1,%0" : "+x"(sum) : "x"(weights), "x"(activations));
    }
    FPC_INLINE_MEMBER I end(I sum, int32_t) const { return sum; }
};

// vpmaddubsw, and sums of 16 bits as long as they have room.
struct Words {
    int64_t run;

    explicit Words(const FpcWeights& weights) {
        int64_t most = 0;
        for (const uint8_t integer : weights.integers) most = integer > most ? integer : most;
        // A sum takes two pairs of products of an octet.
        const int64_t octet = 4 * most * weights.most_input;
        run = octet ? INT16_MAX / octet : INT64_MAX;
    }
    FPC_INLINE_MEMBER I start(int32_t) const { return _mm256_setzero_si256(); }
    FPC_INLINE_MEMBER void add(I& sum, I weights, I activations) const {
        // One statement, since GCC 12 would rather have many products in registers than add them.
        I pairs;
        asm("vpmaddubsw %3,%2,%1\n\tvpaddw %1,%0,%0"
            : "+x"(sum), "=&x"(pairs) : "x"(weights), "x"(activations));
    }
    FPC_INLINE_MEMBER I end(I sum, int32_t correction) const {
        const I pairs = _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
        return _mm256_add_epi32(pairs, _mm256_set1_epi32(correction));
    }
};

// Integers widened to 16 bits, where not even a few products have room in them.
struct Wide {
    static constexpr int64_t run = INT64_MAX;

    explicit Wide(const FpcWeights&) {}
    FPC_INLINE_MEMBER I start(int32_t correction) const { return _mm256_set1_epi32(correction); }
    FPC_INLINE_MEMBER void add(I& sum, I weights, I activations) const {
        const I even = _mm256_and_si256(weights, _mm256_set1_epi16(0xFF));
        const I odd = _mm256_srli_epi16(weights, 8);
        const I others = _mm256_srai_epi16(_mm256_slli_epi16(activations, 8), 8);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, others));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(odd, _mm256_srai_epi16(activations, 8)));
    }
    FPC_INLINE_MEMBER I end(I sum, int32_t) const { return sum; }
};

// Where the integers of eight inputs of eight outputs come from: packed codes; what comes next is
// fetched octet by octet ...
struct FromCodes {
    static constexpr int64_t kStride = kOctet;
    I table;
    Ahead ahead;

    FPC_INLINE_MEMBER I low(const uint8_t* at) const { return decode_low(load(at), table); }
    FPC_INLINE_MEMBER I high(const uint8_t* at) const { return decode_high(load(at), table); }
    FPC_INLINE_MEMBER void begin_rows(const uint8_t*, int64_t, int) const {}
    FPC_INLINE_MEMBER void begin_tile() {}
    FPC_INLINE_MEMBER void begin_octet(int vectors) { ahead.lines(vectors / 2); }
};

// ... or a chunk that was decoded before; the next one is fetched tile by tile.
struct FromPanel {
    static constexpr int64_t kStride = 2 * kOctet;
    Ahead ahead;
    int64_t lines;
    int64_t inputs;  // of the chunk

    FPC_INLINE_MEMBER I low(const uint8_t* at) const { return load(at); }
    FPC_INLINE_MEMBER I high(const uint8_t* at) const { return load(at + kOctet); }
    // Activations may be many: the inputs of the next rows are fetched too.
    FPC_INLINE_MEMBER void begin_rows(const uint8_t* next, int64_t stride, int rows) const {
        for (int i = 0; i < rows; i++, next += stride) Ahead{next}.lines(inputs / 64);
    }
    FPC_INLINE_MEMBER void begin_tile() { ahead.lines(lines); }
    FPC_INLINE_MEMBER void begin_octet(int) {}
};

template <int kM>
struct Activations {
    const int8_t* row[kM];

    Activations(const Gemm& gemm, int64_t m) {
        FPC_UNROLL for (int i = 0; i < kM; i++)
            row[i] = (const int8_t*)gemm.activations.a + (m + i) * gemm.activations.stride;
    }
};

// One vector of weights after the other would keep more activations in registers than there are.
template <int kM, int kV, class Dot>
FPC_INLINE void add_four(const Dot& dot, const I (&weights)[kV], const Activations<kM>& a,
                         int64_t input, I (&sum)[kM][kV]) {
    FPC_UNROLL for (int i = 0; i < kM; i++) {
        const I four = broadcast4(a.row[i] + input);
        FPC_UNROLL for (int v = 0; v < kV; v++) dot.add(sum[i][v], weights[v], four);
    }
}

template <int kM, int kV, class Dot, class Source>
FPC_INLINE void add_eight(const Dot& dot, Source& source, const uint8_t* octet,
                          const Activations<kM>& a, int64_t input, I (&sum)[kM][kV]) {
    source.begin_octet(kV);
    if constexpr (kM == 1) {
        // Vector by vector: eight of them leave no registers for their weights.
        const I four = broadcast4(a.row[0] + input), others = broadcast4(a.row[0] + input + 4);
        FPC_UNROLL for (int v = 0; v < kV; v++) {
            dot.add(sum[0][v], source.low(octet + 32 * v), four);
            dot.add(sum[0][v], source.high(octet + 32 * v), others);
        }
        return;
    }
    I weights[kV];
    FPC_UNROLL for (int v = 0; v < kV; v++) weights[v] = source.low(octet + 32 * v);
    add_four<kM, kV>(dot, weights, a, input, sum);
    FPC_UNROLL for (int v = 0; v < kV; v++) weights[v] = source.high(octet + 32 * v);
    add_four<kM, kV>(dot, weights, a, input + 4, sum);
}

// Return sums of 32 bits of a group of kQ octets: its products and corrections.
template <int kM, int kV, int kQ, class Dot, class Source>
FPC_INLINE void sum_group(const Dot& dot, Source& source, const uint8_t* weights,
                          const Activations<kM>& a, int64_t input, const int32_t* correction,
                          I (&sum)[kM][kV]) {
    FPC_UNROLL for (int i = 0; i < kM; i++)
        FPC_UNROLL for (int v = 0; v < kV; v++) sum[i][v] = dot.start(correction[i]);
    FPC_UNROLL for (int q = 0; q < kQ; q++)
        add_eight<kM, kV>(dot, source, weights + q * Source::kStride, a, input + 8 * q, sum);
    FPC_UNROLL for (int i = 0; i < kM; i++)
        FPC_UNROLL for (int v = 0; v < kV; v++) sum[i][v] = dot.end(sum[i][v], correction[i]);
}

// Add the products of any number of octets to sums of 32 bits.
template <int kM, int kV, class Dot, class Source>
FPC_INLINE void add_octets(const Dot& dot, Source& source, const uint8_t* weights,
                           const Activations<kM>& a, int64_t input, int64_t octets,
                           I (&sum)[kM][kV]) {
    while (octets > 0) {
        int64_t left = octets < dot.run ? octets : dot.run;
        octets -= left;
        I part[kM][kV];
        FPC_UNROLL for (int i = 0; i < kM; i++)
            FPC_UNROLL for (int v = 0; v < kV; v++) part[i][v] = dot.start(0);
        do {
            add_eight<kM, kV>(dot, source, weights, a, input, part);
            weights += Source::kStride, input += 8;
        } while (--left);
        FPC_UNROLL for (int i = 0; i < kM; i++)
            FPC_UNROLL for (int v = 0; v < kV; v++)
                sum[i][v] = _mm256_add_epi32(sum[i][v], dot.end(part[i][v], 0));
    }
}

// Part of a tile whose weights have one scale for each row: add a chunk to rows of kBlock sums.
template <int kM, int kV, class Dot, class Source>
FPC_APART void row_tile(const Gemm& gemm, const Dot dot, Source& shared, const uint8_t* weights,
                        const Chunk& chunk, int64_t m, int32_t* sums) {
    Source source = shared;
    I sum[kM][kV];
    FPC_UNROLL for (int i = 0; i < kM; i++)
        FPC_UNROLL for (int v = 0; v < kV; v++) sum[i][v] = load(sums + kBlock * i + 8 * v);
    const Activations<kM> a(gemm, m);
    add_octets<kM, kV>(dot, source, weights, a, chunk.input, chunk.octets, sum);
    FPC_UNROLL for (int i = 0; i < kM; i++)
        FPC_UNROLL for (int v = 0; v < kV; v++)
            _mm256_storeu_si256((I*)(sums + kBlock * i + 8 * v), sum[i][v]);
    shared = source;
}

// What stands for the scales of activations that have none.
constexpr float kOnes[kRows] = {1, 1, 1, 1, 1};

// Weights of a chunk, from some output on.
struct Groups {
    const uint8_t* weights;
    int64_t stride;  // from one group to the next
    const uint8_t* scales;
    int64_t scale_stride;
    int32_t format;  // of the scales
};

// The same with scales of groups of inputs: kQ octets, or if that is 0 any number.
template <int kM, int kV, int kQ, class Dot, class Source>
FPC_APART void group_tile(const Gemm& gemm, const Dot dot, Source& shared, Groups groups,
                          const Chunk& chunk, int64_t m, float* sums) {
    Source source = shared;
    const Activations<kM> a(gemm, m);
    const Prepared& prepared = gemm.activations;
    const bool scaled = gemm.weights.scaled_inputs != FPC_NO_SCALES;
    const int32_t* correction = prepared.correction + chunk.group * prepared.m + m;
    const float* group_scale = scaled ? prepared.group_scale + chunk.group * prepared.m + m : kOnes;
    const int64_t next = scaled ? prepared.m : 0;
    F total[kM][kV];
    FPC_UNROLL for (int i = 0; i < kM; i++)
        FPC_UNROLL for (int v = 0; v < kV; v++)
            total[i][v] = _mm256_loadu_ps(sums + kBlock * i + 8 * v);
    int64_t input = chunk.input;
    for (int64_t g = 0; g < chunk.groups; g++) {
        I sum[kM][kV];
        if constexpr (kQ > 0) {
            sum_group<kM, kV, kQ>(dot, source, groups.weights, a, input, correction, sum);
        } else {
            FPC_UNROLL for (int i = 0; i < kM; i++)
                FPC_UNROLL for (int v = 0; v < kV; v++)
                    sum[i][v] = _mm256_set1_epi32(correction[i]);
            add_octets<kM, kV>(dot, source, groups.weights, a, input, chunk.octets, sum);
        }
        FPC_UNROLL for (int v = 0; v < kV; v++) {
            const F scale = weight_scales(groups.scales, groups.format, v);
            FPC_UNROLL for (int i = 0; i < kM; i++) {
                const F both = _mm256_mul_ps(scale, _mm256_set1_ps(group_scale[i]));
                total[i][v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[i][v]), both, total[i][v]);
            }
        }
        input += 8 * (kQ > 0 ? kQ : chunk.octets);
        groups.weights += groups.stride, groups.scales += groups.scale_stride;
        correction += prepared.m, group_scale += next;
    }
    FPC_UNROLL for (int i = 0; i < kM; i++)
        FPC_UNROLL for (int v = 0; v < kV; v++)
            _mm256_storeu_ps(sums + kBlock * i + 8 * v, total[i][v]);
    shared = source;
}
