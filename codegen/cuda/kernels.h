// The kernels of a problem, and how they are launched.
//
// Where nothing need be known of a whole row, a thread has one chunk, and a row as many blocks of
// threads as it takes. Otherwise a row has one warp or one block of threads, which hold it in
// registers, a chunk or two each. Longer rows are read again for each step, from the cache: with
// more chunks in its registers a block would have a multiprocessor to itself, and none would load
// meanwhile. A few long rows leave most multiprocessors idle, and one takes its time to compute a row:
// blocks of a cluster share it then.

namespace fpc {

// Norms need registers for what they multiply with, and their rows are seldom so long.
template <class P>
constexpr bool kHoldsTwo = !kIsNorm<P::kHead>;

// With so many rows or fewer, time goes by in waiting for memory.
constexpr int kFewRows = 16;

// Threads of a block: fewer have more registers.
template <int kHeld>
constexpr int kMost = kHeld == 2 ? 448 : kMostThreads;

template <class P>
constexpr bool kNeedsRow = kIsNorm<P::kHead> || P::kOuter == kPerRow;

// Whether activations of many rows are looked up.
template <class P>
constexpr bool kLooksUp = kNeedsRow<P> && !P::kSwizzled && ActivationTable<P>::kPossible;

// Whether blocks stay for other rows without a table: the next one is on its way while one is
// quantized. Threads with one chunk are better off with fewer registers, and what computes values has
// none for it.
template <class P, int kHeld>
constexpr bool kStays =
    kNeedsRow<P> && !P::kSwizzled && kHeld == 2 && Row<P, kHeld>::kPlain;

// With so many rows threads take two chunks where they can: what is done once for each thread,
// reductions above all, takes as long as the values of a chunk.
constexpr int64_t kManyRows = 1024;
constexpr int kShortRow = 128;  // in chunks

// Chunks of a row, with those that are zeros behind its end.
template <class P>
__host__ __device__ inline int chunks_of(const FpcQuantizeArguments& a) {
    constexpr int kBytes = kChunk * P::kCodeBits / 8;
    const int of_codes = (int)((a.pitch + kBytes - 1) / kBytes);
    if constexpr (P::kSwizzled) {
        // Four scales of an atom belong together.
        const int of_scales = ((int)a.scale_pitch + 3) / 4 * (4 * P::kBlock / kChunk);
        return of_codes > of_scales ? of_codes : of_scales;
    }
    return of_codes;
}

// The largest magnitude of a row, in all of its threads.
template <class Row>
FPC_DEVICE float amax_of_row(Row& row) {
    float amax = 0;
    row.each_chunk([&](int, float (&values)[kChunk]) {
        amax = larger_magnitude(amax, largest_of(values));
    });
    return over_row<Row::kSpread, 0>(amax,
                                     [](float x, float y) { return larger_magnitude(x, y); });
}

// That of a tensor of a few rows, which every block finds for itself.
template <class P, int kHeld>
FPC_DEVICE float amax_of_rows(const FpcQuantizeArguments& a, int chunks) {
    float amax = 0;
#pragma unroll 1
    for (int64_t m = 0; m < a.m; m++) {
        typedef Row<P, kHeld> Row;
        Row row(a, m, chunks, Row::fetch(a, m));
        amax = larger_magnitude(amax, amax_of_row(row));
    }
    return amax;
}

template <class P, int kHeld, class Row>
FPC_DEVICE void quantize_row(Row& row) {
    const FpcQuantizeArguments& a = row.a;
    const int64_t m = row.m;
    float outer = 1;
    if constexpr (P::kOuter == kPerRow) {
        const float amax = amax_of_row(row);
        outer = real_scale<P>(amax);
        if (row.first == 0) a.outer_scale[m] = outer;
        if (row.first == 0 && bits_of(amax) >= kExponentMask) *a.status = 1;
    } else if constexpr (P::kOuter == kPerTensor) {
        if constexpr (P::kGiven)
            outer = *a.outer_scale;
        else if (a.amax)
            outer = real_scale<P>(float_of(*a.amax));
        else
            outer = real_scale<P>(a.m == 1 ? amax_of_row(row)
                                           : amax_of_rows<P, kHeld>(a, row.chunks));
        if (!P::kGiven && m == 0 && row.first == 0) *a.outer_scale = outer;
    }
    const Encoder<P> encoder{a, m, outer};
    int32_t sum = 0;
    row.each_chunk([&](int chunk, float (&values)[kChunk]) {
        sum += encoder.encode(chunk, values);
    });
    if constexpr (P::kStored == kIntegers) {
        sum = over_row<Row::kSpread, 0>(sum, [](int32_t x, int32_t y) { return x + y; });
        if (row.first == 0) ((int32_t*)a.outer_scale)[a.m + m] = sum;
    }
}

template <class P, int kHeld, bool kSpread = false, bool kTable = false>
__global__ void __launch_bounds__(kMost<kHeld>, 2)
quantize_rows(const __grid_constant__ FpcQuantizeArguments a) {
    typedef Row<P, kHeld, kSpread, kTable> Row;
    ActivationTable<P> table{};
    if constexpr (kTable) table = table.made();
    if (a.m <= kFewRows) Row::fetch_weights(a);
    if constexpr (kSpread) cluster_arrive();
    follow();
    if constexpr (kSpread) cluster_wait();  // all blocks run, and may be written to
    // Rows are counted in 32 bits.
    int m = (int)(kSpread ? blockIdx.y : blockIdx.x * blockDim.y + threadIdx.y);
    constexpr bool stays = kStays<P, kHeld> && !kSpread;
    const int step = (int)(gridDim.x * blockDim.y);
    const int chunks = chunks_of<P>(a);
    if constexpr (P::kSwizzled) {
        if (m >= a.m) {
            const Encoder<P> encoder{a, m, 1.0f};
            const int stride = (int)(blockDim.x * gridDim.y);
            int chunk = (int)(blockIdx.y * blockDim.x + threadIdx.x);
            for (; chunk < chunks && m < (a.m + 127) / 128 * 128; chunk += stride)
                encoder.clear_scales(chunk);
        }
    }
    if (m >= a.m) return;
    if constexpr (kTable) {
        for (; m < a.m; m += step) {
            // Where values are made, no registers are left for those of the next row.
            if (m + step < a.m) Row::fetch_to_cache(a, m + step);
            Row row(a, m, chunks, Row::fetch(a, m), table);
            quantize_row<P, kHeld>(row);
        }
        return;
    }
    auto next = Row::fetch(a, m);
    do {
        const auto fetched = next;
        if (stays && m + step < a.m) next = Row::fetch(a, m + step);
        Row row(a, m, chunks, fetched);
        quantize_row<P, kHeld>(row);
    } while (stays && (m += step) < a.m);
}

// The largest magnitude of a tensor, as its bits: they compare like the numbers.
template <class P, int kHeld>
__global__ void __launch_bounds__(kMost<kHeld>, 2)
find_amax(const __grid_constant__ FpcQuantizeArguments a) {
    follow();
    const int64_t m = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (m >= a.m) return;
    typedef Row<P, kHeld> Row;
    Row row(a, m, chunks_of<P>(a), Row::fetch(a, m));
    const float amax = amax_of_row(row);
    if (threadIdx.x == 0) store_larger(a.amax, bits_of(amax));
}

// Threads and blocks for rows of some chunks.
struct Shape {
    dim3 grid, block;

