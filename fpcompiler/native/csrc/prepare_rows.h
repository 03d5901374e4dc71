// One row of activations, made ready to be multiplied. Included once per instruction set, after
// vectors.h; layout.h says where things go.

#include "quantize_rows.h"

#include "produce_rows.h"

#if FPC_LANES >= 8
// A table of 64 bytes in registers.
struct Lookup {
    __m256i quarters[4];

    explicit Lookup(const int8_t* table) {
        for (int i = 0; i < 4; i++)
            quarters[i] =
                _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(table + 16 * i)));
    }

    __m256i operator[](__m256i index) const {
        // A blend looks at the top bit of each byte; shifting moves bits 4 and 5 there.
        const __m256i odd = _mm256_slli_epi16(index, 3), upper = _mm256_slli_epi16(index, 2);
        return _mm256_blendv_epi8(half(index, odd, 0), half(index, odd, 2), upper);
    }

   private:
    __m256i half(__m256i index, __m256i odd, int first) const {
        return _mm256_blendv_epi8(_mm256_shuffle_epi8(quarters[first], index),
                                  _mm256_shuffle_epi8(quarters[first + 1], index), odd);
    }
};
#endif

struct Preparer {
    const FpcWeights& weights;
    const FpcActivations& activations;
    const Layout layout;
    const Prepared to;
    const int64_t k;

    // The codes of row `m`, its scale, and those of its blocks as they are stored.
    void from_codes(int64_t m, const uint8_t* codes, float outer, const uint8_t* scales) const {
        to.token_scale[m] = outer;
        uint8_t* a = to.a + m * to.stride;
        if (weights.arithmetic == FPC_INT8) {
            integers(codes, (int8_t*)a);
            corrections(m, (const int8_t*)a);
            if (weights.scaled_inputs) group_scales(m, scales);
            return;
        }
        float values[8];
        for (int64_t i = 0; i < layout.inputs(); i += 8) {
            const int64_t count = k - i < 8 ? k - i : 8;
            const float scale = count > 0 ? block_scale(scales, i) : 0;
            for (int64_t j = 0; j < 8; j++)
                values[j] = j < count ? activations.values[codes[i + j]] * scale : 0;
            store_octet(a, i, values);
        }
    }

    // Row `m` as it is.
    void from_values(int64_t m, const float* row) const {
        to.token_scale[m] = 1;
        float values[8];
        for (int64_t i = 0; i < layout.inputs(); i += 8) {
            for (int64_t j = 0; j < 8; j++) values[j] = i + j < k ? row[i + j] : 0;
            store_octet(to.a + m * to.stride, i, values);
        }
    }

   private:
    void integers(const uint8_t* codes, int8_t* a) const {
        const int8_t* table = activations.integers;
        int64_t i = 0;
#if FPC_LANES >= 8
        if (activations.operand.code_bits <= 6) {
            const Lookup lookup(table);
            for (; i + 32 <= k; i += 32)
                _mm256_storeu_si256((__m256i*)(a + i),
                                    lookup[_mm256_loadu_si256((const __m256i*)(codes + i))]);
        }
#endif
        for (; i < k; i++) a[i] = table[codes[i]];
        for (; i < layout.inputs(); i++) a[i] = 0;
    }

    // The sums of groups, times minus the offset.
    void corrections(int64_t m, const int8_t* a) const {
        int32_t* result = to.correction + m;
        switch (layout.octets) {
            case 2: return corrections_of<16>(a, result);
            case 4: return corrections_of<32>(a, result);
            default: break;
        }
        const int64_t length = layout.octets * 8;
        for (int64_t g = 0; g < layout.groups; g++) {
            int32_t sum = 0;
            for (int64_t i = 0; i < length; i++) sum += a[g * length + i];
            result[g * to.m] = -weights.offset * sum;
        }
    }

    template <int kLength>
    void corrections_of(const int8_t* a, int32_t* result) const {
        for (int64_t g = 0; g < layout.groups; g++) {
            int16_t sum = 0;  // At most 32 times 127: it fits.
            for (int i = 0; i < kLength; i++) sum = (int16_t)(sum + a[g * kLength + i]);
            result[g * to.m] = -weights.offset * sum;
        }
    }

    void group_scales(int64_t m, const uint8_t* scales) const {
        float* result = to.group_scale + m;
        float least = __builtin_inff(), most = 0;
        for (int64_t g = 0; g < layout.groups; g++) {
            const float scale = block_scale(scales, g * layout.octets * 8);
            least = scale < least ? scale : least, most = scale > most ? scale : most;
            result[g * to.m] = scale;
        }
        __builtin_memcpy(to.range + 2 * m, &least, 4);
        __builtin_memcpy(to.range + 2 * m + 1, &most, 4);
    }

    float block_scale(const uint8_t* scales, int64_t i) const {
        const FpcOperand& operand = activations.operand;
        if (!operand.block) return 1;
        const int64_t b = i / operand.block;
        if (operand.block_scale == FPC_F32) return ((const float*)scales)[b];
        if (operand.block_scale == FPC_E8M0) return as_float((int32_t)scales[b] << 23);
        if (scales[b] < 8) return (float)scales[b] * 0x1p-9f;
        return as_float(((int32_t)scales[b] << 20) + (120 << 23));
    }

    void store_octet(uint8_t* a, int64_t i, const float* values) const {
        if (weights.arithmetic == FPC_FLOAT32) {
            __builtin_memcpy((float*)a + i, values, 32);
            return;
        }
        // All values are bf16 already. The order is the one in which a vector of codes is decoded.
        static const int order[8] = {0, 2, 4, 6, 1, 3, 5, 7};
        uint16_t* halves = (uint16_t*)a + i;
        for (int j = 0; j < 8; j++) {
            int32_t bits;
            __builtin_memcpy(&bits, &values[order[j]], 4);
            halves[j] = (uint16_t)(bits >> 16);
        }
    }
};

// Quantizes rows and prepares them, in one thread.
struct Quantizer {
    const Preparer& preparer;
    Producer producer;
    Row row;
    uint8_t* scales;  // of the row's blocks

    static int64_t bytes(const FpcOperand& operand, int64_t k) {
        return Producer::bytes(k) + Row::bytes(operand, k) + 4 * Row::blocks_of(operand, k);
    }

    Quantizer(const Preparer& p, const Values& from, uint8_t* memory)
        : preparer(p),
          producer(from, p.k, padded_length(p.activations.operand, p.k), memory),
          row(p.activations.operand, p.k, memory + Producer::bytes(p.k)),
          scales((uint8_t*)row.values + Row::bytes(p.activations.operand, p.k)) {}

    // The bits of the largest magnitude of row `m`.
    int32_t largest(int64_t m) { return row.largest(producer.row(m, row.values)); }

    int32_t prepare(int64_t m, float outer) {
        const float* values = producer.row(m, row.values);
        if (!preparer.activations.quantized) {
            preparer.from_values(m, values);
            return FPC_OK;
        }
        const int32_t status = row.encode(values, &outer, scales);
        if (status == FPC_OK) preparer.from_codes(m, row.codes, outer, scales);
        return status;
    }
};
