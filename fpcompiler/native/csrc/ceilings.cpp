// What this machine can do at best: how fast it reads memory and multiplies. Measurements of
// kernels are compared with it, so the loops here do nothing else. The caller takes the time.

#include "native.h"
#include "processor.h"

#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Vectors wider than the baseline's are only passed between functions that are inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace {

constexpr int64_t kStep = 256;    // bytes that are read per round, four cache lines
constexpr int64_t kAhead = 4096;  // how far ahead of the reading memory is asked for
constexpr int64_t kChains = 12;   // independent sums: enough to hide the latency of every unit

// ---- Reading ---------------------------------------------------------------------------------

// Return the exclusive or of the 8-byte words; `bytes` is a multiple of kStep.
template <class Vector>
inline __attribute__((always_inline)) uint64_t xor_of(const uint8_t* data, int64_t bytes) {
    constexpr int64_t size = sizeof(Vector), count = kStep / size;
    Vector sums[count] = {};
    for (int64_t at = 0; at < bytes; at += kStep) {
        for (int64_t line = 0; line < kStep; line += 64)
            __builtin_prefetch(data + at + kAhead + line);
        for (int64_t i = 0; i < count; i++) {
            Vector part;
            memcpy(&part, data + at + i * size, sizeof part);
            sums[i] ^= part;
        }
    }
    uint64_t words[kStep / 8], result = 0;
    memcpy(words, sums, sizeof words);
    for (uint64_t word : words) result ^= word;
    return result;
}

using Reader = uint64_t (*)(const uint8_t*, int64_t);
typedef uint64_t Words2 __attribute__((vector_size(16)));

uint64_t read_baseline(const uint8_t* data, int64_t bytes) { return xor_of<Words2>(data, bytes); }

#if defined(__x86_64__)
typedef uint64_t Words4 __attribute__((vector_size(32)));
typedef uint64_t Words8 __attribute__((vector_size(64)));

__attribute__((target("avx2"))) uint64_t read_avx2(const uint8_t* data, int64_t bytes) {
    return xor_of<Words4>(data, bytes);
}

__attribute__((target("avx512f"))) uint64_t read_avx512(const uint8_t* data, int64_t bytes) {
    return xor_of<Words8>(data, bytes);
}
#endif

Reader reader() {
#if defined(__x86_64__)
    if (fpc_instructions() >= FPC_AVX512) return read_avx512;
    if (fpc_instructions() >= FPC_AVX2) return read_avx2;
#endif
    return read_baseline;
}

// ---- Multiplying -----------------------------------------------------------------------------

using Multiplier = void (*)(int64_t iterations);

// Keeps the compiler from computing equal sums once, or not at all.
#if defined(__x86_64__)
#define FPC_OPAQUE(value) asm volatile("" : "+x"(value))
#elif defined(__aarch64__)
#define FPC_OPAQUE(value) asm volatile("" : "+w"(value))
#else
#define FPC_OPAQUE(value) asm volatile("" : "+m"(value))
#endif

template <class Vector>
void multiply_plain(int64_t iterations) {
    Vector factor = {1, 1, 1, 1}, sums[kChains] = {};
    for (int64_t i = 0; i < iterations; i++) {
        for (Vector& sum : sums) {
            FPC_OPAQUE(factor);
            sum += factor * factor;
        }
    }
    for (Vector& sum : sums) FPC_OPAQUE(sum);
}

typedef float Floats4 __attribute__((vector_size(16)));
typedef int32_t Ints4 __attribute__((vector_size(16)));

// A loop over kChains sums in registers. Assembly: gcc copies the sums of the intrinsics around.
#define FPC_CHAINS(INSTRUCTIONS, VECTOR, FACTOR)                                              \
    VECTOR x = FACTOR, a = x, b = x, c = x, d = x, e = x, f = x, g = x, h = x, i = x, j = x,  \
           k = x, l = x;                                                                      \
    for (int64_t n = 0; n < iterations; n++) {                                                \
        INSTRUCTIONS(a) INSTRUCTIONS(b) INSTRUCTIONS(c) INSTRUCTIONS(d)                       \
        INSTRUCTIONS(e) INSTRUCTIONS(f) INSTRUCTIONS(g) INSTRUCTIONS(h)                       \
        INSTRUCTIONS(i) INSTRUCTIONS(j) INSTRUCTIONS(k) INSTRUCTIONS(l)                       \
    }

#if defined(__x86_64__)
#define FPC_DPBUSD(s) asm volatile("vpdpbusd %1, %1, %0" : "+v"(s) : "v"(x));
#define FPC_DPBF16(s) asm volatile("vdpbf16ps %1, %1, %0" : "+v"(s) : "v"(x));
#define FPC_FMA(s) asm volatile("vfmadd231ps %1, %1, %0" : "+v"(s) : "v"(x));
#define FPC_FMA_YMM(s) asm volatile("vfmadd231ps %1, %1, %0" : "+x"(s) : "x"(x));
#define FPC_DPBUSD_VEX(s) asm volatile("%{vex%} vpdpbusd %1, %1, %0" : "+x"(s) : "x"(x));

