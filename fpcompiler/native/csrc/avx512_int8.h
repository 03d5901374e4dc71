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

    FPC_INLINE_MEMBER I low(const uint8_t* at) const {
        if (kFetch) fetch(at + kAhead);
        return decode_low(load(at), table);
    }
    FPC_INLINE_MEMBER I high(const uint8_t* at) const { return decode_high(load(at), table); }
};

// ... or a panel, a block that was decoded before.
struct FromPanel {
    static constexpr int64_t kStride = 2 * kOctet;

    FPC_INLINE_MEMBER I low(const uint8_t* at) const { return load(at); }
    FPC_INLINE_MEMBER I high(const uint8_t* at) const { return load(at + kOctet); }
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

template <int kM, int kV, class Source>
FPC_INLINE void add_low(const Source& source, const uint8_t* octet, const Activations<kM>& a,
                        int64_t input, I (&sum)[kM][kV]) {
    I weights[kV];
    FPC_UNROLL for (int v = 0; v < kV; v++) weights[v] = source.low(octet + 64 * v);
    add_four<kM, kV>(weights, a, input, sum);
}

template <int kM, int kV, class Source>
FPC_INLINE void add_high(const Source& source, const uint8_t* octet, const Activations<kM>& a,
                         int64_t input, I (&sum)[kM][kV]) {
    I weights[kV];
    FPC_UNROLL for (int v = 0; v < kV; v++) weights[v] = source.high(octet + 64 * v);
    add_four<kM, kV>(weights, a, input + 4, sum);
}

// A tile of outputs whose weights have one scale for each row.
template <int kM, int kV, class Source>
FPC_INLINE void row_tile(const Gemm& gemm, const Source& source, const uint8_t* weights, int64_t m,
                         int64_t n) {
    const Activations<kM> a(gemm, m);
    I sum[kM][kV], more[1][kV];
    FPC_UNROLL for (int i = 0; i < kM; i++)
        FPC_UNROLL for (int v = 0; v < kV; v++)
            sum[i][v] = _mm512_set1_epi32(gemm.activations.correction[m + i]);
    FPC_UNROLL for (int v = 0; v < kV; v++) more[0][v] = _mm512_setzero_si512();
    const int64_t octets = gemm.layout.octets;
    for (int64_t o = 0; o < octets; o++, weights += Source::kStride) {
        add_low<kM, kV>(source, weights, a, 8 * o, sum);
        // One row alone would wait for its own sums.
        if constexpr (kM == 1) add_high<kM, kV>(source, weights, a, 8 * o, more);
        else add_high<kM, kV>(source, weights, a, 8 * o, sum);
    }
    if (kM == 1)
        FPC_UNROLL for (int v = 0; v < kV; v++) sum[0][v] = _mm512_add_epi32(sum[0][v], more[0][v]);
    const F unit = _mm512_set1_ps(gemm.weights.unit);
    FPC_UNROLL for (int v = 0; v < kV; v++)
        FPC_UNROLL for (int i = 0; i < kM; i++)
            finish(gemm, m + i, n + 16 * v, _mm512_mul_ps(_mm512_cvtepi32_ps(sum[i][v]), unit));
}

// A tile of outputs with scales of groups of inputs: kQ octets, or if that is 0 any number of four.
template <int kM, int kV, int kQ, bool kScaled, class Source, class Scales>
FPC_INLINE void group_tile(const Gemm& gemm, const Source& source, const uint8_t* weights,
                           int64_t group_stride, const Scales& scales, int64_t m, int64_t n) {
    const Activations<kM> a(gemm, m);
    const Prepared& prepared = gemm.activations;
    const int64_t groups = gemm.layout.groups, octets = gemm.layout.octets;
    const int32_t* correction = prepared.correction + m * groups;
    const float* group_scale = prepared.group_scale + m * groups;
    F total[kM][kV];
    FPC_UNROLL for (int i = 0; i < kM; i++)
        FPC_UNROLL for (int v = 0; v < kV; v++) total[i][v] = _mm512_setzero_ps();
    int64_t input = 0;
    for (int64_t g = 0; g < groups; g++, weights += group_stride) {
        I sum[kM][kV];
        FPC_UNROLL for (int i = 0; i < kM; i++)
            FPC_UNROLL for (int v = 0; v < kV; v++)
                sum[i][v] = _mm512_set1_epi32(correction[i * groups + g]);
        const uint8_t* octet = weights;
        int64_t left = kQ ? kQ : octets;
        do {
            constexpr int kAtOnce = kQ ? kQ : 4;
            FPC_UNROLL for (int q = 0; q < kAtOnce; q++) {
                add_low<kM, kV>(source, octet, a, input, sum);
                add_high<kM, kV>(source, octet, a, input, sum);
                octet += Source::kStride, input += 8;
            }
            left -= kAtOnce;
        } while (!kQ && left > 0);
        FPC_UNROLL for (int v = 0; v < kV; v++) {
            const F scale = scales(g, v);
            FPC_UNROLL for (int i = 0; i < kM; i++) {
                F both = scale;
                if (kScaled)
                    both = _mm512_mul_ps(scale, _mm512_set1_ps(group_scale[i * groups + g]));
                total[i][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[i][v]), both, total[i][v]);
            }
        }
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
template <int kFormat>
struct StoredScales {
    const uint8_t* block;
    int64_t stride;
    int first;

    FPC_INLINE_MEMBER F operator()(int64_t g, int v) const {
        return weight_scales<kFormat>(block + g * stride, first + v);
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

template <int kV, int kQ, bool kScaled, class Source, class Scales>
struct GroupTiles {
    const Gemm& gemm;
    const Source& source;
    const uint8_t* weights;
    int64_t stride;
    const Scales& scales;
    int64_t n;

    template <int kM>
    void run(int64_t m) const {
        group_tile<kM, kV, kQ, kScaled>(gemm, source, weights, stride, scales, m, n);
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

template <int kV, int kMost, int kFormat, int kQ, bool kScaled, bool kFetch>
void run_groups(const Gemm& gemm, const Task& task, int first, int64_t begin, int64_t end) {
    typedef FromCodes<kFetch> Source;
    typedef StoredScales<kFormat> Scales;
    const Source source{repeated(gemm.weights.integers)};
    const Layout& layout = gemm.layout;
    const uint8_t* block = gemm.block(task.block);
    const Scales scales{layout.scale_bytes ? block : (const uint8_t*)kOnes,
                        layout.scale_bytes ? layout.group_bytes : 0, first};
    const uint8_t* weights = block + layout.scale_bytes + 64 * first;
    for_tiles<kMost>(begin, end, GroupTiles<kV, kQ, kScaled, Source, Scales>{
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

template <int kFormat, int kQ, bool kScaled>
void int8_groups(const Gemm& gemm, const Task& task, uint8_t*) {
    if (task.end - task.begin == 1 && task.count == 4) {
        run_groups<4, 1, kFormat, kQ, kScaled, true>(gemm, task, 0, task.begin, task.end);
        return;
    }
    const int64_t left = task.end - task.begin, tiles = (left + kRows - 1) / kRows;
    const int64_t then = task.begin + (left + tiles - 1) / tiles;
    for (int first = task.first; first < task.first + task.count; first += 2) {
        run_groups<2, kRows, kFormat, kQ, kScaled, true>(gemm, task, first, task.begin, then);
        run_groups<2, kRows, kFormat, kQ, kScaled, false>(gemm, task, first, then, task.end);
    }
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
                _mm512_store_si512(panel + 64 * v, source.low(codes + 64 * v));
                _mm512_store_si512(panel + kOctet + 64 * v, source.high(codes + 64 * v));
            }
    }
}

void int8_rows_panel(const Gemm& gemm, const Task& task, uint8_t* panel) {
    decode_panel(gemm, task.block, panel);
    const FromPanel source;
    for_tiles<kRows>(task.begin, task.end,
                     RowTiles<4, FromPanel>{gemm, source, panel, task.block * kBlock});
}

template <int kQ, bool kScaled>
void int8_groups_panel(const Gemm& gemm, const Task& task, uint8_t* panel) {
    decode_panel(gemm, task.block, panel);
    const FromPanel source;
    const float* scales = (const float*)(panel + gemm.layout.inputs() * kBlock);
    const int64_t stride = gemm.layout.octets * FromPanel::kStride;
    for (int first = 0; first < 4; first += 2) {
        const PanelScales own{scales + 16 * first};
        for_tiles<kRows>(task.begin, task.end, GroupTiles<2, kQ, kScaled, FromPanel, PanelScales>{
                             gemm, source, panel + 64 * first, stride, own,
                             task.block * kBlock + 16 * first});
    }
}

template <int kQ, bool kScaled>
RunTask groups_of(int32_t format, bool panel) {
    if (panel) return int8_groups_panel<kQ, kScaled>;
    switch (format) {
        case FPC_E8M0: return int8_groups<FPC_E8M0, kQ, kScaled>;
        case FPC_E4M3: return int8_groups<FPC_E4M3, kQ, kScaled>;
        default: return int8_groups<FPC_F32, kQ, kScaled>;
    }
}

Kernels int8_kernels(const Gemm& gemm) {
    const FpcWeights& weights = gemm.weights;
    const int64_t bytes = panel_bytes(gemm), octets = gemm.layout.octets;
    const bool panel = gemm.m >= kPanelRows && bytes <= kPanelBytes;
    RunTask run = panel ? int8_rows_panel : int8_rows;
    if (weights.group) {
        const bool scaled = weights.scaled_inputs;
        const int32_t format = weights.block_scale;
        if (octets == 2) run = scaled ? groups_of<2, true>(format, panel) : groups_of<2, false>(format, panel);
        else if (octets == 4) run = scaled ? groups_of<4, true>(format, panel) : groups_of<4, false>(format, panel);
        else run = scaled ? groups_of<0, true>(format, panel) : groups_of<0, false>(format, panel);
    }
    return {run, panel ? bytes : 0, panel ? kPanelRows : INT64_MAX};
}
