// What a task does, whatever it multiplies: block by block of weights, a chunk of inputs at a time.
// Included by gemm_avx2.cpp only.
//
// Registers are too few for a tile over all outputs of a block, so tiles read memory in steps.
// They do so in a chunk that is small enough to stay in the nearest cache; while they run, the next
// chunk is fetched in order: fetching what each tile will read takes twice as long (measured).

constexpr int64_t kMostRows = 256;  // whose sums are kept at a time

// Some inputs of a block: groups of them, or a part of the only one.
struct Chunk {
    const uint8_t* at;  // scales of the first group, or codes where there are no groups
    int64_t bytes;
    int64_t group;      // the first
    int64_t groups;
    int64_t octets;     // of each
    int64_t input;      // the first
};

// Octets of the largest chunk, where so many are wanted.
int64_t chunk_octets(const Gemm& gemm, int64_t wanted) {
    const int64_t octets = gemm.layout.octets;
    return gemm.weights.group && octets > wanted ? octets : wanted;
}

// Call `work(chunk)` for all inputs of a block.
template <class Work>
FPC_INLINE void for_chunks(const Gemm& gemm, int64_t block, int64_t wanted, const Work& work) {
    const Layout& layout = gemm.layout;
    const uint8_t* at = gemm.block(block);
    if (!gemm.weights.group) {
        for (int64_t o = 0; o < layout.octets; o += wanted) {
            const int64_t left = layout.octets - o, octets = left < wanted ? left : wanted;
            work(Chunk{at + o * kOctet, octets * kOctet, 0, 1, octets, 8 * o});
        }
        return;
    }
    const int64_t most = chunk_octets(gemm, wanted) / layout.octets;
    for (int64_t g = 0; g < layout.groups; g += most) {
        const int64_t left = layout.groups - g, groups = left < most ? left : most;
        work(Chunk{at + g * layout.group_bytes, groups * layout.group_bytes, g, groups,
                   layout.octets, 8 * g * layout.octets});
    }
}

// What is fetched next, in lines of 64 bytes.
struct Ahead {
    const uint8_t* next;

    FPC_INLINE_MEMBER void lines(int64_t count) {
        for (int64_t i = 0; i < count; i++, next += 64)
            _mm_prefetch((const char*)next, _MM_HINT_T0);
    }
};

// Where a task begins to fetch the next chunk; two tasks that share a block fetch half of it each.
FPC_INLINE Ahead after(const Chunk& chunk, const Task& task) {
    return {chunk.at + chunk.bytes + chunk.bytes * task.first / 4};
}

// The same, as many lines on as there are of scales: tiles fetch a line for each line of codes.
FPC_INLINE Ahead after_scales(const Chunk& chunk, const Task& task) {
    Ahead ahead = after(chunk, task);
    ahead.lines((chunk.bytes - chunk.groups * chunk.octets * kOctet) / 64);
    return ahead;
}

// Rows of kBlock sums: int32 for products of integers without groups, fp32 for all others.
bool sums_integers(const Gemm& gemm) {
    return gemm.weights.arithmetic == FPC_INT8 && !gemm.weights.group;
}

void start_sums(const Gemm& gemm, int64_t begin, int64_t end, int32_t* sums) {
    for (int64_t m = begin; m < end; m++, sums += kBlock) {
        const int32_t start = sums_integers(gemm) ? gemm.activations.correction[m] : 0;
        for (int64_t j = 0; j < kBlock; j++) sums[j] = start;
    }
}

void finish_sums(const Gemm& gemm, const Task& task, int64_t begin, int64_t end,
                 const int32_t* sums) {
    const bool integers = sums_integers(gemm);
    const F unit = _mm256_set1_ps(gemm.weights.unit * scale_unit(gemm.weights));
    for (int64_t m = begin; m < end; m++, sums += kBlock)
        for (int64_t n = 16 * task.first; n < 16 * (task.first + task.count); n += 8) {
            const I sum = load(sums + n);
            const F value = integers ? _mm256_cvtepi32_ps(sum) : _mm256_castsi256_ps(sum);
            finish(gemm, m, task.block * kBlock + n, _mm256_mul_ps(value, unit));
        }
}

// At most kRows rows: `add(chunk, sums)` decodes codes itself.
template <class Add>
FPC_INLINE void few_rows(const Gemm& gemm, const Task& task, int64_t octets, const Add& add) {
    alignas(32) int32_t sums[kRows * kBlock];
    start_sums(gemm, task.begin, task.end, sums);
    for_chunks(gemm, task.block, octets, [&](const Chunk& chunk) { add(chunk, sums); });
    finish_sums(gemm, task, task.begin, task.end, sums);
}

// Memory for many rows: sums, a chunk that is decoded, and the scales of its groups as fp32.
struct Scratch {
    int32_t* sums;
    uint8_t* panel;
    float* scales;
    int64_t bytes;

    Scratch(const Gemm& gemm, int64_t wanted, int64_t input_bytes, uint8_t* memory) {
        const int64_t octets = chunk_octets(gemm, wanted);
        sums = (int32_t*)memory;
        panel = memory + kMostRows * kBlock * 4;
        scales = (float*)(panel + octets * 8 * kBlock * input_bytes);
        const int64_t groups = gemm.weights.group ? octets / gemm.layout.octets : 0;
        bytes = (uint8_t*)(scales + groups * kBlock) - memory;
    }
};

// Any number of rows: `decode(chunk)` and then `add(chunk, begin, end, lines)`, each of whose tiles
// fetches so many lines.
template <class Decode, class Add>
FPC_INLINE void many_rows(const Gemm& gemm, const Task& task, int64_t octets, int32_t* sums,
                          const Decode& decode, const Add& add) {
    for (int64_t begin = task.begin; begin < task.end; begin += kMostRows) {
        const int64_t end = begin + kMostRows < task.end ? begin + kMostRows : task.end;
        const int64_t tiles = 4 * ((end - begin + kRows - 1) / kRows);
        start_sums(gemm, begin, end, sums);
        for_chunks(gemm, task.block, octets, [&](const Chunk& chunk) {
            decode(chunk);
            add(chunk, begin, end, round_up(chunk.bytes / tiles, 64) / 64);
        });
        finish_sums(gemm, task, begin, end, sums);
    }
}
