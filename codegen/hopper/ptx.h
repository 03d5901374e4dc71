// Hopper's instructions for copies, barriers, clusters and registers, one function each. Addresses
// are of shared memory, 32 bits. `cluster` in a name: the other blocks of a cluster see it too.

#include <cuda.h>
#include <stdint.h>

namespace fpc {

FPC_DEVICE uint32_t shared_address(const void* pointer) {
    return (uint32_t)__cvta_generic_to_shared(pointer);
}

// --- registers and threads -----------------------------------------------------------------------

template <int kCount>
FPC_DEVICE void raise_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
FPC_DEVICE void lower_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Tell the compiler that a number is the same for all lanes of a warp.
FPC_DEVICE int same_in_warp(int value) { return __shfl_sync(~0u, value, 0); }

// A barrier of some warps of a block; barrier 0 is __syncthreads().
FPC_DEVICE void named_barrier(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Programmatic dependent launch: wait until all kernels before this one are through, and let the
// next one begin what does not depend on this one.
FPC_DEVICE void wait_for_inputs() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
FPC_DEVICE void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// --- barriers in shared memory -------------------------------------------------------------------

FPC_DEVICE void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes initialized barriers visible to the copy engine and to the cluster.
FPC_DEVICE void barrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrive, and expect that copies bring so many bytes.
FPC_DEVICE void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(bytes)
                 : "memory");
}

FPC_DEVICE void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

FPC_DEVICE void barrier_wait(uint32_t barrier, uint32_t phase) {
    asm volatile(
        "{ .reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again; }" ::"r"(barrier),
        "r"(phase)
        : "memory");
}

// --- clusters ------------------------------------------------------------------------------------

FPC_DEVICE uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

FPC_DEVICE void store_cluster(uint32_t address, uint32_t rank, const uint32_t (&words)[4]) {
    asm volatile(
        "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;\n"
        "st.shared::cluster.v4.b32 [there], {%2, %3, %4, %5}; }" ::"r"(address),
        "r"(rank), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
        : "memory");
}

// --- copies of tiles -----------------------------------------------------------------------------

FPC_DEVICE void prefetch_map(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

FPC_DEVICE void load_tile(const CUtensorMap& map, uint32_t to, uint32_t barrier, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(x), "r"(y)
        : "memory");
}

FPC_DEVICE void load_tile(const CUtensorMap& map, uint32_t to, uint32_t barrier, int x, int y,
                          int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z)
        : "memory");
}

FPC_DEVICE void store_tile(const CUtensorMap& map, uint32_t from, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
        "r"(from), "r"(x), "r"(y)
        : "memory");
}

FPC_DEVICE void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Wait until all but the last few groups of stores have read shared memory.
template <int kPending>
FPC_DEVICE void wait_stores_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// What this thread wrote to shared memory can be read by the copy engine after a barrier.
FPC_DEVICE void publish_writes() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- global memory -------------------------------------------------------------------------------

// Into the second cache.
FPC_DEVICE void prefetch_line(const void* from) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// The first cache could have what was there before another kernel wrote it.
FPC_DEVICE Quad load_past_first_cache(const void* from) {
    Quad q;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(q.words[0]), "=r"(q.words[1]), "=r"(q.words[2]), "=r"(q.words[3])
                 : "l"(from));
    return q;
}

// A copy to shared memory that goes on beside other work, until `wait_copies`.
FPC_DEVICE void copy_word(uint32_t to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

// Wait for the copies of this thread.
FPC_DEVICE void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// --- shared memory -------------------------------------------------------------------------------

FPC_DEVICE Quad load_shared_quad(uint32_t address) {
    Quad q;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(q.words[0]), "=r"(q.words[1]), "=r"(q.words[2]), "=r"(q.words[3])
                 : "r"(address)
                 : "memory");
    return q;
}

FPC_DEVICE uint32_t load_shared(uint32_t address) {
    uint32_t word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
    return word;
}

FPC_DEVICE void store_shared(uint32_t address, uint32_t word) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}

FPC_DEVICE void store_shared(uint32_t address, const Quad& q) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(q.words[0]),
                 "r"(q.words[1]), "r"(q.words[2]), "r"(q.words[3])
                 : "memory");
}

// Matrices of 8 x 8 16-bit values, transposed: lane r of eight has the address of column r.
FPC_DEVICE void store_transposed(uint32_t address, const uint32_t (&matrices)[2]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address),
                 "r"(matrices[0]), "r"(matrices[1])
                 : "memory");
}

FPC_DEVICE void store_transposed(uint32_t address, const uint32_t (&matrices)[4]) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
        "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
        : "memory");
}

}  // namespace fpc
