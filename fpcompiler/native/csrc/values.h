// Where rows of values come from.

#ifndef FPC_VALUES_H
#define FPC_VALUES_H

#include "native.h"

struct Values {
    const uint8_t* x;
    int32_t input;
    int64_t stride;               // of x, in bytes
    const FpcProducer* producer;  // null: x is what is quantized
    FpcRows scale, shift;         // of the tail; without data if it has none
};

#endif
