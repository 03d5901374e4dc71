// Quantization of one row. Included once per instruction set, after vectors.h.
//
// The definition is fpcompiler/numerics/scaling.py; the results are the same bit for bit. No product
// is fused with a sum (-ffp-contract=off), and subnormal numbers are not flushed.

#include "grid.h"

#include "halves.h"

static constexpr float kSmallest = 0x1p-126f;

// --- input ------------------------------------------------------------------------------------

// Return the row as fp32, filled up with zeros to `padded` values.
static const float* load_row(const void* row, int32_t input, int64_t k, int64_t padded,
                             float* buffer) {
    if (input == FPC_INPUT_F32) {
        if (k == padded) return (const float*)row;
        __builtin_memcpy(buffer, row, 4 * k);
    } else {
        const uint16_t* halves = (const uint16_t*)row;
        int64_t i = 0;
        for (; i + kLanes <= k; i += kLanes) store(buffer + i, widen(halves + i, input));
        if (i < k) {
            uint16_t last[kLanes] = {};
            __builtin_memcpy(last, halves + i, 2 * (k - i));
            store(buffer + i, widen(last, input));
        }
    }
    for (int64_t i = k; i < padded; i++) buffer[i] = 0;
    return buffer;
}

static int32_t largest_bits(const float* values, int64_t count) {
    I result{};
    for (int64_t i = 0; i < count; i += kLanes)
        result = larger(result, magnitude(load<F>(values + i)));
    return largest(result);
}

// --- scales -----------------------------------------------------------------------------------