    // One warp or one block of threads for a row, each thread with as many chunks.
    static Shape whole_rows(int64_t rows, int chunks, int least = 1) {
        const int needed = (chunks + kMostThreads - 1) / kMostThreads;
        const int each = needed < least ? least : needed;
        const int threads = ((chunks + each - 1) / each + 31) / 32 * 32;
        const int together = threads == 32 ? 4 : 1;
        return {dim3((unsigned)((rows + together - 1) / together)),
                dim3((unsigned)threads, (unsigned)together)};
    }

    // Launch no more blocks than run at once, with the registers of kernels that hold two chunks and
    // memory for a few tables: they take one row after another.
    void stay() {
        constexpr unsigned kTables = 8;
        const unsigned of_one = 2 * kMost<2> / (block.x * block.y);
        const unsigned together = multiprocessors() * (of_one < kTables ? of_one : kTables);
        if (together == 0) return;  // CUDA did not say
        const unsigned turns = (grid.x + together - 1) / together;
        grid.x = (grid.x + turns - 1) / turns;
    }

    // A cluster of blocks for a row.
    static Shape spread(int64_t rows, int chunks) {
        constexpr int kBlocks = kMostBlocks, kThreads = 128;  // at most; at least, but for the last
        const int wanted = (chunks + kThreads - 1) / kThreads;
        const int blocks = wanted < kBlocks ? wanted : kBlocks;
        const int threads = ((chunks + blocks - 1) / blocks + 31) / 32 * 32;
        return {dim3((unsigned)blocks, (unsigned)rows), dim3((unsigned)threads)};
    }

