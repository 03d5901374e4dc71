// Which tiles gemm_many takes: those whose blocks are done first by this model of their time:
//
//   waves * (kFixed + kEach * units of K of a block),   waves = ceil(tiles / blocks at a time)
//
// in nanoseconds, with numbers for each shape of tile that were fitted to measured times of an H200
// (132 SMs, 576 to 14336 rows and K, 24 to 4096 tokens). Those of 160 and 192 tokens lie between
// the measured ones of 128 and 256.
//
// Whether blocks share K depends on the number of tokens, and so do the last bits of results of
// floating point, by the order in which K is added. Sums of integers are exact in any order.

namespace fpc {

// kPerSm: blocks that an SM runs at once, if they do not stay for a second tile.
template <class T, int kFixed_, int kEach_, int kPerSm_ = 1>
struct TimedTile {
    using Tile = T;
    static constexpr int kFixed = kFixed_, kEach = kEach_, kPerSm = kPerSm_;
};

template <class... Timed>
struct TileList {};

template <class P, Mode kMode = P::kMode>
struct ManyTiles;

template <class P>
struct ManyTiles<P, kInt8> {
    using List = TileList<
        TimedTile<ManyTile<256>, 4250, 610>, TimedTile<ManyTile<192>, 3550, 500>,
        TimedTile<ManyTile<160>, 3200, 445>, TimedTile<ManyTile<128>, 2840, 390>,
        TimedTile<ManyTile<64>, 2340, 340>, TimedTile<ManyTile<32>, 1830, 330>,
        TimedTile<ManyTile<128, 2>, 3910, 415>, TimedTile<ManyTile<64, 2>, 3060, 365>,
        TimedTile<ManyTile<64, 1, 1>, 2060, 237>, TimedTile<ManyTile<64, 2, 1>, 2480, 270>,
        TimedTile<ManyTile<32, 2, 1>, 2210, 258>>;
};

template <class P>
struct ManyTiles<P, kE4m3> {
    using List = TileList<
        TimedTile<ManyTile<256>, 3510, 830>, TimedTile<ManyTile<192>, 2810, 670>,
        TimedTile<ManyTile<128>, 2110, 510>, TimedTile<ManyTile<64>, 2070, 356>,
        TimedTile<ManyTile<32>, 1730, 320>, TimedTile<ManyTile<64, 1, 1>, 1790, 272>,
        TimedTile<ManyTile<32, 1, 1>, 1630, 231>, TimedTile<ManyTile<64, 2, 1>, 2340, 306>,
        TimedTile<ManyTile<32, 2, 1>, 2070, 277>>;
};

struct TilesWithoutBlocks {
    using List = TileList<
        TimedTile<ManyTile<256>, 3350, 1225>, TimedTile<ManyTile<192>, 2790, 940>,
        TimedTile<ManyTile<160>, 2510, 795>, TimedTile<ManyTile<128>, 2230, 655>,
        TimedTile<ManyTile<64>, 1910, 560>, TimedTile<ManyTile<32>, 1660, 530>,
        TimedTile<ManyTile<128, 1, 1>, 2170, 385>, TimedTile<ManyTile<64, 1, 1>, 1790, 392>,
        TimedTile<ManyTile<128, 2>, 3410, 675>, TimedTile<ManyTile<64, 2>, 2650, 598>,
        TimedTile<ManyTile<64, 2, 1>, 2240, 435>, TimedTile<ManyTile<32, 2, 1>, 1650, 500, 2>>;
};

// Measured were tiles of 256, 128 and 64 tokens, and those of 64 rows with 64 and 32 tokens, of
// blocks that do not share K. The others take as much longer than without scales of blocks.
struct TilesOfBlocks {
    using List = TileList<
        TimedTile<ManyTile<256>, 3170, 1230>, TimedTile<ManyTile<192>, 2740, 980>,
        TimedTile<ManyTile<160>, 2520, 855>, TimedTile<ManyTile<128>, 2300, 733>,
        TimedTile<ManyTile<64>, 1910, 685>, TimedTile<ManyTile<32>, 1660, 640>,
        TimedTile<ManyTile<128, 1, 1>, 2170, 450>, TimedTile<ManyTile<64, 1, 1>, 1790, 476>,
        TimedTile<ManyTile<128, 2>, 3410, 755>, TimedTile<ManyTile<64, 2>, 2650, 730>,
        TimedTile<ManyTile<64, 2, 1>, 2240, 528>, TimedTile<ManyTile<32, 2, 1>, 1700, 560>,
        TimedTile<ManyTile<32, 1, 1>, 1590, 450>>;
};

template <class P>
struct ManyTiles<P, kFloats> {
    using List =
        typename Choose<P::kBlock == 0, TilesWithoutBlocks, TilesOfBlocks>::type::List;
};

template <class T>
int64_t time_of(const FpcGemmArguments& a, int sms) {
    using Tile = typename T::Tile;
    const int64_t tiles = (int64_t)row_tiles<Tile>(a) * token_tiles<Tile>(a);
    const int64_t at_once = sms * T::kPerSm / Tile::kSplit, units = a.k / kUnitK;
    const int64_t longest = (units + Tile::kSplit - 1) / Tile::kSplit;
    return (tiles + at_once - 1) / at_once * (T::kFixed + T::kEach * longest);
}

template <class P, class T, class Launch>
void consider(const FpcGemmArguments& a, int sms, int64_t& least, Launch& launch) {
    using Tile = typename T::Tile;
    constexpr int kReserved = 1024;  // for each block that an SM runs
    static_assert(T::kPerSm * (ManyLayout<P, Tile>::kBytes + kReserved) <=
                      kSharedBytes + kReserved,
                  "so many blocks fit on an SM");
    if (sms < Tile::kSplit || a.k / kUnitK < Tile::kSplit) return;
    const int64_t time = time_of<T>(a, sms);
    if (time >= least) return;
    least = time;
    launch = launch_tiles<P, Tile>;
}

template <class P, class... Timed>
int32_t launch_fastest(const FpcGemmArguments& a, int sms, TileList<Timed...>) {
    int32_t (*launch)(const FpcGemmArguments&, int) = nullptr;
    int64_t least = INT64_MAX;
    (consider<P, Timed>(a, sms, least, launch), ...);
    return launch ? launch(a, sms) : FPC_LAUNCH;
}

// Start the GEMM on a.stream, or say why not. See problem.h for the operands. For kInt8, the sums
// of the rows of X, as int32, follow the m scales of tokens.
template <class P>
int32_t launch_many(const FpcGemmArguments& a) {
    if (a.m == 0) return FPC_OK;
    const int32_t refused = refusal<P>(a);
    if (refused) return refused;
    return launch_fastest<P>(a, multiprocessors(a), typename ManyTiles<P>::List{});
}

}  // namespace fpc
