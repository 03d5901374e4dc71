// The activation of results that are stored, and sums with others. Included once per instruction
// set, after vectors.h.
//
// There is a loop for each type, so that what a conversion needs stays in registers.

#include "halves.h"

#include "activations.h"

template <int32_t kType>
static inline F widened(const uint8_t* from) {
    return kType == FPC_INPUT_F32 ? load<F>(from) : widen((const uint16_t*)from, kType);
}

template <int32_t kType>
static inline void store_rounded(uint8_t* to, F value) {
    if (kType == FPC_INPUT_F32) store(to, value);
    else if (kType == FPC_INPUT_BF16) store(to, narrow(rounded_to_bf16(value), kType));
    else store(to, narrow(rounded_to_f16(value), kType));
}

// Replace each of some neighbouring values by what `of` makes of it.
template <int32_t kType, class Function>
static inline void replace(uint8_t* values, int64_t count, const Function& of) {
    constexpr int64_t kSize = kType == FPC_INPUT_F32 ? 4 : 2;
    for (; count >= kLanes; count -= kLanes, values += kLanes * kSize)
        store_rounded<kType>(values, of(widened<kType>(values)));
    if (count <= 0) return;
    uint8_t last[kSize * kLanes] = {};
    __builtin_memcpy(last, values, count * kSize);
    store_rounded<kType>(last, of(widened<kType>(last)));
    __builtin_memcpy(values, last, count * kSize);
}

static constexpr int64_t kAhead = 4;  // rows that are fetched before they are needed

template <int32_t kType, class Function>
static void replace_rows(const Results& results, const Function& of) {
    const int64_t bytes = results.count * (kType == FPC_INPUT_F32 ? 4 : 2);
    uint8_t* row = results.y;
    for (int64_t m = 0; m < results.rows; m++, row += results.stride) {
        // Where rows are a power of two apart, few of them stay in the nearer caches.
        if (m + kAhead < results.rows)
            for (int64_t i = 0; i < bytes; i += 64)
                __builtin_prefetch(row + kAhead * results.stride + i, 1);
        replace<kType>(row, results.count, of);
    }
}

static void activate(const Results& results, int32_t head) {
    with_activation(head, [&](auto of) {
        switch (results.type) {
            case FPC_INPUT_F32: return replace_rows<FPC_INPUT_F32>(results, of);
            case FPC_INPUT_F16: return replace_rows<FPC_INPUT_F16>(results, of);
            default: return replace_rows<FPC_INPUT_BF16>(results, of);
        }
    });
}

template <int32_t kType>
static inline void add_row(uint8_t* values, const uint8_t* others, int64_t count) {
    constexpr int64_t kSize = kType == FPC_INPUT_F32 ? 4 : 2;
    for (; count >= kLanes; count -= kLanes, values += kLanes * kSize, others += kLanes * kSize)
        store_rounded<kType>(values, widened<kType>(values) + widened<kType>(others));
    if (count <= 0) return;
    uint8_t last[kSize * kLanes] = {}, other[kSize * kLanes] = {};
    __builtin_memcpy(last, values, count * kSize);
    __builtin_memcpy(other, others, count * kSize);
    store_rounded<kType>(last, widened<kType>(last) + widened<kType>(other));
    __builtin_memcpy(values, last, count * kSize);
}

static constexpr int64_t kFarAhead = 8;  // rows that come from memory

template <int32_t kType>
static void add_rows(const Results& results, const uint8_t* others) {
    const int64_t bytes = results.count * (kType == FPC_INPUT_F32 ? 4 : 2);
    uint8_t* row = results.y;
    for (int64_t m = 0; m < results.rows; m++, row += results.stride, others += results.stride) {
        for (int64_t i = 0; i < bytes; i += 64) {
            if (m + kAhead < results.rows)
                __builtin_prefetch(row + kAhead * results.stride + i, 1);
            if (m + kFarAhead < results.rows)
                __builtin_prefetch(others + kFarAhead * results.stride + i);
        }
        add_row<kType>(row, others, results.count);
    }
}

static void add(const Results& results, const uint8_t* others) {
    switch (results.type) {
        case FPC_INPUT_F32: return add_rows<FPC_INPUT_F32>(results, others);
        case FPC_INPUT_F16: return add_rows<FPC_INPUT_F16>(results, others);
        default: return add_rows<FPC_INPUT_BF16>(results, others);
    }
}
