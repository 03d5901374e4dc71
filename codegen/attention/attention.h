// What a kernel of attention gets: the C interface between the operators and the libraries.

#pragma once

#include <stdint.h>

struct FpcAttendArguments {
    const void *q, *k, *v;  // rows of a width that the kernel was made for
    const float *k_scales, *v_scales;  // of each row, where keys and values are codes of a byte
    const uint8_t* mask;    // whether a query sees a key, a byte; null: see `causal`
    void* y;                // [batch, queries, heads, width]
    // From one batch, head and row to the next, in elements; the mask has one more, for keys, and 0
    // where it is broadcast.
    int64_t q_strides[3], k_strides[3], v_strides[3], mask_strides[4];
    int64_t k_scale_strides[3], v_scale_strides[3];
    int32_t batch, heads, groups, queries, keys;  // heads of queries, and of keys and values
    float scale;
    int32_t causal;    // query i sees the keys 0 to i
    int32_t sm_count;  // of the device
};

enum { FPC_ATTEND_OK = 0, FPC_ATTEND_REFUSED = -1 };  // or an error of CUDA
