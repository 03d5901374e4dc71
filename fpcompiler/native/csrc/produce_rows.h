// One row of what a fused quantizer rounds. Included once per instruction set, after quantize_rows.h.
//
// The definition is the table in fpcompiler/runtime/fused.py, which says where results are rounded.
// Sums are fp64 in one order for all instruction sets, so these give the same bits.

#include "functions.h"

// --- types ------------------------------------------------------------------------------------

static inline F rounded_to_bf16(F value) {
    const U bits = (U)value, nearest = bits + 0x7FFF + (bits >> 16 & 1);
    return value == value ? (F)(nearest & 0xFFFF0000) : value;
}

static inline F rounded_to_f16(F value) {
    const I size = magnitude(value), exponent = larger(size & kExponentMask, splat(113 << 23));
    const F big = (F)(exponent + ((13 << 23) | 0x400000));  // see Rounded in quantize_rows.h
    const F infinite = splat(__builtin_inff()), nearest = ((F)size + big) - big;
    const F finite = nearest > 65504.0f ? infinite : nearest;
    const F special = value == value ? infinite : value;
    return with_sign_of((F)size < 65536.0f ? finite : special, value);
}

static inline F rounded_to(F value, int32_t type) {
    if (type == FPC_INPUT_F32) return value;
    return type == FPC_INPUT_BF16 ? rounded_to_bf16(value) : rounded_to_f16(value);
}

// The type of a sum or product: two that differ have no common one but fp32.
static inline int32_t wider(int32_t a, int32_t b) { return a == b ? a : (int32_t)FPC_INPUT_F32; }

// A row beside that of x.
struct Channels {
    const uint8_t* data;  // null: there is none
    int32_t type;
    int64_t k;

    Channels(const void* from, int32_t type, int64_t k)
        : data((const uint8_t*)from), type(type), k(k) {}

    // Of the row that belongs to row `m` of x.
    Channels(const FpcRows& rows, int64_t m, int64_t k)
        : Channels(rows.data, rows.type, k) {
        if (data) data += m / rows.repeat * rows.stride;
    }

    // Those from `i` on, with zeros behind the last one.
    F at(int64_t i) const {
        if (i + kLanes > k) return last(i);
        if (type == FPC_INPUT_F32) return load<F>((const float*)data + i);
        return widen((const uint16_t*)data + i, type);
    }

   private:
    F last(int64_t i) const {
        const int64_t size = type == FPC_INPUT_F32 ? 4 : 2;
        uint16_t buffer[2 * kLanes] = {};
        __builtin_memcpy(buffer, data + i * size, (k - i) * size);
        return type == FPC_INPUT_F32 ? load<F>(buffer) : widen(buffer, type);
    }
};

// --- sums -------------------------------------------------------------------------------------

// Sixteen sums, and then halves of halves of them.
struct Sum {
    static constexpr int kParts = 16 / kLanes;
    D parts[kParts] = {};

    // Add what `term` gives for each of `count` values, a multiple of 16.
    template <class Term>
    static float of(int64_t count, const Term& term) {
        Sum sum;
        for (int64_t i = 0; i < count; i += 16)
            for (int j = 0; j < kParts; j++) sum.parts[j] += term(i + j * kLanes);
        for (int n = kParts / 2; n; n /= 2)
            for (int j = 0; j < n; j++) sum.parts[j] += sum.parts[j + n];
        return (float)total(sum.parts[0]);
    }
};

static inline D squared(F value) {
    const D wide = __builtin_convertvector(value, D);
    return wide * wide;
}

// --- rows -------------------------------------------------------------------------------------

struct Producer {
    const FpcProducer& is;
    const int32_t type;  // of x
    const int64_t k, padded;
    const Channels weight, bias, scale, shift;

    // What row `m` is made with.
    Producer(const Values& from, int64_t m, int64_t k, int64_t padded)
        : is(*from.producer),
          type(from.input),
          k(k),
          padded(padded),
          weight(is.weight, is.weight_type, k),
          bias(is.bias, is.bias_type, k),
          scale(from.scale, m, k),
          shift(from.shift, m, k) {}

