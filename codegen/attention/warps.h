// The instructions, and questions to CUDA, of attention that instructions.h does not have; tests have
// others in their place.

namespace fpc {

// d += a b: 16 rows of a by 8 columns of b, 16 deep, in the layout of mma.sync.
template <Type kType>
FPC_DEVICE void multiply_add_16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (kType == kBf16)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3},"
            " {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3},"
            " {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2 to a power; 0 for -infinity.
FPC_DEVICE float power_of_two(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// Bytes 0 and 1, or 2 and 3, of a word in the low bytes of its halves.
template <bool kHigh>
FPC_DEVICE uint32_t spread_bytes(uint32_t word) {
    return __byte_perm(word, 0, kHigh ? 0x4342 : 0x4140);
}

// Two products of bf16.
FPC_DEVICE uint32_t multiply_bf16(uint32_t a, uint32_t b) {
    uint32_t product;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

// As load_quad.
FPC_DEVICE Twin load_twin(const void* from) {
    Twin twin;
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
                 : "=r"(twin.words[0]), "=r"(twin.words[1])
                 : "l"(from));
    return twin;
}

FPC_DEVICE float load_number(const float* from) {
    float number;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(number) : "l"(from));
    return number;
}

// Of 8 by 8 numbers of 16 bits, of which each lane has two neighbours in row lane / 4, the columns.
FPC_DEVICE uint32_t transposed(uint32_t pair) {
    uint32_t result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
}

// The larger of two numbers; the other one if one is NaN.
FPC_DEVICE float larger_number(float a, float b) { return fmaxf(a, b); }

// Whether a lane of the warp says so.
FPC_DEVICE bool any_lane(bool value) { return __any_sync(~0u, value); }

// Halves of two words side by side: the low ones, or the high ones.
FPC_DEVICE uint32_t low_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
FPC_DEVICE uint32_t high_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

// --- launches, on the CPU ----------------------------------------------------------------------

// How many clusters of so many blocks run at once. More than 8 blocks have to be allowed first, and
// not every GPU has the room.
template <class Arguments>
int most_clusters(void (*kernel)(Arguments), dim3 block, unsigned cluster) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(cluster), config.blockDim = block;
    config.attrs = &attribute, config.numAttrs = 1;
    int count = 0;
    const auto allowed = cudaFuncAttributeNonPortableClusterSizeAllowed;
    if (taken(cudaFuncSetAttribute(kernel, allowed, 1))) return 0;
    return taken(cudaOccupancyMaxActiveClusters(&count, kernel, &config)) ? 0 : count;
}

// The number of the current device; -1 if there is none.
inline int current_device() {
    int device = -1;
    return taken(cudaGetDevice(&device)) ? -1 : device;
}

}  // namespace fpc
