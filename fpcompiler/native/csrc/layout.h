// Where weights and activations lie in memory while they are multiplied.
//
// Weights are in blocks of 64 outputs. In a block, a group of inputs (or all of them, where nothing
// has scales of blocks) has its 64 scales first and its codes after them, in the order in which they
// are used, so that the product with one vector reads memory in one direction:
//
//   [outputs / 64][groups][64 scales][inputs of a group / 8][4 vectors][64 bytes]
//
// Byte j of a vector belongs to the output 16 * vector + j / 4. Its low nibble is the code of the
// input 8 * i + j % 4, its high one that of the input four further.
//
// Codes of six and eight bits are bytes, those of the inputs four further in vectors of their own:
//
//   [outputs / 64][groups][64 scales][inputs of a group / 8][2][4 vectors][64 bytes]
//
// Such a byte is the integer with the offset (int8), or else the code with its sign in bit 7.
//
// Activations are rows of int8, bf16 or fp32, filled up with zeros to whole groups, and then what
// belongs to the rows: scales, and what their sums of integers start from.

#ifndef FPC_LAYOUT_H
#define FPC_LAYOUT_H

#include "native.h"

static constexpr int64_t kBlock = 64;    // outputs of a block
static constexpr int64_t kOctet = 256;   // bytes of the codes of eight inputs of a block, in nibbles

static inline int64_t round_up(int64_t value, int64_t unit) {
    return (value + unit - 1) / unit * unit;
}

struct Layout {
    int64_t blocks;
    int64_t groups;       // of inputs
    int64_t octets;       // of inputs, in a group
    int64_t octet_bytes;  // of the codes of an octet
    int64_t scale_bytes;  // of a group of a block
    int64_t group_bytes;  // with its scales

    explicit Layout(const FpcWeights& weights) {
        blocks = (weights.n + kBlock - 1) / kBlock;
        const int64_t length = weights.group ? weights.group : round_up(weights.k, 8);
        groups = length ? (weights.k + length - 1) / length : 0;
        octets = length / 8;
        octet_bytes = weights.code_bits == 4 ? kOctet : 2 * kOctet;
        scale_bytes = weights.block_scale < 0 ? 0 : kBlock * (weights.block_scale == FPC_F32 ? 4 : 1);
        group_bytes = scale_bytes + octets * octet_bytes;
    }

    int64_t inputs() const { return groups * octets * 8; }
    int64_t block_bytes() const { return groups * group_bytes; }
    int64_t bytes() const { return blocks * block_bytes(); }
};

// The parts of prepared activations.
struct Prepared {
    uint8_t* a;           // [m] rows
    int64_t stride;       // bytes of a row
    float* token_scale;   // [m]
    int64_t m;
    int32_t* correction;  // [groups, m]: neighbours are what a tile needs at a time
    float* group_scale;   // [groups, m]
    int32_t* range;       // [m, 2]: least and largest bits of the row's group scales
    int64_t bytes;

    Prepared(const FpcWeights& weights, const Layout& layout, uint8_t* memory, int64_t rows) {
        m = rows;
        const int64_t size = weights.arithmetic == FPC_INT8 ? 1 : weights.arithmetic == FPC_BF16 ? 2 : 4;
        // One line more, so that rows do not all begin in the same set of the cache.
        stride = round_up(layout.inputs() * size, 64) + 64;
        a = memory;
        token_scale = (float*)(a + m * stride);
        correction = (int32_t*)(token_scale + m);
        group_scale = (float*)(correction + m * layout.groups);
        range = (int32_t*)(group_scale + m * layout.groups);
        bytes = (uint8_t*)(range + 2 * m) - memory;
    }
};

#endif
