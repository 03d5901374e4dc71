// What the kernels in vectors of 256 bits share. Included by gemm_avx2.cpp only.

constexpr int kRows = 5;  // of activations that a tile has at most

FPC_INLINE I load(const void* from) { return _mm256_loadu_si256((const I*)from); }

FPC_INLINE I broadcast4(const void* from) {
    int32_t value;
    memcpy(&value, from, 4);
    return _mm256_set1_epi32(value);
}

// The codes in the low halves of the bytes, and those in the high halves.
FPC_INLINE I decode_low(I codes, I table) {
    return _mm256_shuffle_epi8(table, _mm256_and_si256(codes, _mm256_set1_epi8(15)));
}
FPC_INLINE I decode_high(I codes, I table) {
    return decode_low(_mm256_srli_epi16(codes, 4), table);
}

FPC_INLINE I repeated(const void* sixteen_bytes) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)sixteen_bytes));
}

// Eight scales of a group. Those of E4M3 are 2**-8 of what they should be.
FPC_INLINE F weight_scales(const uint8_t* group, int32_t format, int vector) {
    if (format < 0) return _mm256_set1_ps(1);
    if (format == FPC_F32) return _mm256_loadu_ps((const float*)group + 8 * vector);
    const __m128i codes = _mm_loadl_epi64((const __m128i*)(group + 8 * vector));
    if (format == FPC_E8M0)
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(codes), 23));
    return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(codes), 7));
}

FPC_INLINE float scale_unit(const FpcWeights& weights) {
    return weights.block_scale == FPC_E4M3 ? 256 : 1;
}

// To bf16, rounding to nearest even.
FPC_INLINE __m128i to_bf16(F value) {
    const I bits = _mm256_castps_si256(value);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const I sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const I high = _mm256_srli_epi32(sum, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

// Apply the scales of the token and of the outputs and the bias, each rounded as the definition
// does it (fpcompiler/runtime/reference.py), and store eight results, or as many as there are.
FPC_INLINE void finish(const Gemm& gemm, int64_t m, int64_t n, F sum) {
    const FpcWeights& weights = gemm.weights;
    F value = _mm256_mul_ps(sum, _mm256_set1_ps(gemm.activations.token_scale[m]));
    value = _mm256_mul_ps(value, _mm256_loadu_ps(weights.row_scale + n));
    if (weights.bias) value = _mm256_add_ps(value, _mm256_loadu_ps(weights.bias + n));
    const int64_t left = weights.n - n, count = left < 8 ? left : 8;
    const int64_t size = gemm.output == FPC_INPUT_F32 ? 4 : 2;
    if (count <= 0) return;
    alignas(32) uint8_t bytes[32];
    uint8_t* const to = gemm.y + m * gemm.y_stride + n * size;
    uint8_t* const at = count < 8 ? bytes : to;
    if (gemm.output == FPC_INPUT_F32)
        _mm256_storeu_ps((float*)at, value);
    else if (gemm.output == FPC_INPUT_BF16)
        _mm_storeu_si128((__m128i*)at, to_bf16(value));
    else
        _mm_storeu_si128((__m128i*)at, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    if (count < 8) memcpy(to, bytes, count * size);
}
