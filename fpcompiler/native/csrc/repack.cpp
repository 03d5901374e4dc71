// Weights in the order in which kernels use them; layout.h describes it.

#include <string.h>

#include "layout.h"

namespace {

// The eight codes of a row, one a nibble, as four bytes: byte i has code i and code i + 4.
uint32_t interleave(uint32_t codes) {
    uint32_t low = codes & 0xFFFF, high = codes >> 16;
    low = (low | low << 8) & 0x00FF00FF;
    high = (high | high << 8) & 0x00FF00FF;
    low = (low | low << 4) & 0x0F0F0F0F;
    high = (high | high << 4) & 0x0F0F0F0F;
    return low | high << 4;
}

struct Source {
    const FpcWeights& weights;
    const uint8_t* packed;
    int64_t row_bytes;
    const uint8_t* scales;
    int64_t repeat;

    int64_t scale_size() const { return weights.block_scale == FPC_F32 ? 4 : 1; }

    int64_t row_scales() const {
        int64_t length = weights.group * repeat;
        return (weights.k + length - 1) / length;
    }

    // Eight codes from octet `i` of a row, the first one in the lowest bits; beyond its end are zeros.
    uint64_t octet(int64_t row, int64_t i) const {
        const int64_t bits = weights.code_bits, begin = bits * i, left = row_bytes - begin;
        uint64_t codes = 0;
        if (left > 0) memcpy(&codes, packed + row * row_bytes + begin, left < bits ? left : bits);
        const int64_t count = weights.k - 8 * i;
        return count >= 8 ? codes : codes & ((1ull << (bits * (count > 0 ? count : 0))) - 1);
    }
};

// What is stored for a code of six or eight bits.
uint8_t byte_of(const FpcWeights& weights, uint8_t code) {
    if (weights.arithmetic == FPC_INT8) return weights.integers[code];
    return weights.code_bits == 6 ? (uint8_t)((code & 31) | (code & 32) << 2) : code;
}

// Store the octet of one output in a block, `to` being where its first byte is.
void store_octet(const FpcWeights& weights, uint64_t codes, uint8_t* to) {
    if (weights.code_bits == 4) {
        const uint32_t nibbles = interleave((uint32_t)codes);
        memcpy(to, &nibbles, 4);
        return;
    }
    const uint64_t mask = (1u << weights.code_bits) - 1;
    for (int j = 0; j < 8; j++) {
        const uint8_t code = (uint8_t)(codes >> (weights.code_bits * j) & mask);
        to[kOctet * (j / 4) + j % 4] = byte_of(weights, code);
    }
}

void repack_block(const Source& source, const Layout& layout, int64_t block, uint8_t* to) {
    const FpcWeights& weights = source.weights;
    const int64_t first = block * kBlock, size = source.scale_size();
    const int64_t rows = weights.n - first < kBlock ? weights.n - first : kBlock;
    for (int64_t g = 0; g < layout.groups; g++) {
        uint8_t* group = to + g * layout.group_bytes;
        memset(group, 0, layout.group_bytes);
        if (layout.scale_bytes)
            for (int64_t r = 0; r < rows; r++) {
                const int64_t at = (first + r) * source.row_scales() + g / source.repeat;
                memcpy(group + r * size, source.scales + at * size, size);
            }
        uint8_t* octet = group + layout.scale_bytes;
        for (int64_t o = 0; o < layout.octets; o++, octet += layout.octet_bytes)
            for (int64_t r = 0; r < rows; r++) {
                const uint64_t codes = source.octet(first + r, g * layout.octets + o);
                store_octet(weights, codes, octet + 4 * r);
            }
    }
}

}  // namespace

extern "C" int64_t fpc_weight_bytes(const FpcWeights* weights) {
    return Layout(*weights).bytes();
}

extern "C" void fpc_repack(const FpcWeights* weights, const uint8_t* packed, int64_t row_bytes,
                           const void* scales, int64_t repeat, uint8_t* to, int32_t threads) {
    const Layout layout(*weights);
    const Source source{*weights, packed, row_bytes, (const uint8_t*)scales, repeat};
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t b = 0; b < layout.blocks; b++)
        repack_block(source, layout, b, to + b * layout.block_bytes());
}
