// What a warp does with steps of 16 keys: products with queries, softmax, and sums of values.
//
// Keys and values go from global memory to the tensor cores without shared memory between: a sum
// does not care which of its terms an instruction calls its first, so each lane loads eight numbers of
// a row, and queries, weights and results are laid out to match. Keys, and channels of values, are the
// 16 rows of an instruction; queries are its 8 columns, as there are seldom more.

namespace fpc {

constexpr int kAttendWarps = 4, kAttendThreads = 32 * kAttendWarps;
constexpr int kMostRows = 16;   // queries of a head of keys
constexpr int kTileQueries = 8;  // of them, in an instruction
constexpr int kStepKeys = 16;   // of a warp
constexpr float kMinusInfinity = -__builtin_inff();
constexpr float kLogTwoOfE = 1.4426950408889634f;

// Two E4M3 codes as bf16, exactly. Sign, exponent and mantissa are put where bf16 has them, which
// gives the value times 2**-120.
template <bool kHigh>
FPC_DEVICE uint32_t pair_of_codes(uint32_t codes) {
    const uint32_t spread = spread_bytes<kHigh>(codes);
    return multiply_bf16((spread << 8 & 0x80008000u) | (spread << 4 & 0x07F007F0u), 0x7B807B80u);
}

// A lane's numbers of eight channels of a key or value, as they lie in memory.
template <bool kCodes>
struct Piece {
    Quad numbers;
};
template <>
struct Piece<true> {
    Twin numbers;
};

// What a lane has of the keys and values of a step, on its way while earlier steps are summed.
template <class P>
struct StepRows {
    Piece<P::kCodes> keys[2][P::kWidth / 32], values[4][P::kWidth / 64];
    float of_keys[2] = {1, 1}, of_values[2] = {1, 1};  // scales
};

// What a warp has of the queries 8 q + 2t + j, t = lane % 4: softmax relative to the largest product
// so far, and sums of values. sums[q][c][i] has the channels 64c + 8g + 2i + row, g = lane / 4, at
// 2 row + j.
template <int kWidth, int kQueryTiles>
struct Partial {
    float largest[kQueryTiles][2], total[kQueryTiles][2] = {};
    float sums[kQueryTiles][kWidth / 64][4][4] = {};

    FPC_DEVICE Partial() {
#pragma unroll
        for (int q = 0; q < kQueryTiles; q++) largest[q][0] = largest[q][1] = kMinusInfinity;
    }
};

// kQueryTiles: tiles of 8 queries that read a head of keys.
template <class P, int kQueryTiles>
struct AttendSteps {
    static constexpr int kWidth = P::kWidth, kChunks = kWidth / 32, kTiles = kWidth / 64;
    static constexpr int kBytes = P::kCodes ? 1 : 2;  // of a number of a key
    // Steps of which keys and values are on their way: as many as there are registers for.
    static constexpr int kAhead = kQueryTiles == 1 ? 2 : 1;
    // In shared memory, for each warp: sums, largest products, totals. Rows begin in different banks.
    static constexpr int kRow = kWidth + 1, kLargest = kMostRows * kRow, kTotal = kLargest + kMostRows;
    static constexpr int kFloats = kTotal + kMostRows;
    // Weights times scales would leave the range of fp16.
    static_assert(!P::kCodes || P::kType == kBf16, "codes are multiplied as bf16");

    const FpcAttendArguments& a;
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int batch, group, rows;
    const uint8_t *keys, *values;
    const uint8_t* masks[kQueryTiles][2];  // of a lane's queries
    int last[kQueryTiles][2];              // the last keys they may see; -1 where there is no query
    Quad queries[kQueryTiles][kChunks];

    FPC_DEVICE explicit AttendSteps(const FpcAttendArguments& arguments)
        : a(arguments),
          batch((int)blockIdx.y / a.groups),
          group((int)blockIdx.y % a.groups),
          rows(a.heads / a.groups * a.queries),
          keys((const uint8_t*)a.k + place(a.k_strides) * kBytes),
          values((const uint8_t*)a.v + place(a.v_strides) * kBytes) {
#pragma unroll
        for (int q = 0; q < kQueryTiles; q++) {
            const int row = kTileQueries * q + g;
            const uint16_t* from = (const uint16_t*)a.q + batch * a.q_strides[0] +
                                   head_of(row) * a.q_strides[1] + query_of(row) * a.q_strides[2];
#pragma unroll
            for (int c = 0; c < kChunks; c++)
                queries[q][c] = row < rows ? load_quad(from + 32 * c + 8 * t) : Quad{};
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int own = kTileQueries * q + 2 * t + j;
                const int64_t query = query_of(own);
                masks[q][j] = a.mask + batch * a.mask_strides[0] +
                              head_of(own) * a.mask_strides[1] + query * a.mask_strides[2];
                last[q][j] = a.causal && query < a.keys ? (int)query : a.keys - 1;
                if (own >= rows) last[q][j] = -1;
            }
        }
    }