    // Write the values of a row, filled up with zeros to `padded`, a multiple of 16.
    void produce(const void* from, float* to) const {
        const float* x = load_row(from, type, k, padded, to);
        switch (is.head) {
            case FPC_RMS_NORM: return rms_norm(x, to);
            case FPC_RMS_NORM_WIDE: return rms_norm_wide(x, to);
            case FPC_LAYER_NORM: return layer_norm(x, to);
            case FPC_SILU: return write(to, type, [&](int64_t i) {
                const F value = load<F>(x + i);
                return value / (exp_of(-value) + 1.0f);
            });
            case FPC_GELU: return write(to, type, [&](int64_t i) {
                const F value = load<F>(x + i);
                return value * 0.5f * (erf_of(value * 0.707106781186547524f) + 1.0f);
            });
            case FPC_GELU_TANH: return write(to, type, [&](int64_t i) {
                const F value = load<F>(x + i), cube = value * value * value;
                const F inner = (value + cube * 0.044715f) * 0.797884560802865356f;
                return value * 0.5f * (tanh_of(inner) + 1.0f);
            });
            default: return write(to, type, [&](int64_t i) {
                const F value = load<F>(x + i);
                return value < 0.0f ? F{} : value;
            });
        }
    }

   private:
    float inverse_root(float square_sum) const {
        return 1.0f / __builtin_sqrtf(square_sum / (float)k + is.eps);
    }

    float inverse_size(const float* x) const {
        return inverse_root(Sum::of(padded, [&](int64_t i) { return squared(load<F>(x + i)); }));
    }

    void rms_norm(const float* x, float* to) const {
        const float r = inverse_size(x);
        if (!weight.data)
            return write(to, type, [&](int64_t i) { return load<F>(x + i) * r; });
        write(to, wider(type, weight.type), [&](int64_t i) {
            return rounded_to(load<F>(x + i) * r, type) * weight.at(i);
        });
    }

    void rms_norm_wide(const float* x, float* to) const {
        const float r = inverse_size(x);
        write(to, type, [&](int64_t i) {
            const F value = load<F>(x + i) * r;
            return weight.data ? value * weight.at(i) : value;
        });
    }

    void layer_norm(const float* x, float* to) const {
        const float m = Sum::of(padded, [&](int64_t i) {
            return __builtin_convertvector(load<F>(x + i), D);
        }) / (float)k;
        const float s = inverse_root(Sum::of(padded, [&](int64_t i) {
            const F distance = load<F>(x + i) - m;
            return squared(i + kLanes > k ? first(distance, k - i) : distance);
        }));
        write(to, type, [&](int64_t i) {
            F value = (load<F>(x + i) - m) * s;
            if (weight.data) value = value * weight.at(i);
            return bias.data ? value + bias.at(i) : value;
        });
    }

    // Zeros in place of the lanes from `count` on.
    static F first(F value, int64_t count) {
        for (int lane = 0; lane < kLanes; lane++) value[lane] = lane < count ? value[lane] : 0;
        return value;
    }

    // `head` gives values that are rounded to `rounding` then.
    template <class Head>
    void write(float* to, int32_t rounding, const Head& head) const {
        for (int64_t i = 0; i < k; i += kLanes)
            store(to + i, tail(rounded_to(head(i), rounding), rounding, i));
        for (int64_t i = k; i < padded; i++) to[i] = 0;
    }

    F tail(F h, int32_t rounding, int64_t i) const {
        if (is.tail == FPC_NO_TAIL) return h;
        if (scale.data) {
            F factor = scale.at(i);
            if (is.tail == FPC_MODULATE) factor = rounded_to(factor + 1.0f, scale.type);
            rounding = wider(rounding, scale.type);
            h = rounded_to(h * factor, rounding);
        }
        return shift.data ? rounded_to(h + shift.at(i), wider(rounding, shift.type)) : h;
    }
};
