// CUDA on one CPU, as far as codegen/cuda needs it, with the names of instructions.h.
//
// The threads of a block, or of the blocks of a cluster, are coroutines. They run in turn from one
// exchange or barrier to the next. Kernels reach exchanges equally often in all lanes of a warp, and
// barriers in all threads that have not returned.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <set>
#include <vector>

#define FPC_DEVICE inline
#define __global__
#define __host__
#define __device__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace fpc {

// --- threads -----------------------------------------------------------------------------------

struct Thread {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(256 << 10);
    bool done = false;
    double slots[2];  // what it shows to others: at even and at odd exchanges
    int exchanges = 0, barriers = 0;
};

static ucontext_t scheduler;
static std::vector<Thread> threads;
static Thread* current;
static unsigned cluster = 1;  // blocks along x that run together
static unsigned rank;         // of the block of this thread
static std::set<const void*> wide;  // kernels whose clusters may have more than 8 blocks
static long launched;         // clusters so far
static void (*body)(const void*);
static const void* body_arguments;

static void run_thread() {
    body(body_arguments);
    current->done = true;
    swapcontext(&current->context, &scheduler);
}

static void wait_for_others() { swapcontext(&current->context, &scheduler); }

static unsigned of_block() { return blockDim.x * blockDim.y; }
static unsigned thread_index() { return rank * of_block() + threadIdx.y * blockDim.x + threadIdx.x; }

// Run the blocks of a cluster; blockIdx is that of the first one.
static void run_blocks() {
    const unsigned count = of_block() * cluster, first = blockIdx.x;
    launched++;
    if (threads.size() < count) threads.resize(count);
    for (unsigned i = 0; i < count; i++) {
        Thread& thread = threads[i];
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        thread.context.uc_link = nullptr;
        thread.done = false;
        thread.exchanges = thread.barriers = 0;
        makecontext(&thread.context, run_thread, 0);
    }
    for (bool any = true; any;) {
        any = false;
        for (unsigned i = 0; i < count; i++) {
            current = &threads[i];
            if (current->done) continue;
            rank = i / of_block();
            blockIdx.x = first + rank;
            threadIdx = dim3(i % of_block() % blockDim.x, i % of_block() / blockDim.x);
            swapcontext(&scheduler, &current->context);
            any = true;
        }
    }
}

// Wait until some threads, one behind the other, have come to as many barriers as this one.
static void wait_at_barrier(unsigned first, unsigned count) {
    const int wanted = ++current->barriers;
    for (bool waiting = true; waiting;) {
        wait_for_others();
        waiting = false;
        for (unsigned i = first; i < first + count; i++)
            waiting |= !threads[i].done && threads[i].barriers < wanted;
    }
}

template <class T>
static T exchange(T value, int mask) {
    Thread& own = *current;
    const unsigned index = thread_index();
    const int parity = own.exchanges++ % 2;
    memcpy(&own.slots[parity], &value, sizeof value);
    wait_for_others();
    Thread& other = threads[index ^ (unsigned)mask];
    // Lanes before this one may be one exchange ahead.
    if (other.exchanges != own.exchanges && other.exchanges != own.exchanges + 1) abort();
    memcpy(&value, &other.slots[parity], sizeof value);
    return value;
}

[[maybe_unused]] static void prefetch(const void*) {}
static void follow() {}
static void barrier() { wait_at_barrier(rank * of_block(), of_block()); }

// What one block of a cluster has where this one has `own`; set where memory is given out.
static char* memories[16];

// Poisoned for each cluster that runs: what is read was written. Not for each call: some of it is
// kept from one call to the next.
template <class T, int kCount>
static T* block_memory() {
    static T memory[16][kCount];
    static long poisoned[16];
    if (poisoned[rank] != launched) memset(memory[rank], 0xFF, sizeof memory[rank]);
    poisoned[rank] = launched;
    for (unsigned i = 0; i < cluster; i++) memories[i] = (char*)memory[i];
    return memory[rank];
}

static void cluster_barrier() { wait_at_barrier(0, of_block() * cluster); }

static void cluster_arrive() {}
static void cluster_wait() { cluster_barrier(); }

template <class T>
static void store_remote(T* own, int other, T value) {
    *(T*)(memories[other] + ((const char*)own - memories[rank])) = value;
}

