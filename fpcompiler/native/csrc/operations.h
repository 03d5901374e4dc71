// What the parts of a program share: addresses, and loops over views.

#ifndef FPC_OPERATIONS_H
#define FPC_OPERATIONS_H

#include <string.h>

#include "program.h"

static inline int64_t type_bytes(int64_t type) {
    switch (type) {
        case FPC_TYPE_F16:
        case FPC_TYPE_BF16: return 2;
        case FPC_TYPE_BOOL:
        case FPC_TYPE_U8: return 1;
        case FPC_TYPE_I64: return 8;
        default: return 4;
    }
}

// A view whose memory is known.
struct Strided {
    uint8_t* data;
    const FpcView& view;
    int64_t bytes;  // of a value

    Strided(const FpcView& v, uint8_t* const* bases)
        : data(bases[v.base] + v.offset), view(v), bytes(type_bytes(v.type)) {}

    int64_t stride(int axis) const { return view.strides[axis] * bytes; }

    // Of a row along the last axis, counted over the other axes.
    uint8_t* row(int64_t index) const {
        uint8_t* at = data;
        for (int axis = FPC_RANK - 2; axis >= 0; axis--) {
            at += index % view.sizes[axis] * stride(axis);
            index /= view.sizes[axis];
        }
        return at;
    }

    int64_t rows() const {
        int64_t count = 1;
        for (int axis = 0; axis < FPC_RANK - 1; axis++) count *= view.sizes[axis];
        return count;
    }

    int64_t length() const { return view.sizes[FPC_RANK - 1]; }
};

// Below so many values another thread is not worth waking.
static constexpr int64_t kValuesPerThread = 1 << 15;

static inline int32_t useful_threads(int32_t threads, int64_t values) {
    const int64_t most = values / kValuesPerThread;
    return most < threads ? (most < 1 ? 1 : (int32_t)most) : threads;
}

void elementwise(const FpcOperation& operation, uint8_t* const* bases, int32_t threads);
int32_t index_copy(const FpcOperation& operation, uint8_t* const* bases, int32_t threads);
int32_t gather_rows(const FpcOperation& operation, uint8_t* const* bases);
int32_t attention(const FpcOperation& operation, uint8_t* const* bases, int32_t threads,
                  int32_t instructions);

#endif