    static Shape tiles(int64_t rows, int chunks) {
        const int most = 256, threads = chunks >= most ? most : (chunks + 31) / 32 * 32;
        const int together = rows == 1 ? 1 : most / threads;
        return {dim3((unsigned)((rows + together - 1) / together),
                     (unsigned)((chunks + threads - 1) / threads)),
                dim3((unsigned)threads, (unsigned)together)};
    }
};

template <class P>
int32_t launch_amax(const FpcQuantizeArguments& a, int chunks, void* stream) {
    const int32_t failed = set_zero(a.amax, sizeof(int32_t), stream);
    if (failed) return failed;
    const Shape shape = Shape::whole_rows(a.m, chunks);
    const auto start = [&](auto kernel) {
        return launch(kernel, shape.grid, shape.block, a, stream, false);
    };
    if (chunks <= kMost<1>) return start(find_amax<P, 1>);
    if constexpr (kHoldsTwo<P>)
        if (chunks <= 2 * kMost<2>) return start(find_amax<P, 2>);
    return start(find_amax<P, 0>);
}

// Whether blocks find the largest magnitude of the tensor themselves. Each goes through all rows, one
// after the other: on an H200 0.5 us for a row, and 1 us more for each 570 chunks of it. Launches that
// clear and find it take 5.6 us.
template <class P>
bool is_small(const FpcQuantizeArguments& a, int chunks) {
    constexpr int kMicrosecond = 570, kLongest = (1 << 16) / kChunk;
    if (a.m == 1) return chunks <= kLongest;
    return a.m * (kMicrosecond / 2 + chunks) <= (int64_t)(5.6 * kMicrosecond);
}

// Whether clusters quantize rows: few ones, each of them long.
template <class P>
constexpr bool kSpreads =
    FPC_FOLLOWS && kNeedsRow<P> && !P::kSwizzled && P::kOuter != kPerTensor;

inline bool is_spread(int64_t rows, int chunks) {
    constexpr int kShort = 256, kLong = 8 * kMost<1>;  // of chunks
    return rows <= kFewRows && chunks > kShort && chunks <= kLong;
}

template <class P>
int32_t launch_rows(const FpcQuantizeArguments& a, int64_t rows, int chunks, void* stream) {
    if constexpr (kSpreads<P>) {
        const Shape shape = Shape::spread(rows, chunks);
        if (is_spread(rows, chunks))
            return launch(quantize_rows<P, 1, true>, shape.grid, shape.block, a, stream, true,
                          shape.grid.x);
    }
    if constexpr (kLooksUp<P>) {
        Shape shape = Shape::whole_rows(rows, chunks, 2);
        shape.stay();
        // Each block computes its table.
        const int64_t least = (int64_t)shape.grid.x * 2 * ActivationTable<P>::kSize;
        if (chunks <= 2 * kMost<2> && rows * chunks * kChunk >= least) {
            const auto kernel = quantize_rows<P, 2, false, true>;
            return launch(kernel, shape.grid, shape.block, a, stream);
        }
    }
    if constexpr (kHoldsTwo<P>) {
        const bool many = rows >= kManyRows && chunks >= kShortRow;
        if (chunks <= 2 * kMost<2> && (many || chunks > kMost<1>)) {
            Shape shape = Shape::whole_rows(rows, chunks, 2);
            if (kStays<P, 2>) shape.stay();
            return launch(quantize_rows<P, 2>, shape.grid, shape.block, a, stream);
        }
    }
    const Shape shape = Shape::whole_rows(rows, chunks);
    const auto kernel = chunks <= kMost<1> ? quantize_rows<P, 1> : quantize_rows<P, 0>;
    return launch(kernel, shape.grid, shape.block, a, stream);
}

template <class P>
bool is_possible(const FpcQuantizeArguments& a) {
    // Beyond that a grid would have too many blocks, and sums of integers too many bits.
    constexpr int64_t kMostRows = 1 << 30, kLongest = P::kStored == kIntegers ? 1 << 24 : 1 << 26;
    const int64_t needed = (a.k * P::kCodeBits + 7) / 8;
    if (a.m < 0 || a.m > kMostRows || a.k < 1 || a.k > kLongest) return false;
    if (a.pitch < needed || a.pitch > kLongest) return false;
    if constexpr (P::kBlock != 0 && P::kStored != kProducts) {
        const int64_t scales = (a.k + P::kBlock - 1) / P::kBlock;
        if (a.scale_pitch < scales || a.scale_pitch > kLongest) return false;
    }
    if constexpr (P::kHadamard != 0)
        if (a.k % P::kHadamard) return false;
    return a.scale.repeat >= 1 && a.shift.repeat >= 1;
}

template <class P>
int32_t quantize(FpcQuantizeArguments a, void* stream) {
    if (!is_possible<P>(a)) return FPC_REFUSED;
    if (a.m == 0) return FPC_LAUNCHED;
    const int chunks = chunks_of<P>(a);
    const int64_t rows = P::kSwizzled ? (a.m + 127) / 128 * 128 : a.m;
    // Rows are counted in 32 bits.
    if (a.scale.repeat > a.m) a.scale.repeat = a.m;
    if (a.shift.repeat > a.m) a.shift.repeat = a.m;
    if constexpr (P::kOuter == kPerTensor && !P::kGiven) {
        if (is_small<P>(a, chunks)) {
            a.amax = nullptr;
            return launch_rows<P>(a, rows, chunks, stream);
        }
        const int32_t failed = launch_amax<P>(a, chunks, stream);
        if (failed) return failed;
    }
    if constexpr (kNeedsRow<P>) return launch_rows<P>(a, rows, chunks, stream);
    const Shape shape = Shape::tiles(rows, chunks);
    return launch(quantize_rows<P, 1>, shape.grid, shape.block, a, stream);
}

}  // namespace fpc
