// What this processor has, beside what FpcInstructions say.

#ifndef FPC_PROCESSOR_H
#define FPC_PROCESSOR_H

// Older compilers do not know AVX-VNNI, nor their assemblers its instructions.
#if defined(__x86_64__) && (__GNUC__ >= 12 || __clang_major__ >= 12)
#define FPC_KNOWS_AVX_VNNI
#endif

// How vpdpbusd on vectors of 256 bits may be encoded: not at all, as in AVX-VNNI, as in AVX-512.
enum class Vnni256 { kNone, kVex, kEvex };

Vnni256 vnni256();

#endif
