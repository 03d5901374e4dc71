// The activation of results that are stored. Included once per instruction set, after vectors.h.

#include "halves.h"

#include "activations.h"

static inline F widened(const uint8_t* from, int32_t type) {
    return type == FPC_INPUT_F32 ? load<F>(from) : widen((const uint16_t*)from, type);
}

static inline void store_rounded(uint8_t* to, int32_t type, F value) {
    if (type == FPC_INPUT_F32) store(to, value);
    else if (type == FPC_INPUT_BF16) store(to, narrow(rounded_to_bf16(value), type));
    else store(to, narrow(rounded_to_f16(value), type));
}

// Replace each of some neighbouring values by what `of` makes of it.
template <class Function>
static inline void replace(uint8_t* values, int32_t type, int64_t count, const Function& of) {
    const int64_t size = type == FPC_INPUT_F32 ? 4 : 2;
    for (; count >= kLanes; count -= kLanes, values += kLanes * size)
        store_rounded(values, type, of(widened(values, type)));
    if (count <= 0) return;
    uint8_t last[4 * kLanes] = {};
    __builtin_memcpy(last, values, count * size);
    store_rounded(last, type, of(widened(last, type)));
    __builtin_memcpy(values, last, count * size);
}

static constexpr int64_t kAhead = 4;  // rows that are fetched before they are needed

static inline void fetch(const uint8_t* row, const Results& results) {
    const int64_t bytes = results.count * (results.type == FPC_INPUT_F32 ? 4 : 2);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 1);
}

static void activate(const Results& results, int32_t head) {
    with_activation(head, [&](auto of) {
        uint8_t* row = results.y;
        for (int64_t m = 0; m < results.rows; m++, row += results.stride) {
            // Where rows are a power of two apart, few of them stay in the nearer caches.
            if (m + kAhead < results.rows) fetch(row + kAhead * results.stride, results);
            replace(row, results.type, results.count, of);
        }
    });
}
