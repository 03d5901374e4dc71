// The launch of gemm_few: how tiles are divided among blocks, and how much shared memory that takes.

namespace fpc {

inline uint32_t over(int divisor) { return (uint32_t)(((1ull << 32) + divisor - 1) / divisor); }

template <class P, int kTiles, int kCluster>
bool plan_few(FewParameters& p, const FpcGemmArguments& a, int sms, int& blocks, int& bytes) {
    using T = FewTraits<P>;
    constexpr int kTokens = 8 * kTiles;
    const int tiles = (a.n + 15) / 16;
    p.units = a.k / kUnitK;
    if (a.m > kTokens || p.units % kCluster || sms < kCluster) return false;
    blocks = sms / kCluster < tiles ? sms / kCluster : tiles;
    // Sums of all tiles of a block are kept: many rows take several blocks one after another.
    while ((tiles + blocks - 1) / blocks > kMostTiles) blocks += sms / kCluster;
    p.low_tiles = tiles / blocks, p.more_tiles = tiles % blocks;
    p.part = p.units / kCluster;
    const int row = p.part * kUnitK * T::kXBytes;
    p.pitch = row + T::kPad;
    p.over_part = over(p.part), p.over_row = over(row / 16), p.over_m = over(a.m);
    const int most = p.low_tiles + 1;
    bytes = (most * 32 + 2 * kMostFewTokens + (kFewWarps + most) * kTokens * kSumPitch) * 4;
    bytes += kCluster > 1 ? kCluster * most * kTokens * 64 : 0;
    bytes += (a.m + 1) * p.pitch;
    return bytes <= kSharedBytes && (int64_t)a.m * row / 16 < 65536;
}

template <class P, int kTiles, int kCluster>
bool launch_few(const FpcGemmArguments& a, int sms, int32_t& status) {
    FewParameters p{};
    int blocks, bytes;
    if (!plan_few<P, kTiles, kCluster>(p, a, sms, blocks, bytes)) return false;
    p.x = (const uint8_t*)a.a, p.weights = (const uint8_t*)a.b, p.scales = (const uint8_t*)a.b_scales;
    p.token_scale = a.token_scale, p.row_scale = a.row_scale, p.bias = a.bias;
    p.scalar_a = a.scalar_a, p.scalar_b = a.scalar_b, p.alpha = a.alpha;
    p.d = a.d, p.residual = a.residual, p.m = a.m, p.n = a.n, p.k = a.k;
    const auto kernel = gemm_few<P, kTiles, kCluster>;
    // Always the same number: threads that launch it with others would undo each other's.
    status = launch_status(allow_shared(kernel, kSharedBytes));
    if (status) return true;
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = kCluster;
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3((unsigned)(blocks * kCluster));
    config.blockDim = dim3(kFewThreads);
    config.dynamicSmemBytes = bytes;
    config.stream = (cudaStream_t)a.stream;
    config.attrs = attributes;
    config.numAttrs = kCluster > 1 ? 2 : 1;
    status = launch_status(cudaLaunchKernelEx(&config, kernel, p));
    return true;
}

// Whether there is a kernel for so few tokens whose X fits into shared memory; it was launched then.
template <class P>
bool launch_few(const FpcGemmArguments& a, int sms, int32_t& status) {
    if (a.m > kMostFewTokens) return false;
    if (a.m <= 8)
        return launch_few<P, 1, 1>(a, sms, status) || launch_few<P, 1, 2>(a, sms, status);
    return launch_few<P, 2, 1>(a, sms, status) || launch_few<P, 2, 2>(a, sms, status);
}

}  // namespace fpc
