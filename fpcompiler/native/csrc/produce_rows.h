// One row of what a fused quantizer rounds. Included once per instruction set, after
// quantize_rows.h.
//
// The definition is the table in fpcompiler/runtime/fused.py, which says where results are rounded.
// Each operation goes over the row, which stays in the first cache, and 16-bit operands are widened
// before: loops are short and know one type. Sums are fp64 in one order for all instruction sets,
// so these give the same bits.

#include "activations.h"

// --- rows -------------------------------------------------------------------------------------

// Call `set` with what each vector of a row is, and store what it returns.
template <class Set>
static inline void each(const float* from, float* to, int64_t count, const Set& set) {
    for (int64_t i = 0; i < count; i += kLanes) store(to + i, set(load<F>(from + i)));
}

static void round_row(float* row, int64_t count, int32_t type) {
    if (type == FPC_INPUT_BF16) each(row, row, count, rounded_to_bf16);
    if (type == FPC_INPUT_F16) each(row, row, count, rounded_to_f16);
}

// The type of a sum or product: two that differ have no common one but fp32.
static inline int32_t wider(int32_t a, int32_t b) { return a == b ? a : (int32_t)FPC_INPUT_F32; }

// Sixteen sums, and then halves of halves of them.
struct Sum {
    static constexpr int kParts = 16 / kLanes;
    D parts[kParts] = {};

    // Return the sum of what `term` gives for the vectors of `count` values, a multiple of 16.
    template <class Term>
    static inline float of(const float* row, int64_t count, const Term& term) {
        Sum sum;
        for (int64_t i = 0; i < count; i += 16)
            for (int j = 0; j < kParts; j++)
                sum.parts[j] += term(load<F>(row + i + j * kLanes));
        for (int n = kParts / 2; n; n /= 2)
            for (int j = 0; j < n; j++) sum.parts[j] += sum.parts[j + n];
        return (float)total(sum.parts[0]);
    }
};

static inline D wide_square(F value) {
    const D exact = wide(value);
    return {exact.low * exact.low, exact.high * exact.high};
}

// Rows beside those of x, as fp32 and filled up with zeros.
struct Beside {
    const FpcRows from;
    const int64_t k, count;
    float* buffer;  // [count]
    const void* last = nullptr;
    const float* values = nullptr;

    Beside(const FpcRows& rows, int64_t k, int64_t count, float* memory)
        : from(rows), k(k), count(count), buffer(memory) {}

    explicit operator bool() const { return from.data; }

    // What belongs to row `m` of x. Neighbouring rows of x often share it.
    const float* row(int64_t m, bool plus_one = false) {
        const uint8_t* at = (const uint8_t*)from.data + m / from.repeat * from.stride;
        if (at == last) return values;
        last = at;
        values = load_row(at, from.type, k, count, buffer);
        if (!plus_one) return values;
        each(values, buffer, count, [](F value) { return value + 1.0f; });
        round_row(buffer, count, from.type);
        return values = buffer;
    }
};

// Computes rows, in one thread.
struct Producer {
    const Values& values;
    const FpcProducer is;
    const int64_t k, padded;
    const int64_t count;  // of what is computed: whole vectors of 16
    Beside weight, bias, scale, shift;

    static int64_t bytes(int64_t k) { return 4 * 4 * whole(k); }

    Producer(const Values& from, int64_t k, int64_t padded, uint8_t* memory)
        : values(from),
          is(from.producer ? *from.producer : FpcProducer{}),
          k(k),
          padded(padded),
          count(whole(k)),
          weight({is.weight, 1, 0, is.weight_type}, k, count, (float*)memory),
          bias({is.bias, 1, 0, is.bias_type}, k, count, weight.buffer + count),
          scale(from.scale, k, count, bias.buffer + count),
          shift(from.shift, k, count, scale.buffer + count) {}

    // Return row `m`, filled up with zeros to `padded`; it is in `to` if it had to be written.
    const float* row(int64_t m, float* to) {
        const void* from = values.x + m * values.stride;
        if (!values.producer) return load_row(from, values.input, k, padded, to);
        const int32_t type = head(load_row(from, values.input, k, count, to), to);
        if (is.tail != FPC_NO_TAIL) tail(m, type, to);
        for (int64_t i = k; i < padded; i++) to[i] = 0;
        return to;
    }

   private:
    static int64_t whole(int64_t k) { return (k + 15) / 16 * 16; }

    // Return the type of the result.
    int32_t head(const float* x, float* to) {
        switch (is.head) {
            case FPC_RMS_NORM: return rms_norm(x, to);
            case FPC_RMS_NORM_WIDE: rms_norm_wide(x, to); break;
            case FPC_LAYER_NORM: layer_norm(x, to); break;
            default: with_activation(is.head, [=](auto of) { each(x, to, count, of); }); break;
        }
        round_row(to, count, values.input);
        return values.input;
    }

    float inverse_root(float square_sum) const {
        return 1.0f / __builtin_sqrtf(square_sum / (float)k + is.eps);
    }

    int32_t rms_norm(const float* x, float* to) {
        if (values.input == FPC_INPUT_F32) return rms_norm_wide(x, to), values.input;
        const float r = inverse_root(Sum::of(x, count, wide_square));
        each(x, to, count, [=](F value) { return value * r; });
        round_row(to, count, values.input);
        return weight ? multiply(to, values.input, weight.row(0), is.weight_type) : values.input;
    }

    void rms_norm_wide(const float* x, float* to) {
        const float r = inverse_root(Sum::of(x, count, wide_square));
        if (!weight) return each(x, to, count, [=](F value) { return value * r; });
        const float* factors = weight.row(0);
        for (int64_t i = 0; i < count; i += kLanes)
            store(to + i, load<F>(x + i) * r * load<F>(factors + i));
    }

    void layer_norm(const float* x, float* to) {
        const float m = Sum::of(x, count, wide) / (float)k;
        each(x, to, count, [=](F value) { return value - m; });
        for (int64_t i = k; i < count; i++) to[i] = 0;
        const float s = inverse_root(Sum::of(to, count, wide_square));
        each(to, to, count, [=](F value) { return value * s; });
        if (weight) multiply(to, FPC_INPUT_F32, weight.row(0), FPC_INPUT_F32);
        if (bias) add(to, FPC_INPUT_F32, bias.row(0), FPC_INPUT_F32);
    }

    void tail(int64_t m, int32_t type, float* to) {
        const bool plus_one = is.tail == FPC_MODULATE;
        if (scale) type = multiply(to, type, scale.row(m, plus_one), scale.from.type);
        if (shift) add(to, type, shift.row(m), shift.from.type);
    }

    int32_t multiply(float* row, int32_t type, const float* factors, int32_t other) const {
        for (int64_t i = 0; i < count; i += kLanes)
            store(row + i, load<F>(row + i) * load<F>(factors + i));
        round_row(row, count, wider(type, other));
        return wider(type, other);
    }

    void add(float* row, int32_t type, const float* terms, int32_t other) const {
        for (int64_t i = 0; i < count; i += kLanes)
            store(row + i, load<F>(row + i) + load<F>(terms + i));
        round_row(row, count, wider(type, other));
    }
};
