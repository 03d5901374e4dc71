// Includes FPC_ROWS, a header of kernels, once per instruction set: each time after vectors.h, with
// FPC_LANES defined, in a namespace of its own. Everything is local to the file that does this.

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Vectors wider than the baseline's are only passed between functions that are inlined, and the
// headers of GCC 12 use undefined vectors on purpose.
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace {

#if defined(__x86_64__)
namespace avx512 {
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define FPC_LANES 16
#include "vectors.h"

#include FPC_ROWS
#undef FPC_LANES
#pragma GCC pop_options
}  // namespace avx512
namespace avx2 {
#pragma GCC push_options
#pragma GCC target("avx2")
#define FPC_LANES 8
#include "vectors.h"

#include FPC_ROWS
#undef FPC_LANES
#pragma GCC pop_options
}  // namespace avx2
#endif
namespace baseline {
#define FPC_LANES 4
#include "vectors.h"

#include FPC_ROWS
#undef FPC_LANES
}  // namespace baseline

}  // namespace
