// Products of a warpgroup's matrix in registers (64 rows) with a matrix in shared memory (`tokens`
// rows), both with 32 bytes of K: d[64, tokens] (+)= a b^T. Thread 4g + t of warp w has rows
// 16w + g + {0, 8}: of `a` the bytes 4t.. and 16 + 4t.. (words 0 and 1, 2 and 3), of `d` the
// columns 8i + 2t + {0, 1} (d[4i + {0, 1}] and d[4i + {2, 3}]).

namespace fpc {

// The compiler must not move uses of these registers to before this point.
template <int kCount>
FPC_DEVICE void pin(int32_t (&d)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; i++) asm volatile("" : "+r"(d[i])::"memory");
}

template <int kCount>
FPC_DEVICE void pin(float (&d)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// Registers that were written can be read by the products that follow.
FPC_DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FPC_DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
FPC_DEVICE void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// A matrix whose rows are 128 bytes of K, at a multiple of 1024 bytes, as copies with the swizzle
// of 128 bytes write it. 32 bytes further along K are 2 more.
FPC_DEVICE uint64_t matrix_descriptor(uint32_t address) {
    constexpr uint64_t kSwizzle128 = 1ull << 62, kEightRows = 1024 >> 4;
    return kSwizzle128 | kEightRows << 32 | 1ull << 16 | (uint64_t)(address >> 4 & 0x3FFF);
}

#define FPC_LIST_16 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FPC_LIST_32 \
    FPC_LIST_16 \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FPC_LIST_64 \
    FPC_LIST_32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FPC_LIST_80 \
    FPC_LIST_64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define FPC_LIST_96 \
    FPC_LIST_80 \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FPC_LIST_128 \
    FPC_LIST_96 \
    ", %96, %97, %98, %99, %100, %101, %102, %103" \
    ", %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119" \
    ", %120, %121, %122, %123, %124, %125, %126, %127"

#define FPC_EIGHT(c, i) \
    c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]),  \
        c(d[i + 7])
#define FPC_REGISTERS_16(c, i) FPC_EIGHT(c, i), FPC_EIGHT(c, i + 8)
#define FPC_REGISTERS_32(c, i) FPC_REGISTERS_16(c, i), FPC_REGISTERS_16(c, i + 16)
#define FPC_REGISTERS_64(c, i) FPC_REGISTERS_32(c, i), FPC_REGISTERS_32(c, i + 32)
#define FPC_REGISTERS_80(c, i) FPC_REGISTERS_64(c, i), FPC_REGISTERS_16(c, i + 64)
#define FPC_REGISTERS_96(c, i) FPC_REGISTERS_64(c, i), FPC_REGISTERS_32(c, i + 64)
#define FPC_REGISTERS_128(c, i) FPC_REGISTERS_64(c, i), FPC_REGISTERS_64(c, i + 64)

#define FPC_PRODUCT(name, tokens, count, type, c, types, a0, a1, a2, a3, b, accumulate, options)   \
    FPC_DEVICE void name(type(&d)[count], const uint32_t(&a)[4], uint64_t matrix, bool adding) {   \
        asm volatile(                                                                              \
            "{ .reg .pred adding; setp.ne.b32 adding, %" #accumulate ", 0;\n"                      \
            "wgmma.mma_async.sync.aligned.m64n" #tokens types " {" FPC_LIST_##count "}, "          \
            "{%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", adding" options "; }"              \
            : FPC_REGISTERS_##count(c, 0)                                                          \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(matrix), "r"((int)adding)            \
            : "memory");                                                                           \
    }

#define FPC_PRODUCTS(name, type, c, types, options)                                               \
    FPC_PRODUCT(name, 32, 16, type, c, types, 16, 17, 18, 19, 20, 21, options)                     \
    FPC_PRODUCT(name, 64, 32, type, c, types, 32, 33, 34, 35, 36, 37, options)                     \
    FPC_PRODUCT(name, 128, 64, type, c, types, 64, 65, 66, 67, 68, 69, options)                    \
    FPC_PRODUCT(name, 160, 80, type, c, types, 80, 81, 82, 83, 84, 85, options)                    \
    FPC_PRODUCT(name, 192, 96, type, c, types, 96, 97, 98, 99, 100, 101, options)                  \
    FPC_PRODUCT(name, 256, 128, type, c, types, 128, 129, 130, 131, 132, 133, options)

FPC_PRODUCTS(add_int8_products, int32_t, "+r", "k32.s32.u8.s8", "")
FPC_PRODUCTS(add_e4m3_products, float, "+f", "k32.f32.e4m3.e4m3", ", 1, 1")
FPC_PRODUCTS(add_bf16_products, float, "+f", "k16.f32.bf16.bf16", ", 1, 1, 0")

#undef FPC_PRODUCTS
#undef FPC_PRODUCT

}  // namespace fpc
