// What a kernel is called with. fpcompiler/codegen/cuda/arguments.py declares the same structures.

#include <stdint.h>

extern "C" {

// Rows of neighbouring values beside those of x: what belongs to row m of x is at
// data + m / repeat * stride.
typedef struct {
    const void* data;
    int64_t repeat;  // rows of x that share a row; 1 or more, also where there is no data
    int64_t stride;  // bytes from one row to the next
} FpcBeside;

// All pointers are to memory of the GPU. Nothing needs an alignment beyond that of its type, but
// chunks whose addresses are multiples of 16 are read and written at once.
typedef struct {
    const void* x;         // [m, k]
    int64_t m, k, stride;  // the stride in values; m is at most 2**30, k and pitch 2**26
    const void* weight;    // [k], of a norm
    const void* bias;      // [k], of a layer norm
    FpcBeside scale;       // what the tail of a producer multiplies with
    FpcBeside shift;       // what it adds
    float eps;
    uint8_t* codes;        // [m, pitch]: codes in their form, and zeros behind them
    int64_t pitch;         // bytes from one row of codes to the next
    float* outer_scale;    // [m] per row, [1] per tensor: written, or read if it is given. Behind
                           // the scales of rows stand the sums of their integers, int32
    void* block_scale;     // rows of scales, or atoms of 128 rows by 4 scales, padded with zeros;
                           // none if codes are stored as products with them
    int64_t scale_pitch;   // scales of a row, with those that are padding
    int32_t* amax;         // [1], for a scale per tensor that is not given: used by the kernels
    int32_t* status;       // [1]: set to 1 if a value is NaN or infinite, and otherwise left alone
} FpcQuantizeArguments;

enum FpcQuantizeStatus { FPC_LAUNCHED = 0, FPC_REFUSED = -1 };  // otherwise a cudaError_t
}
