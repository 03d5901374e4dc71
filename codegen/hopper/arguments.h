// What a GEMM of packed weights is called with.

#include <stddef.h>
#include <stdint.h>

extern "C" {

// What functions return: one of these.
typedef enum {
    FPC_OK = 0,
    FPC_NULL_POINTER = 1,       // A, B or D, or scales or sums that this kernel needs
    FPC_MISALIGNED = 2,         // A, B, its exponents or D not at a multiple of 16 bytes
    FPC_SMALL_WORKSPACE = 3,    // not returned: no workspace is needed
    FPC_UNSUPPORTED_SHAPE = 4,  // N is no multiple of 8, K none of 128, or too large
    FPC_INITIALIZE = 5,         // a driver without tensor maps, or an invalid one
    FPC_LAUNCH = 6,
} FpcStatus;

// D[m,n] = activation(alpha * scalar_a * scalar_b * token[m] * row[n] * sum(A[m] * B[n]) + bias[n]).
// All pointers are of device memory; null where a comment says so.
//
// B is in order 8: [ceil(n/16)][k/64][32 lanes][16 bytes]. Lane 4g + t has four words of eight codes,
// word 2j + h those of row 16r + g + 8h (r and s: the first two indices) at k = 64s + 32j + 4t + i
// (nibble i from 0 to 3) and at k = 64s + 32j + 16 + 4t + i (nibble 4 + i).
typedef struct {
    const void* a;             // [m, k] bytes: int8 or E4M3
    const void* a_scales;      // null
    const void* b;             // [ceil(n/16), k/64, 32, 16] bytes
    const void* b_scales;      // [ceil(n/16), k/128, 16, 4] bytes, exponents from 0 to 11; or null
    void* d;                   // [m, n], rows without gaps
    const void* residual;      // null
    const float* token_scale;  // [m]; null: 1
    const float* row_scale;    // [n]; null: 1
    const float* bias;         // [n]; null: 0
    const float* scalar_a;     // one number; null: 1
    const float* scalar_b;     // one number; null: 1
    float alpha;
    int32_t m, n, k;
    int32_t sm_count;          // SMs of the GPU; 0 asks the driver
    void* workspace;           // null
    size_t workspace_bytes;
    void* stream;              // cudaStream_t
    const int32_t* a_sum;      // [m], the sum of each row of int8 A
} FpcPackedGemmArguments;
}
