// Integer products (vpdpbusd). Included by gemm_avx512.cpp only.
//
// Weights are decoded to unsigned integers, an offset above what they are; sums start from minus the
// offset times the sum of the activations, so that they end where they should.

// The intrinsic makes GCC 12 copy accumulators: half the speed.
FPC_INLINE I dot4(I sum, I weights, I activations) {
    asm("vpdpbusd %2,%1,%0" : "+v"(sum) : "v"(weights), "v"(activations));
    return sum;
}

// Where the integers of eight inputs of sixteen outputs come from: packed codes ...
template <bool kFetch>
struct FromCodes {
    static constexpr int64_t kStride = kOctet;
    I table;

    FPC_INLINE_MEMBER I codes(const uint8_t* at) const {
        if (kFetch) fetch(at + kAhead);
        return load(at);
    }
    FPC_INLINE_MEMBER I low(I codes) const { return decode_low(codes, table); }
    FPC_INLINE_MEMBER I high(I codes, const uint8_t*) const { return decode_high(codes, table); }
};

// ... or a panel, a block that was decoded before.
struct FromPanel {
    static constexpr int64_t kStride = 2 * kOctet;

    FPC_INLINE_MEMBER I codes(const uint8_t* at) const { return load(at); }
    FPC_INLINE_MEMBER I low(I codes) const { return codes; }
    FPC_INLINE_MEMBER I high(I, const uint8_t* at) const { return load(at + kOctet); }
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
        codes[v] = source.codes(octet + 64 * v);
        weights[v] = source.low(codes[v]);
    }
    add_four<kM, kV>(weights, a, input, sum);
    FPC_UNROLL for (int v = 0; v < kV; v++) {
        // With many rows no registers are left for the codes: they are loaded again.
        const I again = kM > 2 ? source.codes(octet + 64 * v) : codes[v];
        weights[v] = source.high(again, octet + 64 * v);
    }
    add_four<kM, kV>(weights, a, input + 4, more);
}

// A tile of outputs whose weights have one scale for each row.
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

// The scales that activations have besides those of tokens. Powers of two are multiplied by adding
// exponents: an addition of integers does not compete with the products.
enum Inputs { kNoScales, kAnyScales, kPowers };

// A tile of outputs with scales of groups of inputs: kQ octets, or if that is 0 any number of four.
template <int kM, int kV, int kQ, Inputs kInputs, class Source, class Scales>
FPC_INLINE void group_tile(const Gemm& gemm, const Source& source, const uint8_t* weights,
                           int64_t group_stride, const Scales& scales, int64_t m, int64_t n) {
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
        constexpr bool kTwo = kM == 1;
        I sum[kM][kV], more[kM][kV];
        FPC_UNROLL for (int i = 0; i < kM; i++)
            FPC_UNROLL for (int v = 0; v < kV; v++) {
                sum[i][v] = _mm512_set1_epi32(correction[i]);
                more[i][v] = _mm512_setzero_si512();
            }
        const uint8_t* octet = weights;
        int64_t left = kQ ? kQ : octets;
        do {
            constexpr int kAtOnce = kQ ? kQ : 4;
            FPC_UNROLL for (int q = 0; q < kAtOnce; q++) {
                add_eight<kM, kV>(source, octet, a, input, sum, kTwo ? more : sum);
                octet += Source::kStride, input += 8;
            }
            left -= kAtOnce;
        } while (!kQ && left > 0);
        if (kTwo)
            FPC_UNROLL for (int v = 0; v < kV; v++)
                sum[0][v] = _mm512_add_epi32(sum[0][v], more[0][v]);
        FPC_UNROLL for (int v = 0; v < kV; v++) {
            const F scale = scales(g, v);
            const I exponent = _mm512_sub_epi32(_mm512_castps_si512(scale), one);
            FPC_UNROLL for (int i = 0; i < kM; i++) {
                const float* other = group_scale + i;
                F both = scale;
                if (kInputs == kAnyScales) both = _mm512_mul_ps(scale, _mm512_set1_ps(*other));
                if (kInputs == kPowers)
                    both = _mm512_castsi512_ps(_mm512_add_epi32(exponent, broadcast4(other)));
                total[i][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[i][v]), both, total[i][v]);
            }
        }
        weights += group_stride, correction += prepared.m, group_scale += prepared.m;
    }
    const F unit = _mm512_set1_ps(gemm.weights.unit * scale_unit(gemm.weights));
    FPC_UNROLL for (int v = 0; v < kV; v++)
        FPC_UNROLL for (int i = 0; i < kM; i++)
            finish(gemm, m + i, n + 16 * v, _mm512_mul_ps(total[i][v], unit));
}

