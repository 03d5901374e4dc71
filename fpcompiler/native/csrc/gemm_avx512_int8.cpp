// Integer products (vpdpbusd).
//
// Weights are decoded to unsigned integers, an offset above what they are; sums start from minus the
// offset times the sum of the activations, so that they end where they should.

#include "gemm.h"

#if defined(__x86_64__)
#include <type_traits>

#include "gemm_avx512.h"

namespace {

// The intrinsic makes GCC 12 copy accumulators: half the speed.
FPC_INLINE I dot4(I sum, I weights, I activations) {
    asm("vpdpbusd %2,%1,%0" : "+v"(sum) : "v"(weights), "v"(activations));
    return sum;
}

// Where the integers of eight inputs of sixteen outputs come from: nibbles ...
struct FromNibbles {
    static constexpr int64_t kStride = kOctet;
    I table;

    explicit FromNibbles(const Gemm& gemm) {
        const __m128i integers = _mm_loadu_si128((const __m128i*)gemm.weights.integers);
        table = _mm512_broadcast_i32x4(integers);
    }
    // Only six bits of an index count and the table repeats itself, so nothing needs to be masked.
    FPC_INLINE_MEMBER I low(I codes) const { return _mm512_permutexvar_epi8(codes, table); }
    FPC_INLINE_MEMBER I high(I codes, const uint8_t*) const {
        return _mm512_permutexvar_epi8(_mm512_srli_epi16(codes, 4), table);
    }
};

// ... or bytes, which are the integers ...
struct FromBytes {
    static constexpr int64_t kStride = 2 * kOctet;

    explicit FromBytes(const Gemm&) {}
    FPC_INLINE_MEMBER I low(I codes) const { return codes; }
    FPC_INLINE_MEMBER I high(I, const uint8_t* at) const { return load(at + kOctet); }
};

// ... or a panel, a block of nibbles that was decoded before, with its scales.
struct FromPanel : FromBytes {
    using FromBytes::FromBytes;
};

template <int kM>
struct Activations {
    const int8_t* row[kM];

    Activations(const Gemm& gemm, int64_t m) {
        FPC_UNROLL for (int i = 0; i < kM; i++)
            row[i] = (const int8_t*)gemm.activations.a + (m + i) * gemm.activations.stride;
    }
};

// Four inputs of a tile: decoded once, then multiplied with one row after the other. In another order
// GCC keeps so many activations in registers that none are left for sums.
template <int kM, int kV>
FPC_INLINE void add_four(const I (&weights)[kV], const Activations<kM>& a, int64_t input,
                         I (&sum)[kM][kV]) {
    FPC_UNROLL for (int i = 0; i < kM; i++) {
        const I four = broadcast4(a.row[i] + input);
        FPC_UNROLL for (int v = 0; v < kV; v++) sum[i][v] = dot4(sum[i][v], weights[v], four);
    }
}

// Eight inputs of a tile: four are added to `sum`, the others to `more`, which may be the same.
template <int kM, int kV, class Source>
FPC_INLINE void add_eight(const Source& source, const uint8_t* octet, const Activations<kM>& a,
                          int64_t input, I (&sum)[kM][kV], I (&more)[kM][kV]) {
    I codes[kV], weights[kV];
    FPC_UNROLL for (int v = 0; v < kV; v++) {
        codes[v] = load(octet + 64 * v);
        weights[v] = source.low(codes[v]);
    }
    add_four<kM, kV>(weights, a, input, sum);
    FPC_UNROLL for (int v = 0; v < kV; v++) {
        // With many rows no registers are left for the codes: they are loaded again.
        const I again = kM > 2 ? load(octet + 64 * v) : codes[v];
        weights[v] = source.high(again, octet + 64 * v);
    }
    add_four<kM, kV>(weights, a, input + 4, more);
}

// --- one scale for each row ----------------------------------------------------------------------

template <int kM, int kV, class Source>
FPC_INLINE void row_tile(const Gemm& gemm, const Source& source, const uint8_t* weights, int64_t m,
                         int64_t n) {
    const Activations<kM> a(gemm, m);
    // One row alone would wait for its own sums.
    constexpr bool kTwo = kM == 1;
    I sum[kM][kV], more[kM][kV];
    FPC_UNROLL for (int i = 0; i < kM; i++)
        FPC_UNROLL for (int v = 0; v < kV; v++) {
            sum[i][v] = _mm512_set1_epi32(gemm.activations.correction[m + i]);
            more[i][v] = _mm512_setzero_si512();
        }
    const int64_t octets = gemm.layout.octets;
    for (int64_t o = 0; o < octets; o++, weights += Source::kStride)
        add_eight<kM, kV>(source, weights, a, 8 * o, sum, kTwo ? more : sum);
    if (kTwo)
        FPC_UNROLL for (int v = 0; v < kV; v++) sum[0][v] = _mm512_add_epi32(sum[0][v], more[0][v]);
    const F unit = _mm512_set1_ps(gemm.weights.unit);
    FPC_UNROLL for (int v = 0; v < kV; v++)
        FPC_UNROLL for (int i = 0; i < kM; i++)
            finish(gemm, m + i, n + 16 * v, _mm512_mul_ps(_mm512_cvtepi32_ps(sum[i][v]), unit));
}

template <int kV, class Source>
struct RowTiles {
    const Gemm& gemm;
    const Source source;
    const uint8_t* weights;
    int64_t n;

