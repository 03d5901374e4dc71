// Which tiles of integer products a task consists of. Included by gemm_avx2.cpp only.

constexpr int kNoGroups = -1;    // in place of a number of octets
constexpr int64_t kOctets = 128;  // of a chunk: 8 KiB of codes, 16 KiB decoded

// Tiles of kV vectors of outputs, for one row of activations after the other.
template <int kV, int kQ, class Dot, class Source>
struct Tiles {
    const Gemm& gemm;
    const Dot& dot;
    const Source& source;
    const Chunk& chunk;
    Groups groups;
    int64_t begin;  // row
    int32_t* sums;  // of that row

    template <int kM>
    void run(int64_t m) const {
        int32_t* own = sums + (m - begin) * kBlock;
        if constexpr (kQ == kNoGroups)
            row_tile<kM, kV>(gemm, dot, source, groups.weights, chunk, m, own);
        else
            group_tile<kM, kV, kQ>(gemm, dot, source, groups, chunk, m, (float*)own);
    }
};

// Sums that are zero, or where there is nothing else to start from them, corrections.
void start_sums(const Gemm& gemm, int64_t begin, int64_t end, int32_t* sums) {
    for (int64_t m = begin; m < end; m++, sums += kBlock) {
        const int32_t start = gemm.weights.group ? 0 : gemm.activations.correction[m];
        for (int64_t j = 0; j < kBlock; j++) sums[j] = start;
    }
}

void finish_sums(const Gemm& gemm, const Task& task, int64_t begin, int64_t end, const int32_t* sums) {
    const bool reals = gemm.weights.group != 0;
    const F unit = _mm256_set1_ps(gemm.weights.unit * scale_unit(gemm.weights));
    for (int64_t m = begin; m < end; m++, sums += kBlock)
        for (int64_t n = 16 * task.first; n < 16 * (task.first + task.count); n += 8) {
            const I sum = load(sums + n);
            const F value = reals ? _mm256_castsi256_ps(sum) : _mm256_cvtepi32_ps(sum);
            finish(gemm, m, task.block * kBlock + n, _mm256_mul_ps(value, unit));
        }
}

// --- few rows: codes are decoded by the tiles -------------------------------------------------

template <int kMost, int kV, int kQ, class Dot>
FPC_INLINE void add_codes(const Gemm& gemm, const Dot& dot, const Task& task, const Chunk& chunk,
                          int32_t* sums) {
    const Layout& layout = gemm.layout;
    const int32_t format = gemm.weights.block_scale;
    const FromCodes source{repeated(gemm.weights.integers)};
    for (int64_t n = 16 * task.first; n < 16 * (task.first + task.count); n += 8 * kV) {
        const Groups groups{chunk.at + layout.scale_bytes + 4 * n, layout.group_bytes,
                            chunk.at + n * (format == FPC_F32 ? 4 : 1), layout.group_bytes, format};
        for_tiles<kMost>(task.begin, task.end, Tiles<kV, kQ, Dot, FromCodes>{
                             gemm, dot, source, chunk, groups, task.begin, sums + n});
    }
}

template <int kQ, class Dot>
void int8_few(const Gemm& gemm, const Task& task, uint8_t*) {
    alignas(32) int32_t sums[kRows * kBlock];
    const Dot dot(gemm.weights);
    const int64_t rows = task.end - task.begin;
    start_sums(gemm, task.begin, task.end, sums);
    // One row reads memory once and in order anyway.
    for_chunks(gemm, task.block, rows == 1 ? INT64_MAX : kOctets, [&](const Chunk& chunk) {
        if (rows == 1 && task.count == 4) add_codes<1, 8, kQ>(gemm, dot, task, chunk, sums);
        else if (rows <= 2) add_codes<2, 4, kQ>(gemm, dot, task, chunk, sums);
        else add_codes<kRows, 2, kQ>(gemm, dot, task, chunk, sums);
    });
    finish_sums(gemm, task, task.begin, task.end, sums);
}

// --- many rows: chunks are decoded before -----------------------------------------------------

// Memory for sums, for a decoded chunk and for its scales as fp32.
struct Scratch {
    int32_t* sums;
    uint8_t* panel;
    float* scales;
    int64_t bytes;

    Scratch(const Gemm& gemm, uint8_t* memory) {
        const int64_t rows = gemm.m < kMostRows ? gemm.m : kMostRows;
        const int64_t octets = chunk_octets(gemm, kOctets);
        sums = (int32_t*)memory;
        panel = memory + rows * kBlock * 4;
        scales = (float*)(panel + octets * 2 * kOctet);
        bytes = (uint8_t*)(scales + octets / gemm.layout.octets * kBlock) - memory;
    }
};

// Decode a chunk: [octets][2][64 outputs][4 inputs].
void decode(const Gemm& gemm, const Chunk& chunk, const Scratch& to) {
    const Layout& layout = gemm.layout;
    const FromCodes source{repeated(gemm.weights.integers)};
    uint8_t* panel = to.panel;
    const uint8_t* group = chunk.at;
    for (int64_t g = 0; g < chunk.groups; g++, group += layout.group_bytes) {
        if (gemm.weights.group)
            for (int v = 0; v < 8; v++)
                _mm256_store_ps(to.scales + kBlock * g + 8 * v,
                                weight_scales(group, gemm.weights.block_scale, v));
        const uint8_t* octet = group + layout.scale_bytes;
        for (int64_t o = 0; o < chunk.octets; o++, octet += kOctet, panel += 2 * kOctet)
            FPC_UNROLL for (int v = 0; v < 8; v++) {
                if (v % 2 == 0) source.ahead(octet + 32 * v);
                _mm256_store_si256((I*)(panel + 32 * v), source.low(octet + 32 * v));
                _mm256_store_si256((I*)(panel + kOctet + 32 * v), source.high(octet + 32 * v));
            }
    }
}

template <int kQ, class Dot>
void int8_many(const Gemm& gemm, const Task& task, uint8_t* memory) {
    const Dot dot(gemm.weights);
    const FromPanel source;
    const Scratch scratch(gemm, memory);
    for (int64_t begin = task.begin; begin < task.end; begin += kMostRows) {
        const int64_t end = begin + kMostRows < task.end ? begin + kMostRows : task.end;
        start_sums(gemm, begin, end, scratch.sums);
        for_chunks(gemm, task.block, kOctets, [&](const Chunk& chunk) {
            decode(gemm, chunk, scratch);
            for (int64_t n = 0; n < kBlock; n += 16) {
                const Groups groups{scratch.panel + 4 * n, chunk.octets * FromPanel::kStride,
                                    (const uint8_t*)(scratch.scales + n), kBlock * 4, FPC_F32};
                for_tiles<kRows>(begin, end, Tiles<2, kQ, Dot, FromPanel>{
                                     gemm, dot, source, chunk, groups, begin, scratch.sums + n});
            }
        });
        finish_sums(gemm, task, begin, end, scratch.sums);
    }
}

// --- choice of a kernel -----------------------------------------------------------------------

template <int kQ, class Dot>
Kernels int8_tasks(const Gemm& gemm) {
    if (gemm.m <= kRows) return {int8_few<kQ, Dot>, 0};
    return {int8_many<kQ, Dot>, Scratch(gemm, nullptr).bytes};
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
