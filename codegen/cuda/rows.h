// One row of a tensor, as the chunks that a thread has of it.

namespace fpc {

constexpr int kMostThreads = 512;
constexpr int kMostBlocks = 8;  // of a cluster

// Join what is in memory, by all lanes of a warp, in the same order for each. Behind `count` values
// there are others that change nothing: zeros. kMost: a power of two.
template <int kMost, class T, class Join>
FPC_DEVICE T all_of(const T* parts, unsigned count, const Join& join) {
    const unsigned lane = threadIdx.x % kMost;
    T value = lane < count ? parts[lane] : T{};
#pragma unroll
    for (int mask = kMost / 2; mask; mask /= 2) value = join(value, exchange(value, mask));
    return value;
}

// Join a value of each thread of a row, in the same order for each. A row has one warp, all warps
// of a block, or all blocks of a cluster. kTurn: two calls behind each other with the same T take 0
// and 1, as other blocks may still read what they got the last time.
template <bool kSpread, int kTurn, class T, class Join>
FPC_DEVICE T over_row(T value, const Join& join) {
    constexpr int kWarps = kMostThreads / 32;
#pragma unroll
    for (int mask = 16; mask; mask /= 2) value = join(value, exchange(value, mask));
    if (!kSpread && blockDim.x == 32) return value;
    T* const parts = block_memory<T, kWarps + 2 * kMostBlocks>();
    barrier();  // what is there may be in use
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    barrier();
    value = all_of<kWarps>(parts, blockDim.x / 32, join);
    if constexpr (kSpread) {
        T* const of_blocks = parts + kWarps + kTurn * kMostBlocks;
        // A thread for each block that gets it.
        if (threadIdx.x < gridDim.x) store_remote(of_blocks + blockIdx.x, (int)threadIdx.x, value);
        cluster_barrier();
        value = all_of<kMostBlocks>(of_blocks, gridDim.x, join);
    }
    return value;
}

template <bool kSpread, int kTurn>
FPC_DEVICE double sum_over_row(double value) {
    return over_row<kSpread, kTurn>(value, [](double a, double b) { return add(a, b); });
}

// A thread holds kHeld chunks in its registers, or none: the row is too long for that, and chunks
// are read and computed again each time. Two of them are packed, if their type has 16 bits.
// kSpread: the row's threads are those of the blocks along x. kTable: activations are looked up.
template <class P, int kHeld, bool kSpread_ = false, bool kTable = false>
struct Row {
    static constexpr bool kSpread = kSpread_;
    typedef Held<P::kInput, kHeld> Read;
    typedef Held<Producer<P>::kType, kHeld> Produced;
    static constexpr bool kPlain = P::kHead == kNoHead && P::kTail == kNoTail && !P::kHadamard;

    // A row as it lies in memory, so that the next one can be on its way while one is quantized.
    struct Fetched {
        uint32_t words[kHeld ? kHeld : 1][kWordsOf<P::kInput>];
    };

    const FpcQuantizeArguments& a;
    const Producer<P, kTable> producer;
    const int64_t m;
    const int chunks;  // of a row, with those behind its end
    const int first;
    Statistics known;
    Read read;
    Produced produced;

    FPC_DEVICE Row(const FpcQuantizeArguments& arguments, int64_t m, int chunks,
                   const Fetched& fetched, ActivationTable<P> table = {})
        : a(arguments),
          producer(arguments, m, table),
          m(m),
          chunks(chunks),
          first(first_chunk()) {
#pragma unroll
        for (int i = 0; i < kHeld; i++) read.set_words(i, fetched.words[i]);
        if constexpr (kIsNorm<P::kHead>) normalize();
        if constexpr (!kPlain) produce();
    }

    FPC_DEVICE static Fetched fetch(const FpcQuantizeArguments& a, int64_t m) {
        Fetched fetched;
#pragma unroll
        for (int i = 0; i < kHeld; i++) {
            const int chunk = first_chunk() + i * (int)blockDim.x;
            load_words<P::kInput>(address(a, m, chunk), (int)a.k - chunk * kChunk,
                                  fetched.words[i]);
        }
        return fetched;
    }

    FPC_DEVICE static void fetch_to_cache(const FpcQuantizeArguments& a, int64_t m) {
#pragma unroll
        for (int i = 0; i < kHeld; i++) {
            const int chunk = first_chunk() + i * (int)blockDim.x;
            if (chunk * kChunk < a.k) prefetch(address(a, m, chunk));
        }
    }

