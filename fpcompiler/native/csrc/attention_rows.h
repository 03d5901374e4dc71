// Attention of one head. Included once per instruction set, after vectors.h.

#include "functions.h"

// a * b + c, in one rounding where the processor has that.
static inline F multiply_add(F a, F b, F c) {
#if FPC_LANES == 16
    return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return a * b + c;
#endif
}

static inline float sum_of(F v) {
    float lanes[kLanes];
    store(lanes, v);
    for (int width = kLanes / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}

// What a head reads and writes; strides are in values and the last axes are contiguous.
struct Head {
    const float *q, *k, *v;
    float* y;
    int64_t q_stride, k_stride, v_stride, y_stride;
    int64_t queries, keys, width, value_width;
    float scale;
    bool causal;
    const uint8_t* mask;  // of the first query, or null
    int64_t mask_row, mask_key;  // in bytes
    bool mask_is_bool;
};

struct Span {
    int64_t begin, end;
};

// The keys that a query may see: nothing outside is read.
static inline Span span_of(const Head& head, int64_t query) {
    Span span{0, head.causal && query + 1 < head.keys ? query + 1 : head.keys};
    if (!head.mask || !head.mask_is_bool) return span;
    const uint8_t* mask = head.mask + query * head.mask_row;
    while (span.begin < span.end && !mask[span.begin * head.mask_key]) span.begin++;
    while (span.begin < span.end && !mask[(span.end - 1) * head.mask_key]) span.end--;
    return span;
}

static inline float dot(const float* a, const float* b, int64_t width) {
    F sum{};
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes)
        sum = multiply_add(load<F>(a + i), load<F>(b + i), sum);
    float result = sum_of(sum);
    for (; i < width; i++) result += a[i] * b[i];
    return result;
}

// Scores of a query, with the mask; returns the largest, NaN if one is.
static inline float score(const Head& head, int64_t query, Span span, float* scores) {
    const float* q = head.q + query * head.q_stride;
    const uint8_t* mask = head.mask ? head.mask + query * head.mask_row : nullptr;
    float most = -__builtin_inff();
    for (int64_t n = span.begin; n < span.end; n++) {
        float value = dot(q, head.k + n * head.k_stride, head.width) * head.scale;
        if (mask && head.mask_is_bool)
            value = mask[n * head.mask_key] ? value : -__builtin_inff();
        else if (mask)
            value += *(const float*)(mask + n * head.mask_key);
        scores[n] = value;
        most = value > most || value != value ? value : most;
    }
    return most;
}

// Replace scores by exp(score - most); returns their sum. There is room for a vector behind them.
static inline float exponentials(Span span, float most, float* scores) {
    F sum{};
    for (int64_t n = span.begin; n < span.end; n += kLanes) {
        F value = exp_of(load<F>(scores + n) - most);
        const int64_t left = span.end - n;
        if (left < kLanes) {
            float lanes[kLanes];
            store(lanes, value);
            for (int64_t i = left; i < kLanes; i++) lanes[i] = 0;
            value = load<F>(lanes);
        }
        store(scores + n, value);
        sum += value;
    }
    return sum_of(sum);
}

// Four vectors of the result at a time, then one, then single values.
template <int kV>
static inline void weigh(const Head& head, Span span, const float* weights, float scale,
                         int64_t at, float* y) {
    F sum[kV] = {};
    for (int64_t n = span.begin; n < span.end; n++) {
        const float* v = head.v + n * head.v_stride + at;
        const F weight = splat(weights[n]);
        for (int i = 0; i < kV; i++)
            sum[i] = multiply_add(weight, load<F>(v + i * kLanes), sum[i]);
    }
    for (int i = 0; i < kV; i++) store(y + at + i * kLanes, sum[i] * scale);
}

static inline void attend(const Head& head, float* scores) {
    for (int64_t query = 0; query < head.queries; query++) {
        float* y = head.y + query * head.y_stride;
        const Span span = span_of(head, query);
        const float most = score(head, query, span, scores);
        // A query that sees nothing gets zeros, as in torch.
        const bool blind = most == -__builtin_inff();
        const float scale = blind ? 0 : 1 / exponentials(span, most, scores);
        const Span seen = blind ? Span{0, 0} : span;
        int64_t at = 0;
        for (; at + 4 * kLanes <= head.value_width; at += 4 * kLanes)
            weigh<4>(head, seen, scores, scale, at, y);
        for (; at + kLanes <= head.value_width; at += kLanes)
            weigh<1>(head, seen, scores, scale, at, y);
        for (; at < head.value_width; at++) {
            float sum = 0;
            for (int64_t n = seen.begin; n < seen.end; n++)
                sum += scores[n] * head.v[n * head.v_stride + at];
            y[at] = sum * scale;
        }
    }
}
