// What this processor has, beside what FpcInstructions say.

#ifndef FPC_PROCESSOR_H
#define FPC_PROCESSOR_H

// How vpdpbusd on vectors of 256 bits may be encoded: not at all, as in AVX-VNNI, as in AVX-512.
enum class Vnni256 { kNone, kVex, kEvex };

Vnni256 vnni256();

#endif
