// Running a program.

#include "program.h"

#include <time.h>

#include "gemm.h"
#include "operations.h"
#include "threads.h"

namespace {

int64_t now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ll + time.tv_nsec;
}

uint8_t* address(const FpcView& view, uint8_t* const* bases) {
    return bases[view.base] + view.offset;
}

int32_t produce(const FpcOperation& operation, uint8_t* const* bases, int32_t threads,
                int32_t instructions) {
    FpcRows rows[2] = {operation.rows[0], operation.rows[1]};
    for (int i = 0; i < 2; i++)
        if (operation.has_rows[i]) rows[i].data = address(operation.x[i + 1], bases);
    return fpc_prepare_produced(operation.weights, operation.activations, operation.producer,
                                operation.has_rows[0] ? rows : nullptr,
                                operation.has_rows[1] ? rows + 1 : nullptr,
                                address(operation.x[0], bases), (int32_t)operation.x[0].type,
                                operation.integers[0], operation.integers[1],
                                address(operation.y, bases), threads, instructions);
}

int32_t run(const FpcOperation& operation, uint8_t* const* bases, int32_t threads,
            int32_t instructions) {
    switch (operation.kind) {
        case FPC_DO_INDEX_COPY: return index_copy(operation, bases, threads);
        case FPC_DO_GATHER_ROWS: return gather_rows(operation, bases);
        case FPC_DO_ATTENTION: return attention(operation, bases, threads, instructions);
        case FPC_DO_PREPARE:
            return fpc_prepare(operation.weights, operation.activations,
                               address(operation.x[0], bases), (int32_t)operation.x[0].type,
                               operation.integers[0], operation.integers[1],
                               address(operation.y, bases), threads, instructions);
        case FPC_DO_PREPARE_CODES:
            return fpc_prepare_codes(
                operation.weights, operation.activations, address(operation.x[0], bases),
                operation.flag & 1 ? (const float*)address(operation.x[1], bases) : nullptr,
                operation.flag & 2 ? address(operation.x[2], bases) : nullptr,
                operation.integers[0], address(operation.y, bases), threads, instructions);
        case FPC_DO_PRODUCE: return produce(operation, bases, threads, instructions);
        default: elementwise(operation, bases, threads); return FPC_OK;
    }
}

// How many products of the same input stand one after the other.
int alike(const FpcOperation* operations, int64_t left) {
    const FpcView& x = operations[0].x[0];
    int count = 0;
    while (count < left && count < kProductsAtOnce) {
        const FpcOperation& next = operations[count];
        const bool same = next.x[0].base == x.base && next.x[0].offset == x.offset;
        if (next.kind != FPC_DO_MULTIPLY || !same) break;
        count++;
    }
    return count;
}

int32_t multiply(const FpcOperation* operations, int count, uint8_t* const* bases, int32_t threads,
                 int32_t instructions) {
    Product products[kProductsAtOnce];
    for (int i = 0; i < count; i++) {
        const FpcOperation& operation = operations[i];
        products[i] = {operation.weights, address(operation.x[0], bases), operation.integers[0],
                       address(operation.y, bases),
                       operation.flag ? address(operation.x[1], bases) : nullptr,
                       (int32_t)operation.y.type, operation.integers[1]};
    }
    return multiply_all(products, count, threads, instructions);
}

// Operations that run together share the time by the size of their weights.
void share(const FpcOperation* operations, int count, int64_t time, int64_t* nanoseconds) {
    double total = 0;
    for (int i = 0; i < count; i++)
        total += (double)operations[i].weights->n * operations[i].weights->k;
    for (int i = 0; i < count; i++) {
        const double own = (double)operations[i].weights->n * operations[i].weights->k;
        nanoseconds[i] = (int64_t)((double)time * own / total);
    }
}

}  // namespace

extern "C" int32_t fpc_run(const FpcOperation* operations, int64_t count, uint8_t* const* bases,
                           int32_t threads, int32_t instructions, int64_t* stopped,
                           int64_t* nanoseconds) {
    int64_t before = nanoseconds ? now() : 0;
    for (int64_t i = 0; i < count;) {
        const int products = alike(operations + i, count - i);
        const int32_t status =
            products ? multiply(operations + i, products, bases, threads, instructions)
                     : run(operations[i], bases, threads, instructions);
        if (status) {
            *stopped = i;
            return status;
        }
        const int64_t after = nanoseconds ? now() : 0;
        if (nanoseconds && products) share(operations + i, products, after - before, nanoseconds + i);
        if (nanoseconds && !products) nanoseconds[i] = after - before;
        before = after;
        i += products ? products : 1;
    }
    return FPC_OK;
}
