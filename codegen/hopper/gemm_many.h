// GEMM of packed weights for many tokens: D^T = W X^T by the tensor cores of Hopper, W in
// registers, where its codes are decoded, and X in shared memory.
//
// A block has one thread that copies and one or two warpgroups that multiply; they share a ring of
// slots in shared memory, each with 128 bytes of each token's K of a tile of X and with that K of a
// tile of W. Blocks stay and take one tile after another. Blocks of a cluster share a tile and have
// a part of K each. A result of floating point depends on how K is divided, and on no other choice.

namespace fpc {

template <class P, class T>
FPC_DEVICE void multiply_tiles(const ManyParameters& p, uint32_t shared, int rank, int group) {
    using L = ManyLayout<P, T>;
    const int thread = (int)threadIdx.x % kGroupThreads, warp = same_in_warp(thread / 32);
    const int lane = thread % 32, tiles = p.row_tiles * p.token_tiles;
    const uint32_t of_tokens = shared + L::kFactorsAt + group * (L::kOfTokens + L::kOfRows);
    const uint32_t of_rows = of_tokens + L::kOfTokens;
    Multiplier<P, T> by{shared, group, warp, lane};
    Staging<P, T> staging{shared + L::kStagedAt + group * 2 * kStagedBytes, group + 1, warp, lane};
    wait_for_inputs();
    for (int tile = first_tile<T>(); tile < tiles; tile = next_tile<T>(tile)) {
        const Work<P, T> work(p, tile, rank);
        const int row = work.row + group * 64;
        const Scales<P, T> scales(p, row, work.token, thread);
        Sums<P, T> sums;
        sums.multiply(by, work.last - work.first);
        scales.share(p, of_tokens, of_rows, thread);
        staging.sync();
        if constexpr (T::kSplit > 1) {
            static_assert(sums.kUnits == 1, "parts of K are added for one set of sums");
            constexpr int kOwn = T::kTokens / T::kSplit;
            decltype(sums.values[0][0] + 0) own[kOwn / 2];
            add_parts<T>(shared + L::kPartsAt, rank, group * kGroupThreads + thread,
                         sums.values[0], own);
            store_sums(p, staging, of_tokens, of_rows, own, row, work.token, rank * kOwn);
        } else {
#pragma unroll
            for (int i = 0; i < sums.kUnits; i++)
                store_sums(p, staging, of_tokens, of_rows, sums.values[i], row, work.token,
                           i * sums.kColumns);
        }
    }
    if (staging.leads()) wait_stores_read<0>();
}

template <class P, class T>
__global__ void __launch_bounds__(T::kThreads, 1)
gemm_many(const __grid_constant__ ManyParameters p) {
    using L = ManyLayout<P, T>;
    extern __shared__ __align__(1024) uint8_t memory[];
    const uint32_t shared = shared_address(memory);
    const int rank = T::kSplit > 1 ? (int)cluster_rank() : 0;
    if (threadIdx.x == 0) {
        prefetch_map(p.x);
        prefetch_map(p.weights);
        prefetch_map(p.d);
        for (int i = 0; i < L::kSlots; i++) {
            barrier_init(shared + L::kFullAt + 8 * i, 1);
            barrier_init(shared + L::kEmptyAt + 8 * i, T::kGroups * 4);
        }
        barrier_init_done();
    }
    let_next_start();
    if constexpr (T::kSplit > 1)
        cluster_barrier();
    else
        __syncthreads();
    const int group = same_in_warp((int)threadIdx.x / kGroupThreads) - 1;
    if (group < 0) {
        if constexpr (T::kGroups > 1) lower_registers<40>();
        if (threadIdx.x == 0) copy_tiles<P, T>(p, shared, rank);
        if constexpr (T::kSplit > 1) cluster_barrier();
    } else {
        if constexpr (T::kGroups > 1) raise_registers<232>();
        multiply_tiles<P, T>(p, shared, rank, group);
    }
}

}  // namespace fpc
