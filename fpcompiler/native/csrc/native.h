// The C interface of the native library: raw pointers, no PyTorch and no Python.
//
// fpcompiler/native/loading.py declares the same structures; FPC_ABI changes with them.

#ifndef FPC_NATIVE_H
#define FPC_NATIVE_H

#include <stdint.h>

#define FPC_ABI 6

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
enum FpcInstructions {
    FPC_BASELINE = 0,
    FPC_AVX2 = 1,         // and FMA, F16C
    FPC_AVX2_VNNI = 2,    // and VNNI of 256 bits: AVX-VNNI, or AVX-512 VL and VNNI
    FPC_AVX512 = 3,       // F, BW, DQ, VL; FPC_AVX2_VNNI may be missing
    FPC_AVX512_VNNI = 4,  // and VBMI, VNNI
    FPC_AVX512_BF16 = 5,  // and BF16
    // Of ARM, where none of those above exist.
    FPC_NEON_DOT = 6      // ARMv8.2 with dot products of integers (FEAT_DotProd)
};
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

// The best FpcInstructions that this processor has.
int32_t fpc_instructions(void);

// Whether this processor has some FpcInstructions.
int32_t fpc_has_instructions(int32_t instructions);

// Quantize `rows` rows of `k` values that lie `stride` values apart.
//   codes         [rows, packed bytes of k codes]
//   outer_scale   fp32 [1] per tensor, [rows] per row, otherwise unused
//   block_scale   [rows, ceil(k / block)]: fp32, or one code a byte
//   instructions  FpcInstructions that the processor has; all give the same result
// Returns an FpcStatus.
int32_t fpc_quantize(const FpcOperand* operand, const void* x, int32_t input, int64_t rows,
                     int64_t k, int64_t stride, uint8_t* codes, float* outer_scale,
                     void* block_scale, int32_t threads, int32_t instructions);

// --- linear layers ----------------------------------------------------------------------------

enum FpcArithmetic {
    FPC_INT8 = 0,    // values of both operands are integers times a power of two: exact sums
    FPC_BF16 = 1,    // both are held by bf16; sums are fp32. Needs FPC_AVX512_BF16
    FPC_FLOAT32 = 2  // anything else
};

enum FpcScales { FPC_NO_SCALES = 0, FPC_ANY_SCALES = 1, FPC_POWERS = 2 };

// Weights, and the scales and the bias of the outputs.
typedef struct {
    const uint8_t* data;   // what fpc_repack wrote; its layout is in layout.h
    int64_t n, k;          // outputs, inputs
    int32_t group;         // inputs that share scales in one of the operands; 0: all of them
    int32_t block_scale;   // FpcBlockScale of the weights' groups, or -1 if they have none
    int32_t scaled_inputs; // FpcScales of groups that the activations have
    int32_t least, most;   // exponents of the weights' scales of E8M0; 0 if they have none
    int32_t arithmetic;    // FpcArithmetic
    int32_t code_bits;     // bits that a code takes when packed: 4, 6 or 8
    int32_t digits;        // binary digits of a value, at most
    int32_t offset;        // int8: what is added to the integers, so that none is negative
    int32_t most_input;    // int8: largest magnitude of an integer of the activations
    float unit;            // int8: what 1 of a product of integers stands for
    uint8_t integers[256]; // int8: the integer of each code, with the offset
    uint16_t halves[256];  // the value of each code as bf16
    float values[256];     // the value of each code
    const float* row_scale;  // [n rounded up to 64]
    const float* bias;       // [n rounded up to 64], or null
    int32_t activation;      // what is computed of each result once it is rounded: FpcHead of an
                             // activation, or -1 for nothing
} FpcWeights;

// Activations: how values are quantized, and what the codes stand for.
typedef struct {
    FpcOperand operand;
    int32_t quantized;     // 0: values are used as they are, and nothing else here counts
    int8_t integers[256];  // int8: the integer of each code
    float values[256];     // the value of each code
} FpcActivations;

int64_t fpc_weight_bytes(const FpcWeights* weights);

