// Runs cases of a file on the native library, for tests of instruction sets that are emulated.
//
// Usage: driver CASES RESULTS. Both files are what test_neon.py writes and reads: numbers and
// structures of native.h as they lie in memory. All memory ends where a page begins that must not
// be touched.

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "native.h"

namespace {

struct Shape {
    int64_t m, row_bytes, scale_bytes, repeat, input, output, bias, threads;
};

[[noreturn]] void fail(const char* what) {
    perror(what);
    exit(1);
}

// Memory in front of a page that cannot be touched, as near to it as the alignment lets it be.
class Guarded {
   public:
    Guarded(int64_t size, int64_t alignment) {
        const int64_t page = 4096, room = (size + page - 1) / page * page;
        map_ = (uint8_t*)mmap(nullptr, room + page, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (map_ == MAP_FAILED || mprotect(map_ + room, page, PROT_NONE)) fail("memory");
        length_ = room + page;
        data = map_ + (room - size) / alignment * alignment;
    }
    ~Guarded() { munmap(map_, length_); }
    Guarded(const Guarded&) = delete;

    uint8_t* data;

   private:
    uint8_t* map_;
    int64_t length_;
};

class Files {
   public:
    Files(const char* cases, const char* results)
        : cases_(fopen(cases, "rb")), results_(fopen(results, "wb")) {
        if (!cases_ || !results_) fail("files");
    }
    ~Files() {
        fclose(cases_);
        if (fclose(results_)) fail("results");
    }

    // False at the end of the file.
    bool read(void* to, int64_t bytes) {
        const int64_t count = (int64_t)fread(to, 1, bytes, cases_);
        if (count && count != bytes) fail("cases");
        return count == bytes;
    }
    void write(const void* from, int64_t bytes) {
        if ((int64_t)fwrite(from, 1, bytes, results_) != bytes) fail("results");
    }

   private:
    FILE* cases_;
    FILE* results_;
};

int64_t size_of(int64_t type) { return type == FPC_INPUT_F32 ? 4 : 2; }

// Prepare what each head computes of the values, and write it.
void produce(Files& files, const Shape& shape, const FpcWeights& weights,
             const FpcActivations& activations, const uint8_t* x) {
    const int64_t bytes = fpc_prepared_bytes(&weights, shape.m);
    for (int32_t head = FPC_RMS_NORM; head <= FPC_RELU; head++) {
        const FpcProducer producer{head, FPC_NO_TAIL, 1e-5f, 0, 0, nullptr, nullptr};
        Guarded prepared(bytes, 64);
        if (fpc_prepare_produced(&weights, &activations, &producer, nullptr, nullptr, x,
                                 (int32_t)shape.input, shape.m, weights.k, prepared.data,
                                 (int32_t)shape.threads, fpc_instructions()))
            fail("fpc_prepare_produced");
        files.write(prepared.data, bytes);
    }
}

// Repack weights, prepare activations, multiply; write what was prepared and the result.
void multiply(Files& files, const Shape& shape, FpcWeights weights,
              const FpcActivations& activations) {
    const int64_t padded = (weights.n + 63) / 64 * 64 * 4;
    Guarded packed(weights.n * shape.row_bytes, 1), scales(shape.scale_bytes, 4);
    Guarded row_scale(padded, 4), bias(padded, 4);
    Guarded x(shape.m * weights.k * size_of(shape.input), 4);
    files.read(packed.data, weights.n * shape.row_bytes);
    files.read(scales.data, shape.scale_bytes);
    files.read(row_scale.data, padded);
    files.read(bias.data, padded);
    files.read(x.data, shape.m * weights.k * size_of(shape.input));

    const int32_t threads = (int32_t)shape.threads, instructions = fpc_instructions();
    Guarded data(fpc_weight_bytes(&weights), 64);
    fpc_repack(&weights, packed.data, shape.row_bytes, scales.data, shape.repeat, data.data, threads);
    weights.data = data.data;
    weights.row_scale = (const float*)row_scale.data;
    weights.bias = shape.bias ? (const float*)bias.data : nullptr;
    const int64_t prepared_bytes = fpc_prepared_bytes(&weights, shape.m);
    Guarded prepared(prepared_bytes, 64);
    if (fpc_prepare(&weights, &activations, x.data, (int32_t)shape.input, shape.m, weights.k,
                    prepared.data, threads, instructions))
        fail("fpc_prepare");
    const int64_t y_bytes = shape.m * weights.n * size_of(shape.output);
    Guarded y(y_bytes, 4);
    if (fpc_multiply(&weights, prepared.data, shape.m, y.data, nullptr, (int32_t)shape.output,
                     weights.n, threads, instructions))
        fail("fpc_multiply");
    files.write(prepared.data, prepared_bytes);
    files.write(y.data, y_bytes);
    produce(files, shape, weights, activations, x.data);
}

// Write how many operations the loops do that measure the machine.
void peaks(Files& files) {
    for (int32_t arithmetic = FPC_INT8; arithmetic <= FPC_FLOAT32; arithmetic++) {
        const int64_t operations = fpc_peak(arithmetic, 1, 1);
        files.write(&operations, sizeof operations);
    }
}

// exp, erf and tanh of the values at the beginning of the file.
void evaluate(Files& files) {
    int64_t count;
    if (!files.read(&count, sizeof count)) fail("count");
    Guarded x(4 * count, 4), y(4 * count, 4);
    files.read(x.data, 4 * count);
    for (int32_t function = FPC_EXP; function <= FPC_TANH; function++) {
        fpc_evaluate(function, (const float*)x.data, (float*)y.data, count, fpc_instructions());
        files.write(y.data, 4 * count);
    }
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 3) return 2;
    Files files(arguments[1], arguments[2]);
    const int32_t instructions = fpc_instructions();
    files.write(&instructions, sizeof instructions);
    peaks(files);
    evaluate(files);
    Shape shape;
    FpcWeights weights;
    FpcActivations activations;
    while (files.read(&shape, sizeof shape)) {
        files.read(&weights, sizeof weights);
        files.read(&activations, sizeof activations);
        multiply(files, shape, weights, activations);
    }
    return 0;
}