    FPC_DEVICE int64_t place(const int64_t (&strides)[3]) const {
        return batch * strides[0] + group * strides[1];
    }
    FPC_DEVICE int64_t head_of(int row) const {
        return group * (a.heads / a.groups) + row / a.queries;
    }
    FPC_DEVICE int64_t query_of(int row) const { return row % a.queries; }

    // Whether a lane's queries see its two keys of a step, by bits: 4 q + 2 tile + j.
    FPC_DEVICE uint32_t seen_of(int step) const {
        uint32_t seen = 0;
#pragma unroll
        for (int bit = 0; bit < 4 * kQueryTiles; bit++) {
            const int q = bit / 4, j = bit % 2, key = step * kStepKeys + bit / 2 % 2 * 8 + g;
            bool sees = key <= last[q][j];
            if (sees && a.mask) sees = masks[q][j][key * a.mask_strides[3]];
            seen |= (uint32_t)sees << bit;
        }
        return seen;
    }

    // Products of keys that are not there are not seen; the last one is read in their place.
    FPC_DEVICE int there(int key) const { return key < a.keys ? key : a.keys - 1; }

    FPC_DEVICE Piece<P::kCodes> load_piece(const uint8_t* from, int64_t stride, int key,
                                           int channel) const {
        from += (there(key) * stride + channel) * kBytes;
        if constexpr (P::kCodes) return {load_twin(from)};
        else return {load_quad(from)};
    }