    template <int kM>
    void run(int64_t m) const {
        row_tile<kM, kV>(gemm, source, weights, m, n);
    }
};

// --- scales of groups of inputs ------------------------------------------------------------------

constexpr int kFewRows = 3;  // of a tile of a whole block

// By what sums are multiplied: scales of weights, or these times those of activations. Powers of two
// are multiplied by adding exponents: an addition of integers does not compete with the products.
enum Scaling { kWeights, kProducts, kPowers };

// What stands for the scales of weights that have none: ones of E8M0.
#define FPC_16(value) value, value, value, value, value, value, value, value, \
                      value, value, value, value, value, value, value, value
alignas(64) constexpr uint8_t kOnes[kBlock] = {FPC_16(127), FPC_16(127), FPC_16(127), FPC_16(127)};
#undef FPC_16

// Codes of a block and scales of its groups, which may lie among them.
struct Groups {
    const uint8_t* codes;
    int64_t code_stride;  // from one group to the next
    const uint8_t* scales;
    int64_t scale_stride;
    int32_t format;  // FpcBlockScale
};

Groups stored_groups(const Gemm& gemm, const uint8_t* block) {
    const int64_t stride = gemm.layout.group_bytes;
    if (!gemm.layout.scale_bytes) return {block, stride, kOnes, 0, FPC_E8M0};
    return {block + gemm.layout.scale_bytes, stride, block, stride, gemm.weights.block_scale};
}

// The format of scales, which is known at compile time where that counts.
template <Scaling kScaling, class Source>
FPC_INLINE int32_t scale_format(const Groups& groups) {
    if (std::is_same<Source, FromPanel>::value) return FPC_F32;
    return kScaling == kPowers ? FPC_E8M0 : groups.format;
}

// A group has kQ octets, or if that is 0 any number of four.
template <int kM, int kV, int kQ, Scaling kScaling, class Source>
FPC_INLINE void group_tile(const Gemm& gemm, const Source& source, Groups of, int first, int64_t m,
                           int64_t n) {
    const Activations<kM> a(gemm, m);
    const Prepared& prepared = gemm.activations;
    const int64_t groups = gemm.layout.groups, octets = gemm.layout.octets;
    const int32_t* correction = prepared.correction + m;
    const float* group_scale = prepared.group_scale + m;
    const I one = _mm512_castps_si512(_mm512_set1_ps(1));
    F total[kM][kV];
    FPC_UNROLL for (int i = 0; i < kM; i++)
        FPC_UNROLL for (int v = 0; v < kV; v++) total[i][v] = _mm512_setzero_ps();
    int64_t input = 0;
    for (int64_t g = 0; g < groups; g++) {
        I sum[kM][kV];
        FPC_UNROLL for (int i = 0; i < kM; i++)
            FPC_UNROLL for (int v = 0; v < kV; v++) sum[i][v] = _mm512_set1_epi32(correction[i]);
        const uint8_t* octet = of.codes + 64 * first;
        int64_t left = kQ ? kQ : octets;
        do {
            constexpr int kAtOnce = kQ ? kQ : 4;
            FPC_UNROLL for (int q = 0; q < kAtOnce; q++) {
                add_eight<kM, kV>(source, octet, a, input, sum, sum);
                octet += Source::kStride, input += 8;
            }
            left -= kAtOnce;
        } while (!kQ && left > 0);
        FPC_UNROLL for (int v = 0; v < kV; v++) {
            const F scale = weight_scales(of.scales, scale_format<kScaling, Source>(of), first + v);
            const I exponent = _mm512_sub_epi32(_mm512_castps_si512(scale), one);
            FPC_UNROLL for (int i = 0; i < kM; i++) {
                const float* other = group_scale + i;
                F both = scale;
                if (kScaling == kProducts) both = _mm512_mul_ps(scale, _mm512_set1_ps(*other));
                if (kScaling == kPowers)
                    both = _mm512_castsi512_ps(_mm512_add_epi32(exponent, broadcast4(other)));
                total[i][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[i][v]), both, total[i][v]);
            }
        }
        of.codes += of.code_stride, of.scales += of.scale_stride;
        correction += prepared.m, group_scale += prepared.m;
    }
    const F unit = _mm512_set1_ps(gemm.weights.unit * scale_unit(gemm.weights));
    FPC_UNROLL for (int v = 0; v < kV; v++)
        FPC_UNROLL for (int i = 0; i < kM; i++)
            finish(gemm, m + i, n + 16 * v, _mm512_mul_ps(total[i][v], unit));
}

