// The C interface of the native library: raw pointers, no PyTorch and no Python.
//
// fpcompiler/native/loading.py declares the same structures; FPC_ABI changes with them.

#ifndef FPC_NATIVE_H
#define FPC_NATIVE_H

#include <stdint.h>

#define FPC_ABI 1

#pragma GCC visibility push(default)
#ifdef __cplusplus
extern "C" {
#endif

// A signed format with zero. What its codes mean is in fpcompiler/formats.py.
typedef struct {
    int32_t mantissa_bits;
    int32_t magnitude_bits;
    int32_t min_exponent;
    int32_t max_exponent;
    float max;
} FpcFormat;

enum FpcOuter { FPC_NO_OUTER = 0, FPC_PER_TENSOR = 1, FPC_PER_ROW = 2 };
enum FpcBlockScale { FPC_F32 = 0, FPC_E8M0 = 1, FPC_E4M3 = 2 };
enum FpcRounding { FPC_FLOOR = 0, FPC_CEIL = 1, FPC_RNE = 2, FPC_MSE = 3 };
enum FpcInput { FPC_INPUT_F32 = 0, FPC_INPUT_F16 = 1, FPC_INPUT_BF16 = 2 };
enum FpcInstructions { FPC_BASELINE = 0, FPC_AVX2 = 1, FPC_AVX512 = 2 };
enum FpcStatus { FPC_OK = 0, FPC_NOT_FINITE = 1, FPC_NO_MEMORY = 2 };

// What quantization makes of a row; see fpcompiler/operand.py.
typedef struct {
    FpcFormat element;
    int32_t outer;        // FpcOuter: the values that share a real scale
    int32_t block;        // values that share a scale of their own; 0 for none
    int32_t block_scale;  // FpcBlockScale
    int32_t rounding;     // FpcRounding of the scale of blocks
    int32_t code_bits;    // 4, 6 or 8: bits that a code takes in `codes`
} FpcOperand;

int32_t fpc_abi(void);

// The best FpcInstructions that this processor has; it has those before as well.
int32_t fpc_instructions(void);

// Quantize `rows` rows of `k` values that lie `stride` values apart.
//   codes         [rows, packed bytes of k codes]
//   outer_scale   fp32 [1] per tensor, [rows] per row, otherwise unused
//   block_scale   [rows, ceil(k / block)]: fp32, or one code a byte
//   instructions  FpcInstructions that the processor has; all give the same result
// Returns an FpcStatus.
int32_t fpc_quantize(const FpcOperand* operand, const void* x, int32_t input, int64_t rows,
                     int64_t k, int64_t stride, uint8_t* codes, float* outer_scale,
                     void* block_scale, int32_t threads, int32_t instructions);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
#endif
