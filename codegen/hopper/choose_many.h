// Which tiles gemm_many takes: those whose blocks are done first by this model of their time:
//
//   waves * (kFixed + kEach * units of K of a block),   waves = ceil(tiles / blocks at a time)
//
// in nanoseconds, with numbers for each shape of tile that were fitted to measured times of an H200
// (132 SMs, 576 to 14336 rows and K, 24 to 4096 tokens). Results of floating point depend on how
// many parts of K are summed apart: N and K alone say how many, so that a token's results do not
// depend on other tokens. Tiles whose blocks chain the parts are for many tokens, those whose
// blocks share them for few. Exact sums may be divided in any way.

namespace fpc {

template <class T, int kFixed_, int kEach_>
struct TimedTile {
    using Tile = T;
    static constexpr int kFixed = kFixed_, kEach = kEach_;
};

template <class... Timed>
struct TileList {};

template <class P, Mode kMode = P::kMode>
struct ManyTiles;

template <class P>
struct ManyTiles<P, kInt8> {
    using List = TileList<
        TimedTile<ManyTile<256>, 3700, 610>, TimedTile<ManyTile<128>, 3900, 370>,
        TimedTile<ManyTile<64>, 4000, 288>, TimedTile<ManyTile<32>, 3900, 280>,
        TimedTile<ManyTile<128, 2>, 5300, 384>, TimedTile<ManyTile<64, 2>, 4500, 312>,
        TimedTile<ManyTile<32, 2>, 4000, 293>, TimedTile<ManyTile<64, 1, 1>, 3900, 230>,
        TimedTile<ManyTile<64, 2, 1>, 4500, 230>, TimedTile<ManyTile<32, 2, 1>, 4000, 200>>;
};

template <class P>
struct ManyTiles<P, kE4m3> {
    using List = TileList<
        TimedTile<ManyTile<256>, 3700, 760>, TimedTile<ManyTile<128>, 3700, 430>,
        TimedTile<ManyTile<64>, 3600, 340>, TimedTile<ManyTile<32>, 3500, 320>,
        TimedTile<ManyTile<64, 1, 1>, 3600, 260>, TimedTile<ManyTile<32, 1, 1>, 3500, 240>,
        TimedTile<ManyTile<128, 1, 2, 2>, 3800, 435>, TimedTile<ManyTile<64, 1, 2, 2>, 3700, 345>,
        TimedTile<ManyTile<64, 2, 1>, 4500, 260>, TimedTile<ManyTile<32, 2, 1>, 4400, 240>>;
};

template <class P>
struct ManyTiles<P, kFloats> {
    using List = TileList<
        TimedTile<ManyTile<256>, 3700, 1200>, TimedTile<ManyTile<128>, 3700, 680>,
        TimedTile<ManyTile<64>, 3800, 460>, TimedTile<ManyTile<32>, 3700, 430>,
        TimedTile<ManyTile<128, 1, 1>, 3800, 480>, TimedTile<ManyTile<64, 1, 1>, 3700, 350>,
        TimedTile<ManyTile<32, 1, 1>, 3600, 320>,
        TimedTile<ManyTile<128, 1, 2, 2>, 3800, 685>, TimedTile<ManyTile<64, 1, 2, 2>, 3900, 465>,
        TimedTile<ManyTile<128, 2>, 5300, 680>, TimedTile<ManyTile<64, 2>, 4600, 460>,
        TimedTile<ManyTile<64, 2, 1>, 4500, 350>, TimedTile<ManyTile<32, 2, 1>, 4400, 320>>;
};

// Two parts where tiles of 64 rows occupy less than half of the SMs, and K is long enough to gain.
inline int parts_of_k(const FpcGemmArguments& a) {
    return a.n <= 4224 && a.k >= 8192 ? 2 : 1;
}

template <class T>
int64_t time_of(const FpcGemmArguments& a, int sms) {
    using Tile = typename T::Tile;
    const int64_t tiles = (int64_t)row_tiles<Tile>(a) * token_tiles<Tile>(a);
    const int64_t at_once = sms / Tile::kSplit, units = a.k / kUnitK;
    const int64_t longest = (units + Tile::kSplit - 1) / Tile::kSplit;
    return (tiles + at_once - 1) / at_once * (T::kFixed + T::kEach * longest);
}

template <class P, class T, class Launch>
void consider(const FpcGemmArguments& a, int sms, int64_t& least, Launch& launch) {
    using Tile = typename T::Tile;
    if (sms < Tile::kSplit || a.k / kUnitK < Tile::kParts) return;
    if (P::kMode != kInt8 && Tile::kParts != parts_of_k(a)) return;
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