template <int kV, int kQ, Scaling kScaling, class Source>
struct GroupTiles {
    const Gemm& gemm;
    const Source source;
    const Groups groups;
    int first;  // vector
    int64_t n;

    template <int kM>
    void run(int64_t m) const {
        group_tile<kM, kV, kQ, kScaling>(gemm, source, groups, first, m, n);
    }
};

// --- tasks ---------------------------------------------------------------------------------------

template <class Source>
void rows_from(const Gemm& gemm, const Task& task, const uint8_t* weights) {
    const int64_t n = task.block * kBlock + 16 * task.first;
    const Source source(gemm);
    weights += 64 * task.first;
    if (task.count == 4)
        for_tiles<kRows>(task.begin, task.end, RowTiles<4, Source>{gemm, source, weights, n});
    else
        for_tiles<kRows>(task.begin, task.end, RowTiles<2, Source>{gemm, source, weights, n});
}

// Registers hold a whole block for a few rows, half a block for more: `whole` rows are done first
// with whole blocks.
template <int kQ, Scaling kScaling, class Source>
void groups_from(const Gemm& gemm, const Task& task, const Groups& groups, int64_t whole) {
    const Source source(gemm);
    const int64_t n = task.block * kBlock, then = task.begin + whole;
    for_tiles<kFewRows>(task.begin, then,
                        GroupTiles<4, kQ, kScaling, Source>{gemm, source, groups, 0, n});
    for (int v = task.first; v < task.first + task.count; v += 2)
        for_tiles<kRows>(then, task.end,
                         GroupTiles<2, kQ, kScaling, Source>{gemm, source, groups, v, n + 16 * v});
}

template <class Source>
void int8_rows(const Gemm& gemm, const Task& task, uint8_t*) {
    rows_from<Source>(gemm, task, gemm.block(task.block));
}

template <int kQ, Scaling kScaling, class Source>
void int8_groups(const Gemm& gemm, const Task& task, uint8_t*) {
    const int64_t rows = task.end - task.begin, few = rows < kFewRows ? rows : kFewRows;
    // The first rows bring a block into the cache. Reading half of it at a time was measured to be
    // slow, except where groups of four are unrolled.
    const bool whole = task.count == 4 && (kQ != 4 || rows <= kFewRows);
    const Groups groups = stored_groups(gemm, gemm.block(task.block));
    groups_from<kQ, kScaling, Source>(gemm, task, groups, whole ? few : 0);
}

// --- panels --------------------------------------------------------------------------------------

// The codes are [octets][2][4 vectors][64 bytes]; after them are the scales of groups as fp32.
int64_t panel_codes(const Gemm& gemm) { return gemm.layout.inputs() * kBlock; }

int64_t panel_bytes(const Gemm& gemm) {
    const int64_t scales = gemm.weights.group ? gemm.layout.groups * kBlock * 4 : 0;
    return panel_codes(gemm) + scales;
}