static inline float as_float(int32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

static inline float power_below(float value) {
    int32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return as_float(bits & kExponentMask);
}

// real_scale of fpcompiler/numerics/scales.py.
static float real_scale(float amax, const FpcOperand& operand) {
    float most = operand.element.max, least = kSmallest;
    if (operand.block_scale == FPC_E4M3 && operand.block) most *= 448.0f, least = 0x1p-117f;
    float scale = amax / most;
    if (amax == 0) return 1;
    return scale < least ? least : scale;
}

// E8M0 as a grid of powers of two from 2**-126, and the E4M3 of NVFP4.
struct ScalePair {
    F low, high;
};

static inline F power_below(F value) { return (F)((I)value & kExponentMask); }

static inline ScalePair e8m0_pair(F amax, F ratio, float least, const FpcOperand& operand) {
    if (operand.rounding == FPC_FLOOR) {
        // `amax` is that of the block over the outer scale.
        I exponent = ((I)amax & kExponentMask) - (operand.element.max_exponent << 23);
        F scale = (F)larger(exponent, splat(1 << 23));
        scale = scale < least ? splat(least) : scale;
        return {scale, scale};
    }
    ratio = ratio < least ? splat(least) : ratio;
    ratio = ratio > 0x1p127f ? splat(0x1p127f) : ratio;
    if (operand.rounding == FPC_RNE) {
        F nearest = (F)(((I)ratio + (1 << 22)) & kExponentMask);
        return {nearest, nearest};
    }
    F low = power_below(ratio), high = low < ratio ? low * 2 : low;
    return {operand.rounding == FPC_CEIL ? high : low, high};
}

static inline F e4m3_value(I code) {
    F normal = (F)((code << 20) + (120 << 23));
    F subnormal = __builtin_convertvector(code, F) * 0x1p-9f;
    return code < 8 ? subnormal : normal;
}

static inline ScalePair e4m3_pair(F ratio, const FpcOperand& operand) {
    const Grid grid({3, 7, -6, 8, 448});
    ratio = ratio < 0x1p-9f ? splat(0x1p-9f) : ratio;
    ratio = ratio > 448.0f ? splat(448.0f) : ratio;
    Rounded rounded(ratio, grid);
    F nearest = rounded.value();
    if (operand.rounding == FPC_RNE) return {nearest, nearest};
    I code = rounded.code(grid);
    // Comparisons of vectors are 0 or -1.
    F low = e4m3_value(code + (I)(nearest > ratio)), high = e4m3_value(code - (I)(nearest < ratio));
    if (operand.rounding == FPC_FLOOR) return {low, low};
    return {operand.rounding == FPC_CEIL ? high : low, high};
}

// --- rows -------------------------------------------------------------------------------------

// The memory that a row needs, in values; see Row.
static inline int64_t padded_length(const FpcOperand& operand, int64_t k) {
    int64_t unit = operand.block ? operand.block : 16;
    return (k + unit - 1) / unit * unit;
}

struct Row {
    const FpcOperand& operand;
    const Grid grid, doubled;
    const int64_t k, padded, blocks, padded_blocks;
    float* values;    // [padded]: the row as fp32
    float* amax;      // [padded_blocks]
    float* low;       // [padded_blocks]: the scales to choose from
    float* high;      // [padded_blocks]
    float* factors;   // [padded_blocks]
    double* gains;    // [padded_blocks]
    uint8_t* chosen_codes;  // [padded_blocks]
    uint8_t* codes;   // [padded + 64]

    static int64_t bytes(const FpcOperand& operand, int64_t k) {
        int64_t length = padded_length(operand, k);
        return 4 * length + (4 * 4 + 8 + 1) * blocks_of(operand, k) + length + 128;
    }

    static int64_t blocks_of(const FpcOperand& operand, int64_t k) {
        int64_t count = operand.block ? padded_length(operand, k) / operand.block : 1;
        return (count + 15) / 16 * 16;
    }

    Row(const FpcOperand& o, int64_t k, void* memory)
        : operand(o),
          grid(o.element),
          doubled(o.element, 1),
          k(k),
          padded(padded_length(o, k)),
          blocks(o.block ? padded / o.block : 1),
          padded_blocks(blocks_of(o, k)) {
        values = (float*)memory;
        amax = values + padded;
        low = amax + padded_blocks;
        high = low + padded_blocks;
        factors = high + padded_blocks;
        gains = (double*)(factors + padded_blocks);
        chosen_codes = (uint8_t*)(gains + padded_blocks);
        codes = chosen_codes + padded_blocks;
    }

    // Return a row as fp32, filled up with zeros to `padded`; in `values` if it is not so already.
    const float* read(const void* from, int32_t input) const {
        return load_row(from, input, k, padded, values);
    }

    // The bits of the largest magnitude of a row.
    int32_t largest(const float* row) const { return largest_bits(row, padded); }

    static float scale_of(int32_t bits, const FpcOperand& operand) {
        return real_scale(as_float(bits), operand);
    }

    // Write the packed codes of a row, as `read` returns it, and its scales; `outer` is that of the
    // tensor, or where that of the row goes.
    int32_t quantize(const float* row, uint8_t* to, float* outer, void* block_scale) {
        const int32_t status = encode(row, outer, block_scale);
        if (status == FPC_OK) pack(to);
        return status;
    }

    // Leave the codes of a row in `codes`, one a byte.
    int32_t encode(const float* row, float* outer, void* block_scale) {
        int64_t width = operand.block ? operand.block : padded;
        int32_t most = 0;
        for (int64_t b = 0; b < blocks; b++) {
            int32_t bits = largest_bits(row + b * width, width);
            amax[b] = as_float(bits);
            most = bits > most ? bits : most;
        }
        if (most >= kExponentMask) return FPC_NOT_FINITE;
        if (operand.outer == FPC_PER_ROW) *outer = real_scale(as_float(most), operand);
        float shared = operand.outer ? *outer : 1;
        if (!operand.block) {
            encode(row, padded, splat(shared), codes);
        } else if (operand.block_scale == FPC_F32) {
            for (int64_t b = 0; b < blocks; b++) {
                float scale = real_scale(amax[b], operand);
                ((float*)block_scale)[b] = scale;
                encode(row + b * width, width, splat(scale), codes + b * width);
            }
        } else {
            encode_blocks(row, shared, (uint8_t*)block_scale);
        }
        return FPC_OK;
    }

   private:
    void encode(const float* from, int64_t count, F scale, uint8_t* to) const {
        const Grid g = grid;
        for (int64_t i = 0; i < count; i += kLanes)
            store_bytes(to + i, signed_code(load<F>(from + i) / scale, g));
    }

    void encode_blocks(const float* row, float outer, uint8_t* scales) {
        choose_pairs(outer);
        switch (operand.block) {
            case 16: return encode_blocks_of<16>(row, outer, scales);
            case 32: return encode_blocks_of<32>(row, outer, scales);
            case 64: return encode_blocks_of<64>(row, outer, scales);
            default: return encode_blocks_of<128>(row, outer, scales);
        }
    }

    template <int kWidth>
    void encode_blocks_of(const float* row, float outer, uint8_t* scales) {
        const bool powers = operand.block_scale == FPC_E8M0, better = operand.rounding == FPC_MSE;
        const float shared = operand.outer ? outer : 1;
        if (powers && better) {
            // A quotient by a power of two is the product with its inverse, bit for bit.
            if (operand.outer) encode_better_powers<kWidth, false>(row, shared, scales);
            else encode_better_powers<kWidth, true>(row, shared, scales);
            return;
        }
        if (better) choose_e4m3<kWidth>(row, outer);
        for (int64_t b = 0; b < blocks; b++) {
            const float scale = amax[b] == 0 ? 1 : high[b];
            scales[b] = powers ? (uint8_t)(bits_of(scale) >> 23) : e4m3_code(scale);
            encode(row + b * kWidth, kWidth, splat(scale * shared), codes + b * kWidth);
        }
    }

    // Encode each block with the better one of its pair: the low one if its error is smaller.
    //
    // Over the low scale the numbers of the high one are those of the grid with a bias one less;
    // _gain_of_half of fpcompiler/numerics/scales.py. What is chosen is known long after the last
    // value of a block, so blocks are chosen together and encoded in a loop of their own.
    template <int kWidth, bool kInverse>
    void encode_better_powers(const float* row, float shared, uint8_t* scales) {
        const Grid fine = grid, coarse = doubled;
        float *quotients = values, *divisors = factors;
        for (int64_t b = 0; b < padded_blocks; b += kLanes) {
            const F scale = load<F>(low + b) * shared;
            store(divisors + b, kInverse ? 1.0f / scale : scale);
        }
        for (int64_t b = 0; b < blocks; b++) {
            const F divisor = splat(divisors[b]);
            D gain{};
            for (int i = 0; i < kWidth; i += kLanes) {
                const F from = load<F>(row + b * kWidth + i);
                const F quotient = kInverse ? from * divisor : from / divisor;
                store(quotients + b * kWidth + i, quotient);
                const F value = (F)magnitude(quotient);
                const F a = Rounded(value, fine).value(), c = Rounded(value, coarse).value();
                gain += wide((c - a) * ((c + a) - 2 * value));
            }
            gains[b] = total(gain);
        }
        choose_powers(scales);
        for (int64_t b = 0; b < blocks; b++) {
            const F factor = splat(factors[b]);
            for (int i = 0; i < kWidth; i += kLanes) {
                const F quotient = load<F>(quotients + b * kWidth + i);
                store_bytes(codes + b * kWidth + i, signed_code(quotient * factor, fine));
            }
        }
    }

    // Choose the low scale where that is a gain, and leave in `factors` what quotients by the low
    // scale are to be multiplied with.
    void choose_powers(uint8_t* scales) {
        for (int64_t b = 0; b < padded_blocks; b += kLanes) {
            const F a = load<F>(low + b), c = load<F>(high + b);
            const I keep_low = positive(gains + b) | (a == c);
            store(factors + b, keep_low ? splat(1.0f) : splat(0.5f));
            const F chosen = load<F>(amax + b) == 0.0f ? splat(1.0f) : keep_low ? a : c;
            store_bytes(chosen_codes + b, (I)chosen >> 23);
        }
        __builtin_memcpy(scales, chosen_codes, blocks);
    }

    // Which of some doubles are positive, as a mask.
    static I positive(const double* from) {
        I mask;
        for (int lane = 0; lane < kLanes; lane++) mask[lane] = -(int32_t)(from[lane] > 0);
        return mask;
    }

    template <int kWidth>
    void choose_e4m3(const float* row, float outer) {
        const float shared = operand.outer ? outer : 1;
        for (int64_t b = 0; b < blocks; b++) {
            const float* block = row + b * kWidth;
            const double loss_low = squared_error<kWidth>(block, low[b] * shared);
            const double loss_high = squared_error<kWidth>(block, high[b] * shared);
            high[b] = either(loss_high - loss_low > 0, low[b], high[b]);
        }
    }

    template <int kWidth>
    double squared_error(const float* block, float scale) const {
        const Grid g = grid;
        D sum{};
        for (int i = 0; i < kWidth; i += kLanes) {
            F value = (F)magnitude(load<F>(block + i) / splat(scale));
            F error = Rounded(value, g).value() - value;
            sum += wide(error * error);
        }
        return total(sum) * ((double)scale * (double)scale);
    }

    // A choice that is a coin toss must not become a branch.
    static float either(bool first, float a, float b) {
        return as_float(bits_of(b) ^ ((bits_of(a) ^ bits_of(b)) & -(int32_t)first));
    }

    static int32_t bits_of(float value) {
        int32_t bits;
        __builtin_memcpy(&bits, &value, 4);
        return bits;
    }

    static uint8_t e4m3_code(float scale) {
        if (scale < 0x1p-6f) return (uint8_t)(scale * 512);
        return (uint8_t)((bits_of(scale) >> 20) - (120 << 3));
    }

    // Fill low and high. Without an outer scale it is 1, and dividing by it changes nothing.
    void choose_pairs(float outer) {
        for (int64_t b = blocks; b < padded_blocks; b++) amax[b] = 0;
        float most = outer * operand.element.max;
        most = most > 0x1.FFFFFEp127f ? 0x1.FFFFFEp127f : most;
        float least = kSmallest;
        if (operand.outer) least = kSmallest / power_below(outer);
        least = least < kSmallest ? kSmallest : least;
        for (int64_t b = 0; b < padded_blocks; b += kLanes) {
            F value = load<F>(amax + b);
            ScalePair pair = operand.block_scale == FPC_E8M0
                                 ? e8m0_pair(value / outer, value / most, least, operand)
                                 : e4m3_pair(value / most, operand);
            store(low + b, pair.low);
            store(high + b, pair.high);
        }
    }

    void pack(uint8_t* __restrict to) const {
        const uint8_t* __restrict from = codes;
        const int64_t count = k;
        if (operand.code_bits == 8) {
            __builtin_memcpy(to, from, count);
        } else if (operand.code_bits == 4) {
            for (int64_t i = 0; i < (count + 1) / 2; i++) {
                uint16_t pair;
                __builtin_memcpy(&pair, from + 2 * i, 2);
                to[i] = (uint8_t)(pair | pair >> 4);
            }
        } else {
            // Eight codes become six bytes. Two more are written, which the next step overwrites.
            const int64_t groups = (count + 3) / 4;
            int64_t i = 0;
            for (; i + 2 < groups; i += 2) {
                uint64_t eight;
                __builtin_memcpy(&eight, from + 4 * i, 8);
                eight = (eight & 0x003F003F003F003F) | (eight & 0x3F003F003F003F00) >> 2;
                eight = (eight & 0x00000FFF00000FFF) | (eight & 0x0FFF00000FFF0000) >> 4;
                eight = (eight & 0x0000000000FFFFFF) | (eight & 0x00FFFFFF00000000) >> 8;
                __builtin_memcpy(to + 3 * i, &eight, 8);
            }
            for (; i < groups; i++) {
                uint32_t four;
                __builtin_memcpy(&four, from + 4 * i, 4);
                four = (four & 0x003F003F) | (four & 0x3F003F00) >> 2;
                four = (four & 0x00000FFF) | (four & 0x0FFF0000) >> 4;
                __builtin_memcpy(to + 3 * i, &four, 3);
            }
        }
    }
};
