// The C interface of programs: operations on views of memory, run one after the other without
// returning to Python between them.
//
// fpcompiler/native/program.py declares the same structures; FPC_ABI changes with them.

#ifndef FPC_PROGRAM_H
#define FPC_PROGRAM_H

#include "native.h"

#define FPC_RANK 5
#define FPC_INPUTS 4

#pragma GCC visibility push(default)
#ifdef __cplusplus
extern "C" {
#endif

// The first three are those of FpcInput.
enum FpcType {
    FPC_TYPE_F32 = 0,
    FPC_TYPE_F16 = 1,
    FPC_TYPE_BF16 = 2,
    FPC_TYPE_BOOL = 3,
    FPC_TYPE_I64 = 4,
    FPC_TYPE_I32 = 5,
    FPC_TYPE_U8 = 6
};

// Values in memory. Axes are filled up in front with sizes of 1.
typedef struct {
    int64_t base;    // index into the bases of a run
    int64_t offset;  // bytes from there
    int64_t sizes[FPC_RANK];
    int64_t strides[FPC_RANK];  // in values; 0 repeats a value
    int64_t type;    // FpcType
} FpcView;

enum FpcKind {
    FPC_DO_COPY = 0,     // y = x0, cast if the types differ (fp32 and bf16 only)
    FPC_DO_ADD = 1,      // y = x0 + x1; all three have the same sizes and type, fp32 or bf16
    FPC_DO_SUB = 2,      // y = x0 - x1
    FPC_DO_MUL = 3,      // y = x0 * x1
    FPC_DO_SCALE = 4,    // y = x0 * scalar
    FPC_DO_NEG = 5,      // y = -x0
    FPC_DO_INDEX_COPY = 6,  // y[.., x1[i], ..] = x0[.., i, ..] along the axis integers[0]
    FPC_DO_GATHER_ROWS = 7, // y[.., i, :] = x0[x1[i], :]; x1 is contiguous, x0 and y end in one axis
    FPC_DO_ATTENTION = 8,   // y = softmax(scalar * x0 @ x1.T + x3) @ x2, see attention.cpp
    FPC_DO_PREPARE = 9,     // fpc_prepare of x0, integers[0] rows integers[1] values apart, to y
    FPC_DO_MULTIPLY = 10,   // fpc_multiply of x0, integers[0] rows, to y, integers[1] values apart;
                            // with the flag 1 x1 is the residual
    FPC_DO_PRODUCE = 11,     // fpc_prepare_produced of x0, likewise; see below
    FPC_DO_PREPARE_CODES = 12 // fpc_prepare_codes of x0 to y, integers[0] rows; with the flag 1 x1
                             // has the outer scales, with 2 x2 those of blocks
};

typedef struct {
    int64_t kind;  // FpcKind
    float scalar;
    int32_t flag;  // attention: 1 if query i sees no key behind i; 2 if x3 is a mask
    int64_t integers[2];
    const FpcWeights* weights;
    const FpcActivations* activations;
    const FpcProducer* producer;
    // What the producer reads beside x0: its data are where x1 (scale) and x2 (shift) are.
    FpcRows rows[2];
    int32_t has_rows[2];
    FpcView y;
    FpcView x[FPC_INPUTS];
} FpcOperation;

enum FpcProgramStatus { FPC_OUT_OF_RANGE = 3 };

// Run operations in order.
//   bases        what the views' bases stand for
//   stopped      the index of the operation that failed
//   nanoseconds  [count], how long each took, or null
// Returns an FpcStatus, or FPC_OUT_OF_RANGE for an index that is none.
int32_t fpc_run(const FpcOperation* operations, int64_t count, uint8_t* const* bases,
                int32_t threads, int32_t instructions, int64_t* stopped, int64_t* nanoseconds);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
#endif