void decode_panel(const Gemm& gemm, int64_t block, uint8_t* panel) {
    const FromNibbles source(gemm);
    const Layout& layout = gemm.layout;
    float* scales = (float*)(panel + panel_codes(gemm));
    const uint8_t* group = gemm.block(block);
    for (int64_t g = 0; g < layout.groups; g++, group += layout.group_bytes) {
        if (gemm.weights.group)
            FPC_UNROLL for (int v = 0; v < 4; v++)
                _mm512_storeu_ps(scales + kBlock * g + 16 * v,
                                 weight_scales(group, gemm.weights.block_scale, v));
        const uint8_t* codes = group + layout.scale_bytes;
        for (int64_t o = 0; o < layout.octets; o++, codes += kOctet, panel += 2 * kOctet)
            FPC_UNROLL for (int v = 0; v < 4; v++) {
                const I both = load(codes + 64 * v);
                _mm512_store_si512(panel + 64 * v, source.low(both));
                _mm512_store_si512(panel + kOctet + 64 * v, source.high(both, nullptr));
            }
    }
}

void int8_rows_panel(const Gemm& gemm, const Task& task, uint8_t* panel) {
    decode_panel(gemm, task.block, panel);
    rows_from<FromBytes>(gemm, task, panel);
}

template <int kQ, Scaling kScaling>
void int8_groups_panel(const Gemm& gemm, const Task& task, uint8_t* panel) {
    decode_panel(gemm, task.block, panel);
    const Groups groups{panel, gemm.layout.octets * FromPanel::kStride,
                        panel + panel_codes(gemm), kBlock * 4, FPC_F32};
    const FromPanel source(gemm);
    const int64_t n = task.block * kBlock;
    for (int v = 0; v < 4; v += 2)
        for_tiles<kRows>(
            task.begin, task.end,
            GroupTiles<2, kQ, kScaling, FromPanel>{gemm, source, groups, v, n + 16 * v});
}

// --- choice of a kernel --------------------------------------------------------------------------

// Exponents can be added where all scales are powers of two and no sum leaves the range of fp32.
bool adds_exponents(const Gemm& gemm) {
    const FpcWeights& weights = gemm.weights;
    const bool powers = weights.block_scale < 0 || weights.block_scale == FPC_E8M0;
    if (weights.scaled_inputs != FPC_POWERS || !powers) return false;
    int32_t least = INT32_MAX, most = 0;
    for (int64_t m = 0; m < gemm.m; m++) {
        const int32_t* range = gemm.activations.range + 2 * m;
        least = range[0] < least ? range[0] : least;
        most = range[1] > most ? range[1] : most;
    }
    const int32_t low = (least >> 23) - 127 + weights.least, high = (most >> 23) - 127 + weights.most;
    return least >> 23 && low >= -126 && high <= 127;
}

template <int kQ, Scaling kScaling>
RunTask groups_of(const Gemm& gemm, bool panel) {
    // Unrolling groups of four brings nothing to bytes.
    constexpr int kOfBytes = kQ == 4 ? 0 : kQ;
    if (panel) return int8_groups_panel<kOfBytes, kScaling>;
    if (gemm.weights.code_bits == 4) return int8_groups<kQ, kScaling, FromNibbles>;
    return int8_groups<kOfBytes, kScaling, FromBytes>;
}

template <int kQ>
RunTask groups_of(const Gemm& gemm, bool panel) {
    if (gemm.weights.scaled_inputs == FPC_NO_SCALES) return groups_of<kQ, kWeights>(gemm, panel);
    return adds_exponents(gemm) ? groups_of<kQ, kPowers>(gemm, panel)
                                : groups_of<kQ, kProducts>(gemm, panel);
}

RunTask kernel_of(const Gemm& gemm, bool panel) {
    if (!gemm.weights.group)
        return panel ? int8_rows_panel
                     : gemm.weights.code_bits == 4 ? int8_rows<FromNibbles> : int8_rows<FromBytes>;
    switch (gemm.layout.octets) {
        case 2: return groups_of<2>(gemm, panel);
        case 4: return groups_of<4>(gemm, panel);
        default: return groups_of<0>(gemm, panel);
    }
}

}  // namespace

Kernels kernels_avx512_int8(const Gemm& gemm) {
    const int64_t bytes = panel_bytes(gemm);
    const bool nibbles = gemm.weights.code_bits == 4;
    const bool panel = nibbles && gemm.m >= kPanelRows && bytes <= kPanelBytes;
    return {kernel_of(gemm, panel), panel ? bytes : 0};
}
#endif
