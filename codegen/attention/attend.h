// Attention of a few queries over many keys: softmax(Q K^T * scale) V, as a decoder runs it for each
// token. Reading keys and values bounds the speed.
//
// A cluster has one head of keys and values and all queries that read it, at most 16 rows. Its warps
// take steps of 16 keys in turn, and each keeps a softmax of its own (T. Dao et al.,
// "FlashAttention", 2022); at the end those of a block are joined, then those of the cluster. The
// order of all sums depends on sizes and on the GPU only.

#include <atomic>

namespace fpc {

constexpr int kMostSplit = 16;  // blocks of a cluster

// A row's number joined from several parts, with the largest product and the total behind it.
struct Joined {
    float sum = 0, largest = kMinusInfinity, total = 0;
};

// `largest`, `total` and `sum` give those of a part. All are read before one is used.
template <int kMostParts, class Largest, class Total, class Sum>
FPC_DEVICE Joined joined(int parts, const Largest& largest, const Total& total, const Sum& sum) {
    Joined result;
    float largests[kMostParts], totals[kMostParts], sums[kMostParts];
#pragma unroll
    for (int i = 0; i < kMostParts; i++) {
        largests[i] = i < parts ? largest(i) : kMinusInfinity;
        totals[i] = i < parts ? total(i) : 0;
        sums[i] = i < parts ? sum(i) : 0;
    }
#pragma unroll
    for (int i = 0; i < kMostParts; i++) result.largest = larger_number(result.largest, largests[i]);
    const float base = result.largest == kMinusInfinity ? 0 : result.largest;
#pragma unroll
    for (int i = 0; i < kMostParts; i++) {
        const float factor = power_of_two(subtract(largests[i], base));
        result.total = fused(factor, totals[i], result.total);
        result.sum = fused(factor, sums[i], result.sum);
    }
    return result;
}

template <class P, int kQueryTiles>
FPC_DEVICE void store_result(const AttendSteps<P, kQueryTiles>& work, int row, int channel,
                             const Joined& found) {
    const FpcAttendArguments& a = work.a;
    const float value = found.total == 0 ? 0 : divide(found.sum, found.total);
    const int64_t at = (work.batch * a.queries + work.query_of(row)) * a.heads + work.head_of(row);
    ((uint16_t*)a.y)[at * P::kWidth + channel] = (uint16_t)pair_in<P::kType>(value, 0);
}

template <class P, int kQueryTiles>
__global__ void __launch_bounds__(kAttendThreads, 2)
attend(const __grid_constant__ FpcAttendArguments a) {
    using Steps = AttendSteps<P, kQueryTiles>;
    constexpr int kWidth = P::kWidth, kOfWarps = kAttendWarps * Steps::kFloats;
    constexpr int kOfBlocks = kMostRows * kWidth, kStatistics = kMostSplit * 2 * kMostRows;
    float* const memory = block_memory<float, kOfWarps + kOfBlocks + kStatistics>();
    const int rank = (int)blockIdx.x, split = (int)gridDim.x;
    if (split > 1) cluster_arrive();
    follow();
    const Steps work(a);
    Partial<kWidth, kQueryTiles> own;
    work.add_steps(own, split, rank);
    work.store(own, memory + work.warp * Steps::kFloats);
    barrier();

    // Each block has a share of the numbers, and gets from all others what they have of it.
    const int numbers = work.rows * kWidth, share = numbers / split;
    float* const parts = memory + kOfWarps;          // [split][share]
    float* const statistics = parts + kOfBlocks;     // [split][2][kMostRows]: largest, totals
    if (split > 1) cluster_wait();                   // all blocks run, and may be written to
    for (int i = (int)threadIdx.x; i < numbers; i += kAttendThreads) {
        const int row = i / kWidth, channel = i % kWidth;
        const auto of_warp = [&](int at) {
            return [=](int part) { return memory[part * Steps::kFloats + at]; };
        };
        const Joined found =
            joined<kAttendWarps>(kAttendWarps, of_warp(Steps::kLargest + row),
                                 of_warp(Steps::kTotal + row), of_warp(row * Steps::kRow + channel));
        if (split == 1) {
            store_result<P, kQueryTiles>(work, row, channel, found);
            continue;
        }
        const int owner = i / share, within = i % share;
        store_remote(parts + rank * share + within, owner, found.sum);
        if (within && channel) continue;  // the first number of a row that the owner has
        float* const to = statistics + rank * 2 * kMostRows + row;
        store_remote(to, owner, found.largest);
        store_remote(to + kMostRows, owner, found.total);
    }
    if (split == 1) return;
    cluster_barrier();
    for (int i = (int)threadIdx.x; i < share; i += kAttendThreads) {
        const int number = rank * share + i, row = number / kWidth;
        const float* const from = statistics + row;
        const Joined found = joined<kMostSplit>(
            split, [=](int part) { return from[part * 2 * kMostRows]; },
            [=](int part) { return from[part * 2 * kMostRows + kMostRows]; },
            [=](int part) { return parts[part * share + i]; });
        store_result<P, kQueryTiles>(work, row, number % kWidth, found);
    }
}

// Clusters of 2, 4, 8 and 16 blocks that run at once. Blocks of one are close to each other, so that
// not all multiprocessors can have some.
struct Widest {
    uint16_t clusters[4];
};

// Those of a kernel on the current device. It is asked once for each; what is allowed there stays so.
// A parameter of the template, since kernels that differ have the same type.
template <auto kKernel>
Widest widest_here() {
    constexpr int kDevices = 64;
    static std::atomic<uint64_t> known[kDevices];  // 0: not yet
    const int device = current_device();
    const bool kept = device >= 0 && device < kDevices;
    uint64_t bits = kept ? known[device].load() : 0;
    Widest found;
    static_assert(sizeof found == sizeof bits, "");
    memcpy(&found, &bits, sizeof bits);
    if (bits) return found;
    for (int i = 0; i < 4; i++)
        found.clusters[i] = (uint16_t)most_clusters(kKernel, dim3(kAttendThreads), 2u << i);
    memcpy(&bits, &found, sizeof bits);
    if (kept) known[device].store(bits);
    return found;
}

// How many blocks share the keys: as many as run at once, two to an SM, if each warp has a step.
inline int split_of(const FpcAttendArguments& a, const Widest& widest) {
    const int64_t steps = (a.keys + kStepKeys - 1) / kStepKeys, heads = (int64_t)a.batch * a.groups;
    int split = 1;
    for (int i = 0; 2 * split <= kMostSplit; i++) {
        if (2 * split * kAttendWarps > steps || 2 * split * heads > 2 * a.sm_count) break;
        if (heads > widest.clusters[i]) break;
        split *= 2;
    }
    return split;
}

// Whether rows begin where they are loaded in pieces of `bytes`, 8 numbers each.
inline bool in_pieces(const void* address, const int64_t (&strides)[3], int bytes) {
    return (uintptr_t)address % bytes == 0 && strides[0] % 8 == 0 && strides[1] % 8 == 0 &&
           strides[2] % 8 == 0;
}

template <class P, int kQueryTiles>
int32_t launch_attend(const FpcAttendArguments& a, void* stream) {
    constexpr auto kKernel = attend<P, kQueryTiles>;
    const dim3 grid((unsigned)split_of(a, widest_here<kKernel>()),
                    (unsigned)(a.batch * a.groups));
    return launch(kKernel, grid, dim3(kAttendThreads), a, stream, true, grid.x);
}

template <class P>
int32_t launch_attend(const FpcAttendArguments& a, void* stream) {
    constexpr int64_t kMostHeads = 65535;
    const bool sizes = a.batch > 0 && a.groups > 0 && a.heads > 0 && a.queries > 0 && a.keys > 0;
    if (!sizes || a.heads % a.groups) return FPC_ATTEND_REFUSED;
    const int64_t rows = (int64_t)a.heads / a.groups * a.queries;
    if (rows > kMostRows || (int64_t)a.batch * a.groups > kMostHeads) return FPC_ATTEND_REFUSED;
    constexpr int kPiece = P::kCodes ? 8 : 16;
    if (!in_pieces(a.q, a.q_strides, 16) || !in_pieces(a.k, a.k_strides, kPiece) ||
        !in_pieces(a.v, a.v_strides, kPiece))
        return FPC_ATTEND_REFUSED;
    if (P::kCodes && !(a.k_scales && a.v_scales)) return FPC_ATTEND_REFUSED;
    return rows <= kTileQueries ? launch_attend<P, 1>(a, stream) : launch_attend<P, 2>(a, stream);
}

}  // namespace fpc
