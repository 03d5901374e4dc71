// Copies and arithmetic on views. Half precision is computed in fp32 and rounded once, as torch
// does it.

#include "operations.h"

namespace {

constexpr int64_t kChunk = 256;  // values that are converted at a time

struct Row {
    uint8_t* data;
    int64_t stride;  // in values
    int64_t type;
};

float from_bf16(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// The values as fp32: where they are if they are that already, in `memory` otherwise.
const float* read(const Row& row, int64_t begin, int64_t count, float* memory) {
    if (row.type == FPC_TYPE_F32 && row.stride == 1) return (const float*)row.data + begin;
    if (row.type == FPC_TYPE_F32) {
        const float* from = (const float*)row.data + begin * row.stride;
        for (int64_t i = 0; i < count; i++) memory[i] = from[i * row.stride];
    } else {
        const uint16_t* from = (const uint16_t*)row.data + begin * row.stride;
        for (int64_t i = 0; i < count; i++) memory[i] = from_bf16(from[i * row.stride]);
    }
    return memory;
}

void write(const Row& row, int64_t begin, int64_t count, const float* values) {
    if (row.type == FPC_TYPE_F32) {
        float* to = (float*)row.data + begin * row.stride;
        for (int64_t i = 0; i < count; i++) to[i * row.stride] = values[i];
    } else {
        uint16_t* to = (uint16_t*)row.data + begin * row.stride;
        for (int64_t i = 0; i < count; i++) to[i * row.stride] = to_bf16(values[i]);
    }
}

template <class T>
void copy_strided(const Row& to, const Row& from, int64_t count) {
    T* y = (T*)to.data;
    const T* x = (const T*)from.data;
    for (int64_t i = 0; i < count; i++) y[i * to.stride] = x[i * from.stride];
}

void copy_row(const Row& to, const Row& from, int64_t count) {
    const int64_t bytes = type_bytes(to.type);
    if (to.stride == 1 && from.stride == 1) {
        memcpy(to.data, from.data, count * bytes);
        return;
    }
    switch (bytes) {
        case 1: return copy_strided<uint8_t>(to, from, count);
        case 2: return copy_strided<uint16_t>(to, from, count);
        case 4: return copy_strided<uint32_t>(to, from, count);
        default: return copy_strided<uint64_t>(to, from, count);
    }
}

void compute(int64_t kind, float scalar, const float* a, const float* b, float* y, int64_t count) {
    switch (kind) {
        case FPC_DO_ADD: for (int64_t i = 0; i < count; i++) y[i] = a[i] + b[i]; break;
        case FPC_DO_SUB: for (int64_t i = 0; i < count; i++) y[i] = a[i] - b[i]; break;
        case FPC_DO_MUL: for (int64_t i = 0; i < count; i++) y[i] = a[i] * b[i]; break;
        case FPC_DO_SCALE: for (int64_t i = 0; i < count; i++) y[i] = a[i] * scalar; break;
        case FPC_DO_NEG: for (int64_t i = 0; i < count; i++) y[i] = -a[i]; break;
        default: for (int64_t i = 0; i < count; i++) y[i] = a[i];
    }
}

bool has_two(int64_t kind) { return kind == FPC_DO_ADD || kind == FPC_DO_SUB || kind == FPC_DO_MUL; }

void run_row(const FpcOperation& operation, const Row& y, const Row& a, const Row& b,
             int64_t count) {
    if (operation.kind == FPC_DO_COPY && y.type == a.type) {
        copy_row(y, a, count);
        return;
    }
    const bool two = has_two(operation.kind), direct = y.type == FPC_TYPE_F32 && y.stride == 1;
    float memory[3][kChunk];
    for (int64_t i = 0; i < count; i += kChunk) {
        const int64_t n = count - i < kChunk ? count - i : kChunk;
        const float* left = read(a, i, n, memory[0]);
        const float* right = two ? read(b, i, n, memory[1]) : left;
        float* to = direct ? (float*)y.data + i : memory[2];
        compute(operation.kind, operation.scalar, left, right, to, n);
        if (!direct) write(y, i, n, to);
    }
}

Row row_of(const Strided& values, int64_t index) {
    return {values.row(index), values.view.strides[FPC_RANK - 1], values.view.type};
}

}  // namespace

void elementwise(const FpcOperation& operation, uint8_t* const* bases, int32_t threads) {
    const Strided y(operation.y, bases), a(operation.x[0], bases);
    const Strided b(has_two(operation.kind) ? operation.x[1] : operation.x[0], bases);
    const int64_t rows = y.rows(), length = y.length();
    threads = useful_threads(threads, rows * length);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < rows; i++)
        run_row(operation, row_of(y, i), row_of(a, i), row_of(b, i), length);
}

int32_t index_copy(const FpcOperation& operation, uint8_t* const* bases, int32_t threads) {
    const int64_t axis = operation.integers[0];
    const Strided indices(operation.x[1], bases);
    const int64_t count = indices.length(), places = operation.y.sizes[axis];
    for (int64_t i = 0; i < count; i++) {
        const int64_t to = *(const int64_t*)(indices.data + i * indices.stride(FPC_RANK - 1));
        if (to < 0 || to >= places) return FPC_OUT_OF_RANGE;
        FpcOperation copy = operation;
        copy.kind = FPC_DO_COPY;
        copy.y.sizes[axis] = copy.x[0].sizes[axis] = 1;
        copy.y.offset += to * operation.y.strides[axis] * type_bytes(operation.y.type);
        copy.x[0].offset += i * operation.x[0].strides[axis] * type_bytes(operation.x[0].type);
        elementwise(copy, bases, threads);
    }
    return FPC_OK;
}

int32_t gather_rows(const FpcOperation& operation, uint8_t* const* bases) {
    const Strided y(operation.y, bases), table(operation.x[0], bases);
    const Strided indices(operation.x[1], bases);
    const int64_t rows = y.rows(), places = table.view.sizes[FPC_RANK - 2];
    for (int64_t i = 0; i < rows; i++) {
        const int64_t index = ((const int64_t*)indices.data)[i];
        if (index < 0 || index >= places) return FPC_OUT_OF_RANGE;
        const Row from{table.data + index * table.stride(FPC_RANK - 2),
                       table.view.strides[FPC_RANK - 1], table.view.type};
        copy_row(row_of(y, i), from, y.length());
    }
    return FPC_OK;
}
