// Weights in the order in which kernels use them; the layout is described in gemm.h.

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

    // Eight codes from octet `i` of a row; none are beyond its end, where only zeros are.
    uint32_t octet(int64_t row, int64_t i) const {
        const int64_t begin = 4 * i, left = row_bytes - begin;
        uint32_t codes = 0;
        if (left > 0) memcpy(&codes, packed + row * row_bytes + begin, left < 4 ? left : 4);
        const int64_t count = weights.k - 8 * i;
        return count >= 8 ? codes : codes & ((1u << (4 * (count > 0 ? count : 0))) - 1);
    }
};

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
        for (int64_t o = 0; o < layout.octets; o++)
            for (int64_t r = 0; r < rows; r++) {
                uint32_t codes = interleave(source.octet(first + r, g * layout.octets + o));
                memcpy(group + layout.scale_bytes + o * kOctet + 4 * r, &codes, 4);
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
