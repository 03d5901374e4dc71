// Attention of a few queries: each head is a task. fp32; for many queries torch's own is faster.
//
// Views are [1, batch, heads, queries, width] of queries and the result, and the same of keys and
// values, whose heads may be fewer (grouped queries). A mask is [1, batch, heads, queries, keys],
// bool (true: may be seen) or fp32 (is added), with strides of 0 where it repeats itself. All scores
// of a query are kept: they are few.

#include <stdlib.h>

#include "operations.h"
#include "threads.h"

#define FPC_ROWS "attention_rows.h"
#include "instruction_sets.h"

namespace {

enum Axis { kBatch = 1, kHeads = 2, kRows = 3, kWidth = 4 };

constexpr int64_t kProductsPerThread = 150000;

const float* start(const Strided& values, int64_t batch, int64_t head) {
    return (const float*)(values.data + batch * values.stride(kBatch) + head * values.stride(kHeads));
}

template <class Head>
Head head_of(const FpcOperation& operation, uint8_t* const* bases, int64_t index) {
    const Strided q(operation.x[0], bases), k(operation.x[1], bases), v(operation.x[2], bases);
    const Strided y(operation.y, bases);
    const int64_t heads = q.view.sizes[kHeads], batch = index / heads, own = index % heads;
    const int64_t shared = own / (heads / k.view.sizes[kHeads]);
    Head head{start(q, batch, own), start(k, batch, shared), start(v, batch, shared),
              (float*)start(y, batch, own),
              q.view.strides[kRows], k.view.strides[kRows], v.view.strides[kRows],
              y.view.strides[kRows],
              q.view.sizes[kRows], k.view.sizes[kRows], q.view.sizes[kWidth],
              v.view.sizes[kWidth], operation.scalar, (operation.flag & 1) != 0,
              nullptr, 0, 0, false};
    if (operation.flag & 2) {
        const Strided mask(operation.x[3], bases);
        head.mask = (const uint8_t*)start(mask, batch, own);
        head.mask_row = mask.stride(kRows), head.mask_key = mask.stride(kWidth);
        head.mask_is_bool = mask.view.type == FPC_TYPE_BOOL;
    }
    return head;
}

template <class Head, class Attend>
int32_t run(const FpcOperation& operation, uint8_t* const* bases, int32_t threads,
            const Attend& attend) {
    const int64_t* q = operation.x[0].sizes;
    const int64_t heads = q[kBatch] * q[kHeads], keys = operation.x[1].sizes[kRows];
    const int64_t products = heads * q[kRows] * keys * 2 * q[kWidth];
    if (products < 2 * kProductsPerThread) threads = 1;
    int32_t status = FPC_OK;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(max : status)
    {
        KeepSubnormals keep;
        float* scores = (float*)malloc((keys + 16) * sizeof(float));
        if (!scores) {
            status = FPC_NO_MEMORY;
        } else {
#pragma omp for schedule(dynamic, 1) nowait
            for (int64_t i = 0; i < heads; i++)
                attend(head_of<Head>(operation, bases, i), scores);
            free(scores);
        }
    }
    return status;
}

}  // namespace

int32_t attention(const FpcOperation& operation, uint8_t* const* bases, int32_t threads,
                  int32_t instructions) {
#if defined(__x86_64__)
    if (instructions >= FPC_AVX512) {
        typedef avx512::Head Head;
        return run<Head>(operation, bases, threads, avx512::attend);
    }
    if (instructions >= FPC_AVX2) {
        typedef avx2::Head Head;
        return run<Head>(operation, bases, threads, avx2::attend);
    }
#endif
    (void)instructions;
    return run<baseline::Head>(operation, bases, threads, baseline::attend);
}