__attribute__((target("avx512f,avx512vnni"))) void int8_avx512(int64_t iterations) {
    FPC_CHAINS(FPC_DPBUSD, __m512i, _mm512_set1_epi32(0x01010101))
}

__attribute__((target("avx512f"))) void bf16_avx512(int64_t iterations) {
    FPC_CHAINS(FPC_DPBF16, __m512i, _mm512_set1_epi32(0x3F803F80))
}

__attribute__((target("avx512f"))) void fp32_avx512(int64_t iterations) {
    FPC_CHAINS(FPC_FMA, __m512, _mm512_set1_ps(1))
}

__attribute__((target("avx2,fma"))) void fp32_avx2(int64_t iterations) {
    FPC_CHAINS(FPC_FMA_YMM, __m256, _mm256_set1_ps(1))
}

#ifdef FPC_KNOWS_AVX_VNNI
__attribute__((target("avx2"))) void int8_vex(int64_t iterations) {
    FPC_CHAINS(FPC_DPBUSD_VEX, __m256i, _mm256_set1_epi32(0x01010101))
}
#endif

// Products of small values are added in 16 bits several times before they go to 32 bits, so these
// two bound what a kernel can reach.
#define FPC_MADD(s)                                                        \
    {                                                                      \
        __m256i pairs;                                                     \
        asm volatile("vpmaddubsw %2, %2, %1\n\tvpaddw %1, %0, %0"          \
                     : "+x"(s), "=&x"(pairs)                               \
                     : "x"(x));                                            \
    }

__attribute__((target("avx2"))) void int8_avx2(int64_t iterations) {
    FPC_CHAINS(FPC_MADD, __m256i, _mm256_set1_epi32(0x01010101))
}
#elif defined(__aarch64__)
#define FPC_SDOT(s) asm volatile("sdot %0.4s, %1.16b, %1.16b" : "+w"(s) : "w"(x));
#define FPC_FMLA(s) asm volatile("fmla %0.4s, %1.4s, %1.4s" : "+w"(s) : "w"(x));

__attribute__((target("arch=armv8.2-a+dotprod"))) void int8_neon(int64_t iterations) {
    FPC_CHAINS(FPC_SDOT, Ints4, Ints4{} + 0x01010101)
}

void fp32_neon(int64_t iterations) { FPC_CHAINS(FPC_FMLA, Floats4, Floats4{} + 1) }
#endif

// A loop and what one round of one of its chains computes, a product and a sum being two.
struct Peak {
    Multiplier run;
    int64_t operations;
};

#if defined(__x86_64__)
Peak int8_peak() {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni"))
        return {int8_avx512, 128};
#ifdef FPC_KNOWS_AVX_VNNI
    if (__builtin_cpu_supports("avxvnni")) return {int8_vex, 64};
#endif
    if (__builtin_cpu_supports("avx2")) return {int8_avx2, 64};
    return {multiply_plain<Ints4>, 8};
}

Peak fp32_peak() {
    if (__builtin_cpu_supports("avx512f")) return {fp32_avx512, 32};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {fp32_avx2, 16};
    return {multiply_plain<Floats4>, 8};
}

Peak bf16_peak() {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bf16"))
        return {bf16_avx512, 64};
    return fp32_peak();
}
#elif defined(__aarch64__)
Peak int8_peak() {
    if (fpc_has_instructions(FPC_NEON_DOT)) return {int8_neon, 32};
    return {multiply_plain<Ints4>, 8};
}
Peak fp32_peak() { return {fp32_neon, 8}; }
Peak bf16_peak() { return fp32_peak(); }
#else
Peak int8_peak() { return {multiply_plain<Ints4>, 8}; }
Peak fp32_peak() { return {multiply_plain<Floats4>, 8}; }
Peak bf16_peak() { return fp32_peak(); }
#endif

}  // namespace

extern "C" uint64_t fpc_read_bytes(const void* data, int64_t bytes, int32_t threads) {
    const Reader read = reader();
    const auto* start = (const uint8_t*)data;
    const int64_t steps = bytes / kStep;
    uint64_t result = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1) reduction(^ : result)
    for (int32_t t = 0; t < threads; t++) {
        const int64_t first = steps * t / threads, end = steps * (t + 1) / threads;
        result ^= read(start + first * kStep, (end - first) * kStep);
    }
    for (int64_t at = steps * kStep; at < bytes; at += 8) {
        uint64_t word = 0;
        memcpy(&word, start + at, bytes - at < 8 ? bytes - at : 8);
        result ^= word;
    }
    return result;
}

extern "C" int64_t fpc_peak(int32_t arithmetic, int64_t iterations, int32_t threads) {
    if (arithmetic < FPC_INT8 || arithmetic > FPC_FLOAT32) return 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
    const Peak peak = arithmetic == FPC_INT8   ? int8_peak()
                      : arithmetic == FPC_BF16 ? bf16_peak()
                                               : fp32_peak();
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int32_t t = 0; t < threads; t++) peak.run(iterations);
    return iterations * kChains * peak.operations * threads;
}