// What stands for the scales of weights that have none.
alignas(64) constexpr float kOnes[kBlock] = {
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
};

// Scales where the weights are, or those of a panel as fp32.
template <int kFormat, bool kFetch>
struct StoredScales {
    const uint8_t* block;
    int64_t stride;
    int first;

    FPC_INLINE_MEMBER F operator()(int64_t g, int v) const {
        const uint8_t* group = block + g * stride;
        if (kFetch && v == 0) fetch(group + kAhead);
        return weight_scales<kFormat>(group, first + v);
    }
};

struct PanelScales {
    const float* scales;

    FPC_INLINE_MEMBER F operator()(int64_t g, int v) const {
        return _mm512_loadu_ps(scales + kBlock * g + 16 * v);
    }
};

template <int kV, class Source>
struct RowTiles {
    const Gemm& gemm;
    const Source& source;
    const uint8_t* weights;
    int64_t n;

    template <int kM>
    void run(int64_t m) const {
        row_tile<kM, kV>(gemm, source, weights, m, n);
    }
};

template <int kV, int kQ, Inputs kInputs, class Source, class Scales>
struct GroupTiles {
    const Gemm& gemm;
    const Source& source;
    const uint8_t* weights;
    int64_t stride;
    const Scales& scales;
    int64_t n;

    template <int kM>
    void run(int64_t m) const {
        group_tile<kM, kV, kQ, kInputs>(gemm, source, weights, stride, scales, m, n);
    }
};

// --- packed codes -----------------------------------------------------------------------------

template <int kV, bool kFetch>
void run_rows(const Gemm& gemm, const Task& task, int64_t begin, int64_t end) {
    const FromCodes<kFetch> source{repeated(gemm.weights.integers)};
    const uint8_t* weights = gemm.block(task.block) + 64 * task.first;
    const int64_t n = task.block * kBlock + 16 * task.first;
    for_tiles<kRows>(begin, end, RowTiles<kV, FromCodes<kFetch>>{gemm, source, weights, n});
}

template <int kV, int kMost, int kFormat, int kQ, Inputs kInputs, bool kFetch>
void run_groups(const Gemm& gemm, const Task& task, int first, int64_t begin, int64_t end) {
    typedef FromCodes<kFetch> Source;
    typedef StoredScales<kFormat, kFetch> Scales;
    const Source source{repeated(gemm.weights.integers)};
    const Layout& layout = gemm.layout;
    const uint8_t* block = gemm.block(task.block);
    const Scales scales{layout.scale_bytes ? block : (const uint8_t*)kOnes,
                        layout.scale_bytes ? layout.group_bytes : 0, first};
    const uint8_t* weights = block + layout.scale_bytes + 64 * first;
    for_tiles<kMost>(begin, end, GroupTiles<kV, kQ, kInputs, Source, Scales>{
                         gemm, source, weights, layout.group_bytes, scales,
                         task.block * kBlock + 16 * first});
}

// The first tile waits for memory, so it alone fetches ahead: in the others that costs more than it
// brings.
void int8_rows(const Gemm& gemm, const Task& task, uint8_t*) {
    const int64_t left = task.end - task.begin, tiles = (left + kRows - 1) / kRows;
    const int64_t then = task.begin + (left + tiles - 1) / tiles;
    if (task.count == 4) {
        run_rows<4, true>(gemm, task, task.begin, then);
        run_rows<4, false>(gemm, task, then, task.end);
    } else {
        run_rows<2, true>(gemm, task, task.begin, then);
        run_rows<2, false>(gemm, task, then, task.end);
    }
}

template <int kFormat, int kQ, Inputs kInputs>
void int8_groups(const Gemm& gemm, const Task& task, uint8_t*) {
    if (task.end - task.begin == 1 && task.count == 4) {
        run_groups<4, 1, kFormat, kQ, kInputs, true>(gemm, task, 0, task.begin, task.end);
        return;
    }
    const int64_t left = task.end - task.begin, tiles = (left + kRows - 1) / kRows;
    const int64_t then = task.begin + (left + tiles - 1) / tiles;
    for (int first = task.first; first < task.first + task.count; first += 2) {
        run_groups<2, kRows, kFormat, kQ, kInputs, true>(gemm, task, first, task.begin, then);
        run_groups<2, kRows, kFormat, kQ, kInputs, false>(gemm, task, first, then, task.end);
    }
}

// --- choice of a kernel -----------------------------------------------------------------------

