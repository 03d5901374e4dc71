// A step of gemm_few: 64 of K of a tile of 16 rows, by mma.sync, for each kind of operands.

namespace fpc {

// --- instructions --------------------------------------------------------------------------------

// Weights pass through once: they need not stay in the first cache.
FPC_DEVICE Quad load_stream(const uint8_t* address) {
    Quad q;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(q.words[0]), "=r"(q.words[1]), "=r"(q.words[2]), "=r"(q.words[3])
                 : "l"(address));
    return q;
}

FPC_DEVICE uint32_t load_stream_word(const uint8_t* address) {
    uint32_t word;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(word) : "l"(address));
    return word;
}

FPC_DEVICE Quad load_matrices(uint32_t address) {
    Quad q;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(q.words[0]), "=r"(q.words[1]), "=r"(q.words[2]), "=r"(q.words[3])
                 : "r"(address));
    return q;
}

FPC_DEVICE void multiply_add(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
        " {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

FPC_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
        " {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// --- steps --------------------------------------------------------------------------------------

template <class P, Mode kMode = P::kMode>
struct FewStep;

// A lane's quad: words 2j and 2j + 1 are of rows g and g + 8, k32 step j; in `order 8`.
template <class P>
struct FewStep<P, kInt8> {
    static constexpr int kBytesX = 64;  // of a token
    Decoder<P> decoder;

    template <int kTiles>
    FPC_DEVICE void run(int32_t (&even)[kTiles][4], int32_t (&odd)[kTiles][4], const Quad& w,
                        const uint32_t (&)[2], int, const uint32_t (&x)[kTiles],
                        int offset) const {
        uint32_t a[2][4];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            decoder.decode(w.words[2 * j], a[j][0], a[j][2]);
            decoder.decode(w.words[2 * j + 1], a[j][1], a[j][3]);
        }
#pragma unroll
        for (int i = 0; i < kTiles; i++) {
            const Quad b = load_matrices(x[i] + offset);
            multiply_add(even[i], a[0], b.words[0], b.words[1]);
            multiply_add(odd[i], a[1], b.words[2], b.words[3]);
        }
    }

    FPC_DEVICE static int x_of_lane(int lane) { return (lane >> 3) * 16; }
    FPC_DEVICE static int token_of_lane(int lane) { return lane & 7; }
};

// Nibble i and nibble i + 4 as two bf16 values times 2**-126 (E2M1: its exponent and its mantissa bit
// are put where those of bf16 are; its zero and its subnormal one become bf16's).
template <int kNibble>
FPC_DEVICE uint32_t spread_pair(uint32_t codes) {
    constexpr int kUp = 6 - 4 * kNibble;
    const uint32_t moved = kUp >= 0 ? codes << (kUp >= 0 ? kUp : 0) : codes >> (kUp < 0 ? -kUp : 0);
    return (moved & 0x01C001C0) | (codes << (12 - 4 * kNibble) & 0x80008000);
}

// X is E4M3, made bf16 on its way to shared memory, k and k + 16 side by side: in `order 8`.
template <class P>
struct FewStep<P, kE4m3> {
    static constexpr int kBytesX = 128;

    template <int kTiles>
    FPC_DEVICE void run(float (&even)[kTiles][4], float (&odd)[kTiles][4], const Quad& w,
                        const uint32_t (&)[2], int, const uint32_t (&x)[kTiles],
                        int offset) const {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            uint32_t a[2][4];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint32_t codes = w.words[2 * j + half];
                a[0][half] = multiply_pair(spread_pair<0>(codes), kUnspread);
                a[0][half + 2] = multiply_pair(spread_pair<1>(codes), kUnspread);
                a[1][half] = multiply_pair(spread_pair<2>(codes), kUnspread);
                a[1][half + 2] = multiply_pair(spread_pair<3>(codes), kUnspread);
            }
#pragma unroll
            for (int i = 0; i < kTiles; i++) {
                const Quad b = load_shared_quad(x[i] + offset + j * 64);
                multiply_add(even[i], a[0], b.words[0], b.words[1]);
                multiply_add(odd[i], a[1], b.words[2], b.words[3]);
            }
        }
    }

    FPC_DEVICE static int x_of_lane(int lane) { return (lane & 3) * 16; }
    FPC_DEVICE static int token_of_lane(int lane) { return lane >> 2; }
};

// X is bf16; weights in `order 16`, with scales of blocks.
template <class P>
struct FewStep<P, kFloats> {
    static constexpr int kBytesX = 128;

    template <int kTiles>
    FPC_DEVICE void run(float (&even)[kTiles][4], float (&odd)[kTiles][4], const Quad& w,
                        const uint32_t (&scales)[2], int step, const uint32_t (&x)[kTiles],
                        int offset) const {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            uint32_t a[2][4];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint32_t pairs[4];
                spread_word(w.words[2 * j + half], pairs);
#pragma unroll
                for (int q = 0; q < 2; q++) {
                    const int byte = P::kBlock == 16 ? 2 * j + q : 2 * step + j;
                    const uint32_t scale = unspread_factor<P::kBlock>(scales[half], byte);
                    a[q][half] = multiply_pair(pairs[2 * q], scale);
                    a[q][half + 2] = multiply_pair(pairs[2 * q + 1], scale);
                }
            }
#pragma unroll
            for (int i = 0; i < kTiles; i++) {
                const Quad b = load_matrices(x[i] + offset + j * 64);
                multiply_add(even[i], a[0], b.words[0], b.words[1]);
                multiply_add(odd[i], a[1], b.words[2], b.words[3]);
            }
        }
    }

    FPC_DEVICE static int x_of_lane(int lane) { return (lane >> 3) * 16; }
    FPC_DEVICE static int token_of_lane(int lane) { return lane & 7; }
};

}  // namespace fpc