    FPC_DEVICE void load(StepRows<P>& to, int step) const {
        const int first = step * kStepKeys;
#pragma unroll
        for (int tile = 0; tile < 2; tile++)
#pragma unroll
            for (int c = 0; c < kChunks; c++)
                to.keys[tile][c] =
                    load_piece(keys, a.k_strides[2], first + 8 * tile + g, 32 * c + 8 * t);
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int c = 0; c < kTiles; c++)
                to.values[j][c] = load_piece(values, a.v_strides[2],
                                             first + j / 2 * 8 + 2 * t + j % 2, 64 * c + 8 * g);
        if constexpr (P::kCodes)
#pragma unroll
            for (int tile = 0; tile < 2; tile++) {
                const int64_t key = there(first + 8 * tile + g);
                to.of_keys[tile] =
                    load_number(a.k_scales + place(a.k_scale_strides) + key * a.k_scale_strides[2]);
                to.of_values[tile] =
                    load_number(a.v_scales + place(a.v_scale_strides) + key * a.v_scale_strides[2]);
            }
    }

    // Numbers 2i and 2i + 1 of a piece as a word.
    FPC_DEVICE static uint32_t pair_of(const Piece<P::kCodes>& piece, int i) {
        if constexpr (P::kCodes) {
            const uint32_t codes = piece.numbers.words[i / 2];
            return i % 2 ? pair_of_codes<true>(codes) : pair_of_codes<false>(codes);
        } else {
            return piece.numbers.words[i];
        }
    }

    // Products of the keys g and g + 8 with the queries 2t and 2t + 1, at 2 tile + j.
    FPC_DEVICE void multiply_keys(float (&products)[kQueryTiles][4], const StepRows<P>& held) const {
#pragma unroll
        for (int c = 0; c < kChunks; c++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint32_t k[4];
#pragma unroll
                for (int i = 0; i < 4; i++) k[i] = pair_of(held.keys[i % 2][c], 2 * half + i / 2);
#pragma unroll
                for (int q = 0; q < kQueryTiles; q++)
                    multiply_add_16<P::kType>(products[q], k, queries[q][c].words[2 * half],
                                              queries[q][c].words[2 * half + 1]);
            }
    }

    // The weights of a step's values as right operands; earlier sums are rescaled.
    FPC_DEVICE void weigh(Partial<kWidth, kQueryTiles>& to, const float (&products)[kQueryTiles][4],
                          const StepRows<P>& held, uint32_t seen,
                          uint32_t (&weights)[kQueryTiles][2]) const {
        const float scale = multiply(a.scale, kLogTwoOfE);
#pragma unroll
        for (int q = 0; q < kQueryTiles; q++) {
            float scores[2][2];  // of a key, of a query
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float largest = to.largest[q][j];
#pragma unroll
                for (int tile = 0; tile < 2; tile++) {
                    const bool sees = seen >> (4 * q + 2 * tile + j) & 1;
                    float product = multiply(products[q][2 * tile + j], scale);
                    if constexpr (P::kCodes) product = multiply(product, held.of_keys[tile]);
                    scores[tile][j] = sees ? product : kMinusInfinity;
                    largest = larger_number(largest, scores[tile][j]);
                }
#pragma unroll
                for (int lanes = 4; lanes < 32; lanes *= 2)
                    largest = larger_number(largest, exchange(largest, lanes));
                const float base = largest == kMinusInfinity ? 0 : largest;
                const float correction = power_of_two(subtract(to.largest[q][j], base));
#pragma unroll
                for (int tile = 0; tile < 2; tile++)
                    scores[tile][j] = power_of_two(subtract(scores[tile][j], base));
                to.largest[q][j] = largest;
                to.total[q][j] =
                    fused(to.total[q][j], correction, add(scores[0][j], scores[1][j]));
#pragma unroll
                for (int c = 0; c < kTiles; c++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
#pragma unroll
                        for (int row = 0; row < 2; row++) {
                            float& x = to.sums[q][c][i][2 * row + j];
                            x = multiply(x, correction);
                        }
            }
#pragma unroll
            for (int tile = 0; tile < 2; tile++) {
                if constexpr (P::kCodes)
#pragma unroll
                    for (int j = 0; j < 2; j++)
                        scores[tile][j] = multiply(scores[tile][j], held.of_values[tile]);
                weights[q][tile] = transposed(pair_in<P::kType>(scores[tile][0], scores[tile][1]));
            }
        }
    }

    FPC_DEVICE void add_values(Partial<kWidth, kQueryTiles>& to, const uint32_t (&weights)[kQueryTiles][2],
                               const StepRows<P>& held) const {
#pragma unroll
        for (int c = 0; c < kTiles; c++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                uint32_t of[4];
#pragma unroll
                for (int j = 0; j < 4; j++) of[j] = pair_of(held.values[j][c], i);
                const uint32_t v[4] = {low_halves(of[0], of[1]), high_halves(of[0], of[1]),
                                       low_halves(of[2], of[3]), high_halves(of[2], of[3])};
#pragma unroll
                for (int q = 0; q < kQueryTiles; q++)
                    multiply_add_16<P::kType>(to.sums[q][c][i], v, weights[q][0], weights[q][1]);
            }
    }

    // Add the steps of a warp, of `split` blocks, to what it has. What a later step needs is loaded
    // as soon as its place is free, so there is always something on its way.
    FPC_DEVICE void add_steps(Partial<kWidth, kQueryTiles>& to, int split, int rank) const {
        const int steps = (a.keys + kStepKeys - 1) / kStepKeys, stride = split * kAttendWarps;
        int step = rank * kAttendWarps + warp;
        StepRows<P> held[kAhead];
        uint32_t seen[kAhead], then[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; i++) {
            seen[i] = seen_of(step + i * stride);
            then[i] = seen_of(step + (kAhead + i) * stride);
        }
        // The first ones before it is known whether they are seen.
        if (step < steps) load(held[0], step);
#pragma unroll
        for (int i = 1; i < kAhead; i++)
            if (any_lane(seen[i])) load(held[i], step + i * stride);
        while (step < steps) {
#pragma unroll
            for (int i = 0; i < kAhead; i++) {
                const uint32_t later = seen_of(step + 2 * kAhead * stride);
                if (any_lane(seen[i])) {
                    float products[kQueryTiles][4] = {};
                    uint32_t weights[kQueryTiles][2];
                    multiply_keys(products, held[i]);
                    weigh(to, products, held[i], seen[i], weights);
                    add_values(to, weights, held[i]);
                }
                if (any_lane(then[i])) load(held[i], step + kAhead * stride);
                seen[i] = then[i], then[i] = later;
                step += stride;
            }
        }
    }

    // Leave a warp's part in shared memory.
    FPC_DEVICE void store(const Partial<kWidth, kQueryTiles>& from, float* to) const {
#pragma unroll
        for (int q = 0; q < kQueryTiles; q++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int row = kTileQueries * q + 2 * t + j;
                float total = from.total[q][j];
#pragma unroll
                for (int lanes = 4; lanes < 32; lanes *= 2)
                    total = add(total, exchange(total, lanes));
                if (row >= rows) continue;
                if (g == 0) to[kLargest + row] = from.largest[q][j], to[kTotal + row] = total;
#pragma unroll
                for (int c = 0; c < kTiles; c++)
#pragma unroll
                    for (int i = 0; i < 8; i++)
                        to[row * kRow + 64 * c + 8 * g + i] = from.sums[q][c][i / 2][i % 2 * 2 + j];
            }
    }
};

}  // namespace fpc
