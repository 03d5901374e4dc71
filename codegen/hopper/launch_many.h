// The launch of gemm_many: tensor maps and the shape of the grid.

namespace fpc {

// The driver's function, found at run time: a library that names it would not load without a
// driver.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t failed = cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    if (failed || result != cudaDriverEntryPointSuccess) return nullptr;
    return (decltype(&cuTensorMapEncodeTiled))function;
}

// Dimensions from the innermost one; strides, in bytes, from the second one.
template <int kRank>
struct MapShape {
    cuuint64_t dimensions[kRank];
    cuuint64_t strides[kRank - 1];
    cuuint32_t box[kRank];
};

template <int kRank>
bool encode_map(CUtensorMap& map, const void* address, CUtensorMapDataType type,
                CUtensorMapSwizzle swizzle, const MapShape<kRank>& shape) {
    const auto encode = tensor_map_encoder();
    if (!encode) return false;
    cuuint32_t steps[kRank];
    for (int i = 0; i < kRank; i++) steps[i] = 1;
    return encode(&map, type, kRank, (void*)address, shape.dimensions, shape.strides, shape.box,
                  steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <class P>
int32_t refusal(const FpcGemmArguments& a) {
    constexpr int32_t kMost = 1 << 30, kLongest = 1 << 16;
    const bool sums = P::kMode == kInt8;  // they are behind the scales of tokens
    if (!a.a || !a.b || !a.d || (sums && !a.token_scale) || (P::kBlock && !a.b_scales))
        return FPC_NULL_POINTER;
    if (((uintptr_t)a.a | (uintptr_t)a.b | (uintptr_t)a.b_scales | (uintptr_t)a.d |
         (uintptr_t)a.residual) & 15)
        return FPC_MISALIGNED;
    const bool fits = a.m <= kMost && a.n <= kMost && a.k <= kLongest;
    if (!fits || a.m < 1 || a.n < 8 || a.n % 8 || a.k < kUnitK || a.k % kUnitK)
        return FPC_UNSUPPORTED_SHAPE;
    return FPC_OK;
}

template <class P, class T>
bool encode_maps(ManyParameters& p, const FpcGemmArguments& a) {
    using L = ManyLayout<P, T>;
    using S = ManyStep<P>;
    using D = Staging<P, T>;
    constexpr auto kByte = CU_TENSOR_MAP_DATA_TYPE_UINT8, kWord = CU_TENSOR_MAP_DATA_TYPE_UINT32;
    constexpr auto kDType = P::kOutput == kF32   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                            : P::kOutput == kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    constexpr auto kXType = P::kMode == kFloats ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : kByte;
    constexpr auto kPlain = CU_TENSOR_MAP_SWIZZLE_NONE, kSwizzled = CU_TENSOR_MAP_SWIZZLE_128B;
    // Bytes of a group of 16 rows in a slot.
    constexpr cuuint32_t kCodes = 16 * S::kCodeBytes, kScales = 16 * S::kScaleBytes;
    constexpr int kGroups = T::kRows / 16, kSize = kSizeOf<P::kOutput>;
    const cuuint64_t m = a.m, n = a.n, k = a.k, groups = (n + 15) / 16;
    const cuuint64_t steps = k / S::kStepK, units = k / kUnitK;
    const MapShape<2> x{{k, m}, {k * kStepBytes / S::kStepK}, {S::kStepK, (cuuint32_t)p.tokens}};
    const MapShape<3> codes{
        {kCodes / 4, steps, groups}, {kCodes, steps * kCodes}, {kCodes / 4, 1, kGroups}};
    const MapShape<2> d{{n, m}, {n * kSize}, {D::kBoxRows, D::kTokens}};
    if constexpr (L::kScales > 0) {
        const MapShape<3> scales{
            {kScales / 4, units, groups}, {kScales, units * kScales}, {kScales / 4, 1, kGroups}};
        if (!encode_map(p.scales, a.b_scales, kWord, kPlain, scales)) return false;
    }
    return encode_map(p.x, a.a, kXType, kSwizzled, x) &&
           encode_map(p.weights, a.b, kWord, kPlain, codes) &&
           encode_map(p.d, a.d, kDType, kSwizzled, d);
}

inline int multiprocessors(const FpcGemmArguments& a) {
    int device = 0, count = a.sm_count;
    if (count > 0) return count;
    if (cudaGetDevice(&device)) return 0;
    return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) ? 0 : count;
}

template <class T>
int row_tiles(const FpcGemmArguments& a) {
    return (a.n + T::kRows - 1) / T::kRows;
}

template <class T>
int token_tiles(const FpcGemmArguments& a) {
    return (a.m + T::kTokens - 1) / T::kTokens;
}

// Let blocks of a kernel have so many bytes, on the current device. A thread that did nothing with
// CUDA before has the context of the device from then on.
template <class Kernel>
cudaError_t allow_shared(Kernel kernel, int bytes) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

// A status with CUDA's error in it, as those of CUTLASS have CUTLASS's.
inline int32_t launch_status(cudaError_t error) {
    return taken(error) ? FPC_LAUNCH + 256 * (int32_t)error : FPC_OK;
}

template <class P, class T>
int32_t start_many(const ManyParameters& p, int clusters, void* stream) {
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = T::kSplit;
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3((unsigned)(clusters * T::kSplit));
    config.blockDim = dim3(T::kThreads);
    config.dynamicSmemBytes = ManyLayout<P, T>::kBytes;
    config.stream = (cudaStream_t)stream;
    config.attrs = attributes;
    config.numAttrs = T::kSplit > 1 ? 2 : 1;
    return launch_status(cudaLaunchKernelEx(&config, gemm_many<P, T>, p));
}

// Launch with tiles T; `a` was not refused.
template <class P, class T>
int32_t launch_tiles(const FpcGemmArguments& a, int sms) {
    ManyParameters p{};
    // Zeros behind the last token would cost more time than tokens. Whatever is in their place in
    // shared memory gets into sums that are not stored.
    p.tokens = a.m < T::kTokens ? a.m : T::kTokens;
    // Before the maps: the driver encodes them in the context of the thread only.
    const auto kernel = gemm_many<P, T>;
    const int32_t failed = launch_status(allow_shared(kernel, ManyLayout<P, T>::kBytes));
    if (failed) return failed;
    if (!encode_maps<P, T>(p, a)) return FPC_INITIALIZE;
    p.token_scale = a.token_scale, p.row_scale = a.row_scale, p.bias = a.bias;
    p.scalar_a = a.scalar_a, p.scalar_b = a.scalar_b, p.alpha = a.alpha;
    p.residual = (const uint8_t*)a.residual;
    p.m = a.m, p.n = a.n, p.units = a.k / kUnitK;
    p.row_tiles = row_tiles<T>(a), p.token_tiles = token_tiles<T>(a);
    // Tokens that stay in the L2 cache while all rows pass.
    constexpr int64_t kCached = 8 << 20;
    const int64_t bytes = (int64_t)T::kTokens * a.k * kStepBytes / ManyStep<P>::kStepK;
    const int64_t together = kCached / bytes;
    p.together = together < 1 ? 1 : together > 16 ? 16 : (int32_t)together;
    // Blocks that share K have one tile: their barrier is used once.
    const int tiles = p.row_tiles * p.token_tiles;
    return start_many<P, T>(p, T::kSplit > 1 || tiles < sms ? tiles : sms, a.stream);
}

}  // namespace fpc
