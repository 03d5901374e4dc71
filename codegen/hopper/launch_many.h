// The launch of gemm_many: tensor maps and the shape of the grid.

namespace fpc {

// The driver's function, found at run time: a library that names it would not load without a driver.
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

inline int32_t refusal(const FpcPackedGemmArguments& a, bool sums, bool exponents) {
    constexpr int32_t kMost = 1 << 30, kLongest = 1 << 16;
    if (!a.a || !a.b || !a.d || (sums && !a.a_sum) || (exponents != (a.b_scales != nullptr)))
        return FPC_NULL_POINTER;
    if (((uintptr_t)a.a | (uintptr_t)a.b | (uintptr_t)a.b_scales | (uintptr_t)a.d) & 15)
        return FPC_MISALIGNED;
    const bool fits = a.m <= kMost && a.n <= kMost && a.k <= kLongest;
    if (!fits || a.m < 1 || a.n < 8 || a.n % 8 || a.k < kStepK || a.k % kStepK || a.residual)
        return FPC_UNSUPPORTED_SHAPE;
    return FPC_OK;
}

template <class P, class T>
bool encode_maps(ManyParameters& p, const FpcPackedGemmArguments& a) {
    using S = Staging<P, T>;
    const cuuint64_t m = a.m, n = a.n, k = a.k, groups = (n + 15) / 16, steps = k / kStepK;
    constexpr int kGroupsOfRows = T::kRows / 16, kSize = kSizeOf<P::kOutput>;
    constexpr auto kWord = CU_TENSOR_MAP_DATA_TYPE_UINT32;
    constexpr auto kDType = P::kOutput == kF32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                               : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const MapShape<2> x{{k, m}, {k}, {kStepK, T::kTokens / T::kSharing}};
    const MapShape<3> codes{{256, steps, groups}, {1024, steps * 1024}, {256, 1, kGroupsOfRows}};
    const MapShape<3> exponents{{16, steps, groups}, {64, steps * 64}, {16, 1, kGroupsOfRows}};
    const MapShape<2> d{{n, m}, {n * kSize}, {S::kBoxRows, S::kTokens}};
    if (P::kExponents &&
        !encode_map(p.exponents, a.b_scales, kWord, CU_TENSOR_MAP_SWIZZLE_NONE, exponents))
        return false;
    return encode_map(p.x, a.a, CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_SWIZZLE_128B, x) &&
           encode_map(p.weights, a.b, kWord, CU_TENSOR_MAP_SWIZZLE_NONE, codes) &&
           encode_map(p.d, a.d, kDType, CU_TENSOR_MAP_SWIZZLE_128B, d);
}

inline int multiprocessors(const FpcPackedGemmArguments& a) {
    int device = 0, count = a.sm_count;
    if (count > 0) return count;
    if (cudaGetDevice(&device)) return 0;
    return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) ? 0 : count;
}

template <class T>
int tiles_of(const FpcPackedGemmArguments& a) {
    constexpr int kRows = T::kRows * T::kSharing;
    return (a.n + kRows - 1) / kRows * ((a.m + T::kTokens - 1) / T::kTokens);
}

template <class P, class T>
int32_t launch_many(const FpcPackedGemmArguments& a) {
    if (a.m == 0) return FPC_OK;
    const int32_t refused = refusal(a, P::kMode == kInt8, P::kExponents);
    if (refused) return refused;
    if (a.k / kStepK < T::kSplit) return FPC_UNSUPPORTED_SHAPE;
    ManyParameters p{};
    if (!encode_maps<P, T>(p, a)) return FPC_INITIALIZE;
    p.token_scale = a.token_scale;
    p.row_scale = a.row_scale;
    p.bias = a.bias;
    p.scalar_a = a.scalar_a;
    p.scalar_b = a.scalar_b;
    p.x_sum = a.a_sum;
    p.alpha = a.alpha;
    p.m = a.m;
    p.n = a.n;
    p.steps = a.k / kStepK;
    p.row_tiles = (a.n + T::kRows * T::kSharing - 1) / (T::kRows * T::kSharing);
    p.token_tiles = (a.m + T::kTokens - 1) / T::kTokens;
    // Tokens that stay in the L2 cache while all rows pass.
    constexpr int64_t kCached = 8 << 20;
    const int64_t together = kCached / ((int64_t)T::kTokens * a.k);
    p.together = together < 1 ? 1 : together > 16 ? 16 : (int32_t)together;

    const int count = multiprocessors(a), tiles = p.row_tiles * p.token_tiles;
    if (count < T::kCluster) return FPC_LAUNCH;
    // Blocks that share K have one tile: their barrier is used once.
    const int clusters = T::kSplit > 1 || tiles < count / T::kCluster ? tiles : count / T::kCluster;
    const auto kernel = gemm_many<P, T>;
    constexpr int kBytes = ManyLayout<P, T>::kBytes;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes))
        return FPC_LAUNCH;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = T::kCluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3((unsigned)(clusters * T::kCluster));
    config.blockDim = dim3(kManyThreads);
    config.dynamicSmemBytes = kBytes;
    config.stream = (cudaStream_t)a.stream;
    config.attrs = &cluster;
    config.numAttrs = T::kCluster > 1;
    return cudaLaunchKernelEx(&config, kernel, p) ? FPC_LAUNCH : FPC_OK;
}

}  // namespace fpc
