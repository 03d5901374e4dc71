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

#if FPC_LANES == 16
static inline __m128 fold_sum(F v) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v),
                                      _mm512_extractf32x8_ps((__m512)v, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
#elif FPC_LANES == 8
static inline __m128 fold_sum(F v) {
    return _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
}
#endif

// The sums of the lanes of four vectors.
static inline void sums_of_four(const F (&v)[4], float* sums) {
#if FPC_LANES >= 8
    __m128 a = fold_sum(v[0]), b = fold_sum(v[1]), c = fold_sum(v[2]), d = fold_sum(v[3]);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(sums, _mm_add_ps(_mm_add_ps(a, b), _mm_add_ps(c, d)));
#else
    for (int i = 0; i < 4; i++) sums[i] = (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
#endif
}

static inline float sum_of(F v) {
    float sums[4];
    sums_of_four({v, v, v, v}, sums);
    return sums[0];
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

// The products of a query with four keys, `stride` values apart, all of them at once: one alone would
// wait for its own sums.
static inline void four_dots(const float* q, const float* k, int64_t stride, int64_t width,
                             float* dots) {
    F sum[4] = {};
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
        const F own = load<F>(q + i);
        for (int j = 0; j < 4; j++) sum[j] = multiply_add(own, load<F>(k + j * stride + i), sum[j]);
    }
    sums_of_four(sum, dots);
    for (; i < width; i++)
        for (int j = 0; j < 4; j++) dots[j] += q[i] * k[j * stride + i];
}

// Products of a query with the keys of a span.
static inline void dots_of(const Head& head, const float* q, Span span, float* scores) {
    int64_t n = span.begin;
    for (; n + 4 <= span.end; n += 4)
        four_dots(q, head.k + n * head.k_stride, head.k_stride, head.width, scores + n);
    float dots[4];
    for (; n < span.end; n++) {
        four_dots(q, head.k + n * head.k_stride, 0, head.width, dots);
        scores[n] = dots[0];
    }
}

// Whether a query sees all keys of its span, as the newest token does.
static inline bool sees_all(const Head& head, int64_t query, Span span) {
    if (!head.mask) return true;
    if (!head.mask_is_bool || head.mask_key != 1) return false;
    const uint8_t* mask = head.mask + query * head.mask_row;
    return !__builtin_memchr(mask + span.begin, 0, (size_t)(span.end - span.begin));
}

// Multiply with the scale; returns the largest, NaN if one is NaN or infinite.
static inline float scaled(const Head& head, Span span, float* scores) {
    F largest = splat(-__builtin_inff()), wrong{};
    int64_t n = span.begin;
    for (; n + kLanes <= span.end; n += kLanes) {
        const F value = load<F>(scores + n) * head.scale;
        store(scores + n, value);
        largest = value > largest ? value : largest;
        wrong += value - value;
    }
    float lanes[kLanes], most = sum_of(wrong) - __builtin_inff();
    store(lanes, largest);
    for (int i = 0; i < kLanes; i++) most = lanes[i] > most ? lanes[i] : most;
    for (; n < span.end; n++) {
        scores[n] *= head.scale;
        most = scores[n] > most || scores[n] != scores[n] ? scores[n] : most;
    }
    return most;
}

static inline float masked(const Head& head, int64_t query, Span span, float* scores) {
    const uint8_t* mask = head.mask + query * head.mask_row;
    float most = -__builtin_inff();
    for (int64_t n = span.begin; n < span.end; n++) {
        float value = scores[n] * head.scale;
        if (head.mask_is_bool)
            value = mask[n * head.mask_key] ? value : -__builtin_inff();
        else
            value += *(const float*)(mask + n * head.mask_key);
        scores[n] = value;
        most = value > most || value != value ? value : most;
    }
    return most;
}

// Scores of a query, with the mask; returns the largest, NaN if one is.
static inline float score(const Head& head, int64_t query, Span span, float* scores) {
    dots_of(head, head.q + query * head.q_stride, span, scores);
    return sees_all(head, query, span) ? scaled(head, span, scores)
                                       : masked(head, query, span, scores);
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
