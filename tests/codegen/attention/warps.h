// codegen/attention/warps.h on one CPU, with the coroutines of tests/codegen/cuda/emulation.h.

namespace fpc {

// What each lane of a warp shows to the others; two of each, for even and odd exchanges.
struct Shown {
    uint32_t words[6];
};

static std::vector<Shown> shown[2];

// Show `own` to the other lanes, and return what all of them show.
static const Shown* show(const Shown& own) {
    const unsigned index = thread_index();
    auto& place = shown[current->exchanges++ % 2];
    if (place.size() < threads.size()) place.resize(threads.size());
    place[index] = own;
    wait_for_others();
    return &place[index / 32 * 32];
}

template <Type kType>
static double element(uint32_t word, int half) {
    return widened<kType>(half ? word >> 16 : word & 0xFFFF);
}

// The fragments of mma.sync.m16n8k16, by the tables of the PTX manual; sums are exact, then rounded.
template <Type kType>
static void multiply_add_16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const Shown* lanes = show({{a[0], a[1], a[2], a[3], b0, b1}});
    const int lane = (int)threadIdx.x % 32;
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double sum = d[i];
        for (int k = 0; k < 16; k++) {
            const int word_of_a = row / 8 + k / 8 * 2, word_of_b = 4 + k / 8, pair = k % 8 / 2;
            const Shown &of_a = lanes[row % 8 * 4 + pair], &of_b = lanes[column * 4 + pair];
            sum += element<kType>(of_a.words[word_of_a], k % 2) *
                   element<kType>(of_b.words[word_of_b], k % 2);
        }
        d[i] = (float)sum;
    }
}

static uint32_t transposed(uint32_t pair) {
    const Shown* lanes = show({{pair}});
    const int g = (int)threadIdx.x % 32 / 4, t = (int)threadIdx.x % 4;
    const auto at = [&](int row) { return lanes[4 * row + g / 2].words[0] >> 16 * (g % 2) & 0xFFFF; };
    return at(2 * t) | at(2 * t + 1) << 16;
}

static float power_of_two(float x) { return exp2f(x); }
static float larger_number(float a, float b) { return fmaxf(a, b); }

static bool any_lane(bool value) {
    const Shown* lanes = show({{value}});
    bool any = false;
    for (int i = 0; i < 32; i++) any |= lanes[i].words[0] != 0;
    return any;
}

static uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xFFFF) | b << 16; }
static uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xFFFF0000u); }

template <bool kHigh>
static uint32_t spread_bytes(uint32_t word) {
    word >>= kHigh * 16;
    return (word & 0xFF) | (word & 0xFF00) << 8;
}

static uint32_t multiply_bf16(uint32_t a, uint32_t b) {
    return bf16_pair((float)(element<kBf16>(a, 0) * element<kBf16>(b, 0)),
                     (float)(element<kBf16>(a, 1) * element<kBf16>(b, 1)));
}

static Twin load_twin(const void* from) { return *(const Twin*)from; }
static float load_number(const float* from) { return *from; }

template <class Arguments>
static int most_clusters(void (*kernel)(Arguments), dim3, unsigned) {
    wide.insert((const void*)kernel);
    return 16;
}

static int current_device() { return 0; }

}  // namespace fpc