    // Have what a norm multiplies with in the second cache. It is read when statistics are known, and
    // no kernel writes it: this may come before earlier ones are through.
    FPC_DEVICE static void fetch_weights(const FpcQuantizeArguments& a) {
        if constexpr (kIsNorm<P::kHead> && P::kWeight != kNoType) {
            const unsigned block = kSpread ? blockIdx.x : blockIdx.y;
            const int begin = (int)(block * blockDim.x + threadIdx.x) * kChunk;
            if (begin < a.k) prefetch((const uint8_t*)a.weight + begin * kSizeOf<P::kWeight>);
        }
    }

    // Call `work(chunk, values)` for the values that are quantized: as often in all threads.
    template <class Work>
    FPC_DEVICE void each_chunk(const Work& work) {
        if constexpr (kHeld == 0 || kPlain) {
            each_loaded([&](int chunk, float (&values)[kChunk]) {
                producer.apply(chunk * kChunk, known, values);
                work(chunk, values);
            });
        } else {
#pragma unroll
            for (int i = 0; i < kHeld; i++) {
                float values[kChunk];
                produced.get(i, values);
                work(chunk_of(i), values);
            }
        }
    }

   private:
    FPC_DEVICE void produce() {
#pragma unroll
        for (int i = 0; i < kHeld; i++) {
            float values[kChunk];
            read.get(i, values);
            producer.apply(chunk_of(i) * kChunk, known, values);
            produced.set(i, values);
        }
    }

    FPC_DEVICE static int first_chunk() {
        return (int)((kSpread ? blockIdx.x : blockIdx.y) * blockDim.x + threadIdx.x);
    }

    FPC_DEVICE static const uint8_t* address(const FpcQuantizeArguments& a, int64_t m, int chunk) {
        const int64_t index = m * a.stride + (int64_t)chunk * kChunk;
        return (const uint8_t*)a.x + index * kSizeOf<P::kInput>;
    }

    FPC_DEVICE int chunk_of(int i) const { return first + i * (int)blockDim.x; }

    FPC_DEVICE void load(int chunk, float (&values)[kChunk]) const {
        load_chunk<P::kInput>(address(a, m, chunk), (int)a.k - chunk * kChunk, values);
    }

    template <class Work>
    FPC_DEVICE void each_loaded(const Work& work) const {
        if constexpr (kHeld > 0) {
#pragma unroll
            for (int i = 0; i < kHeld; i++) {
                float values[kChunk];
                read.get(i, values);
                work(chunk_of(i), values);
            }
        } else {
            for (int begin = 0; begin < chunks; begin += (int)blockDim.x) {
                float values[kChunk];
                load(begin + (int)threadIdx.x, values);
                work(begin + (int)threadIdx.x, values);
            }
        }
    }

    // Sums of sixteen are fp32, and sums of those fp64.
    template <int kTurn, class Term>
    FPC_DEVICE float mean_of(const Term& term) {
        double sum = 0;
        each_loaded([&](int chunk, float (&values)[kChunk]) {
            const int count = (int)a.k - chunk * kChunk;
            const auto masked = [&](float x, int i) { return i < count ? term(x) : 0.0f; };
            sum = add(sum, (double)sum_of(values, masked));
        });
        return divide((float)sum_over_row<kSpread, kTurn>(sum), (float)a.k);
    }

    FPC_DEVICE void normalize() {
        if constexpr (P::kHead == kLayerNorm) known.mean = mean_of<0>([](float x) { return x; });
        const float mean = known.mean;
        const float square = mean_of<1>([=](float x) {
            const float centred = P::kHead == kLayerNorm ? subtract(x, mean) : x;
            return multiply(centred, centred);
        });
        known.factor = divide(1.0f, root(add(square, a.eps)));
    }
};

// The largest magnitude in a chunk.
FPC_DEVICE float largest_of(const float (&values)[kChunk]) {
    float largest[kChunk / 2];
#pragma unroll
    for (int i = 0; i < kChunk / 2; i++)
        largest[i] = larger_magnitude(values[i], values[i + kChunk / 2]);
#pragma unroll
    for (int half = kChunk / 4; half; half /= 2)
#pragma unroll
        for (int i = 0; i < half; i++) largest[i] = larger_magnitude(largest[i], largest[i + half]);
    return largest[0];
}

}  // namespace fpc