static void store_larger(int32_t* to, int32_t value) { *to = value > *to ? value : *to; }

template <class Arguments>
static int32_t launch(void (*kernel)(Arguments), dim3 grid, dim3 block, const Arguments& arguments,
                      void*, bool = true, unsigned blocks = 1) {
    constexpr unsigned kPortable = 8;
    constexpr int32_t kMisconfigured = 912;
    if (blocks > kPortable && !wide.count((const void*)kernel)) return kMisconfigured;
    static void (*function)(Arguments);
    function = kernel;
    body = [](const void* a) { function(*(const Arguments*)a); };
    body_arguments = &arguments;
    gridDim = grid;
    blockDim = block;
    cluster = blocks;
    for (unsigned y = 0; y < grid.y; y++)
        for (unsigned x = 0; x < grid.x; x += cluster) {
            blockIdx = dim3(x, y);
            run_blocks();
        }
    return 0;
}

static unsigned multiprocessors() { return 1; }
static const char* error_text(int32_t) { return "an error of CUDA"; }

static int32_t set_zero(void* memory, size_t bytes, void*) {
    memset(memory, 0, bytes);
    return 0;
}

// --- arithmetic: compiled with -ffp-contract=off, each operation is rounded once -----------------

static inline float add(float a, float b) { return a + b; }
static inline double add(double a, double b) { return a + b; }
static inline float subtract(float a, float b) { return a - b; }
static inline float multiply(float a, float b) { return a * b; }
static inline double multiply(double a, double b) { return a * b; }
static inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static inline float divide(float a, float b) { return a / b; }
static inline float reciprocal(float a) { return 1.0f / a; }
static inline float root(float a) { return __builtin_sqrtf(a); }

static inline int32_t bits_of(float a) {
    int32_t bits;
    memcpy(&bits, &a, 4);
    return bits;
}

static inline float float_of(int32_t bits) {
    float a;
    memcpy(&a, &bits, 4);
    return a;
}

static inline float smaller(float a, float b) { return a < b ? a : b; }
static inline int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

static inline float larger_magnitude(float a, float b) {
    const int32_t x = bits_of(a) & 0x7FFFFFFF, y = bits_of(b) & 0x7FFFFFFF;
    return float_of(x > y ? x : y);
}

static inline float from_f16(uint16_t bits) {
    _Float16 value;
    memcpy(&value, &bits, 2);
    return (float)value;
}

static inline float rounded_to_f16(float value) { return (float)(_Float16)value; }

static inline float rounded_to_bf16(float value) {
    const uint32_t bits = (uint32_t)bits_of(value);
    if (value != value) return value;
    return float_of((int32_t)((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u));
}

static inline uint32_t f16_pair(float first, float second) {
    const _Float16 values[] = {(_Float16)first, (_Float16)second};
    uint32_t pair;
    memcpy(&pair, values, 4);
    return pair;
}

static inline uint32_t bf16_pair(float first, float second) {
    const uint32_t low = (uint32_t)bits_of(rounded_to_bf16(first)) >> 16;
    return low | ((uint32_t)bits_of(rounded_to_bf16(second)) & 0xFFFF0000u);
}

static inline int32_t plus_bytes(uint32_t word, int32_t sum) {
    for (int i = 0; i < 4; i++) sum += (int8_t)(word >> 8 * i);
    return sum;
}

// E4M3, by the nearest of its 127 magnitudes; the even one in the middle of two.
static inline uint32_t e4m3_of(float value) {
    const auto number = [](int code) {
        return code < 8 ? ldexp(code, -9) : ldexp(8 + code % 8, code / 8 - 10);
    };
    const double size = fabs((double)value);
    int code = 0;
    for (int step = 64; step; step /= 2)
        if (code + step < 127 && number(code + step) <= size) code += step;
    if (code < 126) {
        const double low = size - number(code), high = number(code + 1) - size;
        code += high < low || (high == low && code % 2);
    }
    return (uint32_t)code | (uint32_t)signbit(value) << 7;
}

static inline uint32_t e4m3_pair(float first, float second) {
    return e4m3_of(first) | e4m3_of(second) << 8;
}

struct alignas(16) Quad {
    uint32_t words[4];
};

struct alignas(8) Twin {
    uint32_t words[2];
};

static inline Quad load_quad(const void* from) { return *(const Quad*)from; }

}  // namespace fpc
