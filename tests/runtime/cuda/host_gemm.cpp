// A GEMM with the C interface of generated ones that computes on the CPU, from the packed bytes.
// Before it stand kernel_abi.h, kDescription, Output, kBlock, kResidual, the bits of codes and the tables of
// their values.

#include <cmath>
#include <cstring>

FPC_EXPORT int32_t fpc_on_host() { return 1; }
FPC_EXPORT int32_t fpc_gemm_abi() { return kAbi; }
FPC_EXPORT const char* fpc_gemm_description() { return kDescription; }

static const int kStep = kBlock ? kBlock : 1;
static int32_t calls = 0;
FPC_EXPORT int32_t fpc_host_calls() { return calls; }

static const int64_t kWorkspace = 96;
FPC_EXPORT int64_t fpc_gemm_workspace(int32_t, int32_t, int32_t, int32_t) { return kWorkspace; }

static int64_t up(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

static int64_t scale_bytes(int64_t rows, int64_t k) {
    return kBlock ? up(rows, 128) * up(k / kStep, 4) : 0;
}
FPC_EXPORT int64_t fpc_gemm_scale_bytes_a(int32_t m, int32_t, int32_t k) {
    return scale_bytes(m, k);
}
FPC_EXPORT int64_t fpc_gemm_scale_bytes_b(int32_t, int32_t n, int32_t k) {
    return scale_bytes(n, k);
}

static double value(const void* codes, int64_t row, int64_t i, int64_t k, int bits,
                    const float* values) {
    const uint8_t* bytes = static_cast<const uint8_t*>(codes) + row * k * bits / 8;
    const int64_t bit = i * bits;
    uint32_t word = bytes[bit / 8];
    if (bit % 8 + bits > 8) word |= (uint32_t)bytes[bit / 8 + 1] << 8;
    return values[word >> bit % 8 & ((1u << bits) - 1)];
}

static double scale(const void* scales, int64_t row, int64_t i, int64_t k) {
    if (!kBlock) return 1;
    const int64_t block = i / kStep, columns = up(k / kStep, 4);
    const int64_t tile = row / 128 * (columns / 4) + block / 4;
    const int64_t byte = tile * 512 + row % 32 * 16 + row % 128 / 32 * 4 + block % 4;
    return kScaleValues[static_cast<const uint8_t*>(scales)[byte]];
}

static void store(void* d, int64_t index, float x) {
    if (kOutputBytes == 4) {
        static_cast<float*>(d)[index] = x;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &x, 4);  // to bfloat16, ties to even
    static_cast<uint16_t*>(d)[index] = (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static float load(const void* d, int64_t index) {
    if (kOutputBytes == 4) return static_cast<const float*>(d)[index];
    const uint32_t bits = (uint32_t)static_cast<const uint16_t*>(d)[index] << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static float of(const float* vector, int64_t i, float otherwise) {
    return vector ? vector[i] : otherwise;
}

#if FPC_QUANTIZED
// A row of outputs as codes and scales of blocks, as quantizers give them.
static void store_row(const FpcQuantizingArguments& args, int64_t m, const float* outputs) {
    using P = fpc::Problem0;
    constexpr int kBits = P::Element::kStorageBits;
    uint8_t* row = static_cast<uint8_t*>(args.d) + m * args.n * kBits / 8;
    memset(row, 0, args.n * kBits / 8);
    for (int n = 0; n < args.n; n += P::kBlock) {
        float values[P::kBlock];
        for (int i = 0; i < P::kBlock; i++) values[i] = fpc::produced_of<P>(outputs[n + i]);
        const fpc::ScaledBlock<P> block(values);
        if (!block.finite) *args.status = 1;
        const int64_t at = fpc::swizzled(m, n / P::kBlock, args.n / P::kBlock);
        static_cast<uint8_t*>(args.d_scales)[at] = block.code;
        for (int i = 0; i < P::kBlock; i++) {
            const uint32_t code = fpc::signed_code<P::Element>(block.quotient(values[i]));
            for (int bit = 0; bit < kBits; bit++)
                row[((n + i) * kBits + bit) / 8] |= (code >> bit & 1) << ((n + i) * kBits + bit) % 8;
        }
    }
}

FPC_EXPORT int32_t fpc_gemm_quantized_bits() { return fpc::Problem0::Element::kStorageBits; }
#endif

FPC_EXPORT int32_t fpc_gemm_run(const FpcGemmArguments* args) {
    calls++;
    if (!args->a || !args->b || !args->d) return FPC_NULL_POINTER;
    if (kBlock && (!args->a_scales || !args->b_scales)) return FPC_NULL_POINTER;
    if (kResidual != (args->residual != nullptr)) return FPC_NULL_POINTER;
    if ((uintptr_t)args->a % 32 || (uintptr_t)args->b % 32) return FPC_MISALIGNED;
    if (args->workspace_bytes < (size_t)kWorkspace) return FPC_SMALL_WORKSPACE;
    if (args->k % 128 || args->n % (16 / kOutputBytes)) return FPC_UNSUPPORTED_SHAPE + 256 * 3;
    memset(args->workspace, 0xFF, kWorkspace);
    const int64_t k = args->k;
    float* outputs = new float[args->n];
    for (int64_t m = 0; m < args->m; m++) {
        for (int64_t n = 0; n < args->n; n++) {
            double sum = 0;
            for (int64_t i = 0; i < k; i++)
                sum += value(args->a, m, i, k, kBitsA, kValuesA) * scale(args->a_scales, m, i, k) *
                       value(args->b, n, i, k, kBitsB, kValuesB) * scale(args->b_scales, n, i, k);
            const float factor = args->alpha * of(args->scalar_a, 0, 1) * of(args->scalar_b, 0, 1);
            const float scaled = of(args->row_scale, n, 1) * (factor * (float)sum);
            const float own = of(args->token_scale, m, 1) * scaled + of(args->bias, n, 0);
            const float y = kResidual ? own + load(args->residual, m * args->n + n) : own;
            outputs[n] = y;
        }
#if FPC_QUANTIZED
        store_row(*static_cast<const FpcQuantizingArguments*>(args), m, outputs);
#else
        for (int64_t n = 0; n < args->n; n++) store(args->d, m * args->n + n, outputs[n]);
#endif
    }
    delete[] outputs;
#if FPC_QUANTIZED
    const auto& own = *static_cast<const FpcQuantizingArguments*>(args);
    for (int64_t m = args->m; m < up(args->m, 128); m++)
        for (int n = 0; n < args->n / 32; n++)
            static_cast<uint8_t*>(own.d_scales)[fpc::swizzled(m, n, args->n / 32)] = 0;
#endif
    return FPC_OK;
}