// Exponents can be added where all scales are powers of two and no sum leaves the range of fp32.
Inputs inputs_of(const Gemm& gemm) {
    const FpcWeights& weights = gemm.weights;
    if (weights.scaled_inputs == FPC_NO_SCALES) return kNoScales;
    const bool powers = weights.block_scale < 0 || weights.block_scale == FPC_E8M0;
    if (weights.scaled_inputs != FPC_POWERS || !powers) return kAnyScales;
    int32_t least = INT32_MAX, most = 0;
    for (int64_t m = 0; m < gemm.m; m++) {
        const int32_t* range = gemm.activations.range + 2 * m;
        least = range[0] < least ? range[0] : least;
        most = range[1] > most ? range[1] : most;
    }
    const int32_t low = (least >> 23) - 127 + weights.least, high = (most >> 23) - 127 + weights.most;
    return least >> 23 && low >= -126 && high <= 127 ? kPowers : kAnyScales;
}

// --- panels -----------------------------------------------------------------------------------

int64_t panel_bytes(const Gemm& gemm) {
    const int64_t scales = gemm.weights.group ? gemm.layout.groups * kBlock * 4 : 0;
    return gemm.layout.inputs() * kBlock + scales;
}

// Decode a block: [octets][2][4 vectors][64 bytes], and after it the scales of the groups.
void decode_panel(const Gemm& gemm, int64_t block, uint8_t* panel) {
    const FromCodes<true> source{repeated(gemm.weights.integers)};
    const Layout& layout = gemm.layout;
    float* scales = (float*)(panel + layout.inputs() * kBlock);
    const uint8_t* group = gemm.block(block);
    for (int64_t g = 0; g < layout.groups; g++, group += layout.group_bytes) {
        if (gemm.weights.group)
            FPC_UNROLL for (int v = 0; v < 4; v++)
                _mm512_storeu_ps(scales + kBlock * g + 16 * v,
                                 weight_scales(group, gemm.weights.block_scale, v));
        const uint8_t* codes = group + layout.scale_bytes;
        for (int64_t o = 0; o < layout.octets; o++, codes += kOctet, panel += 2 * kOctet)
            FPC_UNROLL for (int v = 0; v < 4; v++) {
                const I both = source.codes(codes + 64 * v);
                _mm512_store_si512(panel + 64 * v, source.low(both));
                _mm512_store_si512(panel + kOctet + 64 * v, source.high(both, nullptr));
            }
    }
}

void int8_rows_panel(const Gemm& gemm, const Task& task, uint8_t* panel) {
    decode_panel(gemm, task.block, panel);
    const FromPanel source;
    for_tiles<kRows>(task.begin, task.end,
                     RowTiles<4, FromPanel>{gemm, source, panel, task.block * kBlock});
}

template <int kQ, Inputs kInputs>
void int8_groups_panel(const Gemm& gemm, const Task& task, uint8_t* panel) {
    decode_panel(gemm, task.block, panel);
    const FromPanel source;
    const float* scales = (const float*)(panel + gemm.layout.inputs() * kBlock);
    const int64_t stride = gemm.layout.octets * FromPanel::kStride;
    for (int first = 0; first < 4; first += 2) {
        const PanelScales own{scales + 16 * first};
        for_tiles<kRows>(task.begin, task.end, GroupTiles<2, kQ, kInputs, FromPanel, PanelScales>{
                             gemm, source, panel + 64 * first, stride, own,
                             task.block * kBlock + 16 * first});
    }
}

template <int kQ, Inputs kInputs>
RunTask groups_of(int32_t format, bool panel) {
    if (panel) return int8_groups_panel<kQ, kInputs>;
    switch (format) {
        case FPC_E8M0: return int8_groups<FPC_E8M0, kQ, kInputs>;
        case FPC_E4M3: return int8_groups<FPC_E4M3, kQ, kInputs>;
        default: return int8_groups<FPC_F32, kQ, kInputs>;
    }
}

template <int kQ>
RunTask groups_of(const Gemm& gemm, bool panel) {
    const int32_t format = gemm.weights.block_scale;
    switch (inputs_of(gemm)) {
        case kNoScales: return groups_of<kQ, kNoScales>(format, panel);
        case kAnyScales: return groups_of<kQ, kAnyScales>(format, panel);
        default: return groups_of<kQ, kPowers>(format, panel);
    }
}

Kernels int8_kernels(const Gemm& gemm) {
    const int64_t bytes = panel_bytes(gemm);
    const bool panel = gemm.m >= kPanelRows && bytes <= kPanelBytes;
    RunTask run = panel ? int8_rows_panel : int8_rows;
    if (gemm.weights.group) switch (gemm.layout.octets) {
        case 2: run = groups_of<2>(gemm, panel); break;
        case 4: run = groups_of<4>(gemm, panel); break;
        default: run = groups_of<0>(gemm, panel);
    }
    return {run, panel ? bytes : 0};
}
