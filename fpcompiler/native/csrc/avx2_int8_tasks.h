// Which tiles of integer products a task consists of. Included by gemm_avx2.cpp only.

constexpr int kNoGroups = -1;        // in place of a number of octets
constexpr int64_t kInt8Octets = 32;  // of a chunk: 8 KiB of codes, 16 KiB decoded

// Tiles of kV vectors of outputs: all of a task for some rows, then all for the next ones.
template <int kV, int kQ, class Dot, class Source>
struct Int8Tiles {
    const Gemm& gemm;
    const Dot& dot;
    Source& source;
    const Chunk& chunk;
    const Groups groups;  // from the block's first output on
    const int64_t begin;  // row
    int32_t* const sums;  // of that row
    const int64_t from, to;  // outputs of the block

    template <int kM>
    void run(int64_t m) const {
        const Prepared& rows = gemm.activations;
        source.begin_rows(rows.a + (m + kM) * rows.stride + chunk.input, rows.stride, kM);
        const int64_t scale_bytes = groups.format == FPC_F32 ? 4 : 1;
        for (int64_t n = from; n < to; n += 8 * kV) {
            int32_t* own = sums + (m - begin) * kBlock + n;
            Groups at = groups;
            at.weights += 4 * n, at.scales += scale_bytes * n;
            source.begin_tile();
            if constexpr (kQ == kNoGroups)
                row_tile<kM, kV>(gemm, dot, source, at.weights, chunk, m, own);
            else
                group_tile<kM, kV, kQ>(gemm, dot, source, at, chunk, m, (float*)own);
        }
    }
};

template <int kMost, int kV, int kQ, class Dot>
FPC_INLINE void add_codes(const Gemm& gemm, const Dot& dot, const Task& task, const Chunk& chunk,
                          int32_t* sums) {
    const Layout& layout = gemm.layout;
    FromCodes source{repeated(gemm.weights.integers), after_scales(chunk, task)};
    const Groups groups{chunk.at + layout.scale_bytes, layout.group_bytes, chunk.at,
                        layout.group_bytes, gemm.weights.block_scale};
    for_tiles<kMost>(task.begin, task.end, Int8Tiles<kV, kQ, Dot, FromCodes>{
                         gemm, dot, source, chunk, groups, task.begin, sums, 16 * task.first,
                         16 * (task.first + task.count)});
}

// As many outputs at a time as registers have room for.
template <int kQ, class Dot>
void int8_few(const Gemm& gemm, const Task& task, uint8_t*) {
    const Dot dot(gemm.weights);
    const int64_t rows = task.end - task.begin;
    few_rows(gemm, task, kInt8Octets, [&](const Chunk& chunk, int32_t* sums) {
        if (rows == 1 && task.count == 4) add_codes<1, 8, kQ>(gemm, dot, task, chunk, sums);
        else if (rows <= 2) add_codes<2, 4, kQ>(gemm, dot, task, chunk, sums);
        else add_codes<kRows, 2, kQ>(gemm, dot, task, chunk, sums);
    });
}

// Decode a chunk: [octets][2][64 outputs][4 inputs].
void decode_integers(const Gemm& gemm, const Chunk& chunk, const Scratch& to) {
    const Layout& layout = gemm.layout;
    const I table = repeated(gemm.weights.integers);
    uint8_t* panel = to.panel;
    const uint8_t* group = chunk.at;
    for (int64_t g = 0; g < chunk.groups; g++, group += layout.group_bytes) {
        if (gemm.weights.group)
            for (int v = 0; v < 8; v++)
                _mm256_storeu_ps(to.scales + kBlock * g + 8 * v,
                                 weight_scales(group, gemm.weights.block_scale, v));
        const uint8_t* octet = group + layout.scale_bytes;
        for (int64_t o = 0; o < chunk.octets; o++, octet += kOctet, panel += 2 * kOctet)
            FPC_UNROLL for (int v = 0; v < 8; v++) {
                const I codes = load(octet + 32 * v);
                _mm256_store_si256((I*)(panel + 32 * v), decode_low(codes, table));
                _mm256_store_si256((I*)(panel + kOctet + 32 * v), decode_high(codes, table));
            }
    }
}

template <int kQ, class Dot>
void int8_many(const Gemm& gemm, const Task& task, uint8_t* memory) {
    const Dot dot(gemm.weights);
    const Scratch scratch(gemm, kInt8Octets, 1, memory);
    const auto decode = [&](const Chunk& chunk) { decode_integers(gemm, chunk, scratch); };
    const auto add = [&](const Chunk& chunk, int64_t begin, int64_t end, int64_t lines) {
        FromPanel source{after(chunk, task), lines, 8 * chunk.groups * chunk.octets};
        const Groups groups{scratch.panel, chunk.octets * FromPanel::kStride,
                            (const uint8_t*)scratch.scales, kBlock * 4, FPC_F32};
        for_tiles<kRows>(begin, end, Int8Tiles<2, kQ, Dot, FromPanel>{
                             gemm, dot, source, chunk, groups, begin, scratch.sums, 0, kBlock});
    };
    many_rows(gemm, task, kInt8Octets, scratch.sums, decode, add);
}

template <int kQ, class Dot>
Kernels int8_tasks(const Gemm& gemm) {
    if (gemm.m <= kRows) return {int8_few<kQ, Dot>, 0};
    return {int8_many<kQ, Dot>, Scratch(gemm, kInt8Octets, 1, nullptr).bytes};
}

template <class Dot>
Kernels int8_kernels(const Gemm& gemm) {
    const int64_t octets = gemm.layout.octets;
    if (!gemm.weights.group) return int8_tasks<kNoGroups, Dot>(gemm);
    if (octets <= Dot(gemm.weights).run) switch (octets) {
        case 2: return int8_tasks<2, Dot>(gemm);
        case 4: return int8_tasks<4, Dot>(gemm);
        default: break;
    }
    return int8_tasks<0, Dot>(gemm);
}