// Bring weights into the order in which they are multiplied.
//   packed  [n, row_bytes]: codes, the first one of a byte in its low bits; those of six bits are a
//           stream of bits
//   scales  [n, ceil(k / (group * repeat))]: fp32, or one code a byte; unused without
//   repeat  groups that share one of these scales
//   to      fpc_weight_bytes(weights), aligned to 64
void fpc_repack(const FpcWeights* weights, const uint8_t* packed, int64_t row_bytes,
                const void* scales, int64_t repeat, uint8_t* to, int32_t threads);

// Activations that are ready to be multiplied with any weights that agree in `k`, `group`,
// `arithmetic` and `offset`.
int64_t fpc_prepared_bytes(const FpcWeights* weights, int64_t m);

// Quantize `m` rows of values that lie `stride` values apart, and make them ready.
//   prepared  fpc_prepared_bytes(weights, m), aligned to 64
// Returns an FpcStatus.
int32_t fpc_prepare(const FpcWeights* weights, const FpcActivations* activations, const void* x,
                    int32_t input, int64_t m, int64_t stride, uint8_t* prepared, int32_t threads,
                    int32_t instructions);

enum FpcHead {
    FPC_RMS_NORM = 0,
    FPC_RMS_NORM_WIDE = 1,
    FPC_LAYER_NORM = 2,
    FPC_SILU = 3,
    FPC_GELU = 4,
    FPC_GELU_TANH = 5,
    FPC_RELU = 6
};
enum FpcTail { FPC_NO_TAIL = 0, FPC_MUL = 1, FPC_ADD = 2, FPC_MODULATE = 3 };

// What computes the values that are quantized; the formulas are in fpcompiler/runtime/fused.py.
typedef struct {
    int32_t head;          // FpcHead
    int32_t tail;          // FpcTail
    float eps;
    int32_t weight_type;   // FpcInput
    int32_t bias_type;     // FpcInput
    const void* weight;    // [k], or null
    const void* bias;      // [k], or null
} FpcProducer;

// Rows of `k` neighbouring values beside those of x: what belongs to row m of x is at
// data + m / repeat * stride.
typedef struct {
    const void* data;
    int64_t repeat;   // rows of x that share a row
    int64_t stride;   // bytes from one row to the next
    int32_t type;     // FpcInput
} FpcRows;

// The same for values that are computed from those of x; no tensor of them is stored.
//   producer      null for those of x themselves
//   scale, shift  what the tail reads, or null
int32_t fpc_prepare_produced(const FpcWeights* weights, const FpcActivations* activations,
                             const FpcProducer* producer, const FpcRows* scale,
                             const FpcRows* shift, const void* x, int32_t input, int64_t m,
                             int64_t stride, uint8_t* prepared, int32_t threads,
                             int32_t instructions);

// The same from rows that are quantized already.
//   codes        [m, k], one a byte
//   outer_scale  fp32 [1] per tensor, [m] per row, otherwise unused
//   block_scale  [m, ceil(k / block)]: fp32, or one code a byte
int32_t fpc_prepare_codes(const FpcWeights* weights, const FpcActivations* activations,
                          const uint8_t* codes, const float* outer_scale, const void* block_scale,
                          int64_t m, uint8_t* prepared, int32_t threads, int32_t instructions);

// Write `m` rows of results, or of their activation, `stride` values apart.
//   residual  null, or values of the same type as many apart, which are added; not y
// Returns an FpcStatus.
int32_t fpc_multiply(const FpcWeights* weights, const uint8_t* prepared, int64_t m, void* y,
                     const void* residual, int32_t output, int64_t stride, int32_t threads,
                     int32_t instructions);

// --- functions --------------------------------------------------------------------------------

enum FpcFunction { FPC_EXP = 0, FPC_ERF = 1, FPC_TANH = 2 };

// Write an FpcFunction of `count` values, as producers compute it.
void fpc_evaluate(int32_t function, const float* x, float* y, int64_t count, int32_t instructions);

// --- what this machine can do -------------------------------------------------------------------

// Read memory at its full speed. Returns the exclusive or of its 8-byte words, the last one filled
// up with zeros.
uint64_t fpc_read_bytes(const void* data, int64_t bytes, int32_t threads);

// Multiply and add at full speed, with the best instructions that this processor has for an
// FpcArithmetic. Returns how many operations were done, a product and a sum being two; 0 for
// another arithmetic.
int64_t fpc_peak(int32_t arithmetic, int64_t iterations, int32_t threads);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
#endif
