// Kernels in plain C++, for processors without vectors of their own here, and to compare with.

#include "gemm.h"

#include <string.h>

namespace {

float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

float e4m3(uint8_t code) {
    if (code < 8) return (float)code * 0x1p-9f;
    return as_float(((uint32_t)code << 20) + (120u << 23));
}

float weight_scale(const uint8_t* group, int32_t format, int64_t output) {
    if (format < 0) return 1;
    if (format == FPC_F32) return ((const float*)group)[output];
    if (format == FPC_E8M0) return as_float((uint32_t)group[output] << 23);
    return e4m3(group[output]);
}

uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// To nearest even; fp16 has no number between its largest and infinity.
uint16_t to_f16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7FFFFFFF;
    if (bits >= 0x47800000) return sign | (bits > 0x7F800000 ? 0x7E00 : 0x7C00);
    if (bits < 0x38800000) {
        // Adding 1/2 leaves the steps of subnormal numbers in the low bits.
        const float sum = as_float(bits) + 0.5f;
        uint32_t low;
        memcpy(&low, &sum, 4);
        return sign | (uint16_t)(low - 0x3F000000);
    }
    bits += 0xFFF + (bits >> 13 & 1);
    return sign | (uint16_t)((bits - 0x38000000) >> 13);
}

// Sums of one block for one row of activations.
struct Sums {
    int32_t integer[kBlock];
    float real[kBlock];
};

// Add the products of a group; `decode(byte)` is what a byte of wider codes stands for, or a nibble.
template <class A, class Sum, class Decode>
void add_products(const Layout& layout, const uint8_t* octet, const A* a, Sum* sums,
                  const Decode& decode) {
    const bool nibbles = layout.octet_bytes == kOctet;
    for (int64_t o = 0; o < layout.octets; o++, octet += layout.octet_bytes, a += 8)
        for (int64_t j = 0; j < kOctet; j++) {
            const uint8_t low = nibbles ? octet[j] & 15 : octet[j];
            const uint8_t high = nibbles ? octet[j] >> 4 : octet[kOctet + j];
            sums[j / 4] += decode(low) * a[j % 4] + decode(high) * a[4 + j % 4];
        }
}

void add_integers(const Gemm& gemm, const uint8_t* codes, const int8_t* a, int32_t* sums) {
    const uint8_t* table = gemm.weights.integers;
    if (gemm.weights.code_bits == 4)
        add_products(gemm.layout, codes, a, sums, [=](uint8_t code) { return table[code]; });
    else
        add_products(gemm.layout, codes, a, sums, [](uint8_t integer) { return integer; });
}

void add_floats(const Gemm& gemm, const uint8_t* codes, const float* a, float* sums) {
    const float* table = gemm.weights.values;
    if (gemm.weights.code_bits == 4)
        add_products(gemm.layout, codes, a, sums, [=](uint8_t code) { return table[code]; });
    else
        add_products(gemm.layout, codes, a, sums, [=](uint8_t byte) {
            return byte & 0x80 ? -table[byte & 0x7F] : table[byte];
        });
}

void store(const Gemm& gemm, int64_t m, int64_t n, float value) {
    uint8_t* row = gemm.y + m * gemm.y_stride;
    if (gemm.output == FPC_INPUT_F32) ((float*)row)[n] = value;
    else if (gemm.output == FPC_INPUT_BF16) ((uint16_t*)row)[n] = to_bf16(value);
    else ((uint16_t*)row)[n] = to_f16(value);
}

void run_row(const Gemm& gemm, const Task& task, int64_t m) {
    const FpcWeights& weights = gemm.weights;
    const Layout& layout = gemm.layout;
    const Prepared& prepared = gemm.activations;
    const bool integers = weights.arithmetic == FPC_INT8;
    float total[kBlock] = {};
    const uint8_t* group = gemm.block(task.block);
    for (int64_t g = 0; g < layout.groups; g++, group += layout.group_bytes) {
        Sums sums;
        for (int64_t r = 0; r < kBlock; r++)
            sums.integer[r] = integers ? prepared.correction[g * prepared.m + m] : 0, sums.real[r] = 0;
        const uint8_t* a = prepared.a + m * prepared.stride;
        const int64_t first = g * layout.octets * 8;
        const uint8_t* codes = group + layout.scale_bytes;
        if (integers) add_integers(gemm, codes, (const int8_t*)a + first, sums.integer);
        else add_floats(gemm, codes, (const float*)a + first, sums.real);
        const float other = weights.scaled_inputs && integers
                                ? prepared.group_scale[g * prepared.m + m] : 1;
        for (int64_t r = 0; r < kBlock; r++) {
            const float sum = integers ? (float)sums.integer[r] : sums.real[r];
            if (!weights.group) total[r] = sum;
            else total[r] += sum * (weight_scale(group, weights.block_scale, r) * other);
        }
    }
    const float unit = integers ? weights.unit : 1;
    const int64_t begin = 16 * task.first, end = begin + 16 * task.count;
    for (int64_t r = begin; r < end; r++) {
        const int64_t n = task.block * kBlock + r;
        if (n >= weights.n) return;
        float value = total[r] * unit * prepared.token_scale[m] * weights.row_scale[n];
        store(gemm, m, n, weights.bias ? value + weights.bias[n] : value);
    }
}

void run(const Gemm& gemm, const Task& task, uint8_t*) {
    for (int64_t m = task.begin; m < task.end; m++) run_row(gemm, task, m);
}

}  // namespace

Kernels kernels_portable(const Gemm&) { return {run, 0}; }
