// Which instructions this processor has.

#include "processor.h"

#include "native.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#if defined(__x86_64__)
namespace {

bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}

bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_vnni() {
    return has_avx512() && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vnni");
}

}  // namespace

Vnni256 vnni256() {
#ifdef FPC_KNOWS_AVX_VNNI
    if (__builtin_cpu_supports("avxvnni")) return Vnni256::kVex;
#endif
    if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
        return Vnni256::kEvex;
    return Vnni256::kNone;
}
#elif defined(__aarch64__)
namespace {

bool has_neon_dot() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__APPLE__)
    return true;
#else
    return false;
#endif
}

}  // namespace
#endif

extern "C" int32_t fpc_abi(void) { return FPC_ABI; }

extern "C" int32_t fpc_has_instructions(int32_t instructions) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    switch (instructions) {
        case FPC_AVX2: return has_avx2();
        case FPC_AVX2_VNNI: return has_avx2() && vnni256() != Vnni256::kNone;
        case FPC_AVX512: return has_avx2() && has_avx512();
        case FPC_AVX512_VNNI: return has_avx2() && has_avx512_vnni();
        case FPC_AVX512_BF16:
            return has_avx2() && has_avx512_vnni() && __builtin_cpu_supports("avx512bf16");
        default: break;
    }
#elif defined(__aarch64__)
    if (instructions == FPC_NEON_DOT) return has_neon_dot();
#endif
    return instructions == FPC_BASELINE;
}

extern "C" int32_t fpc_instructions(void) {
    for (int32_t i = FPC_NEON_DOT; i > FPC_BASELINE; i--)
        if (fpc_has_instructions(i)) return i;
    return FPC_BASELINE;
}
