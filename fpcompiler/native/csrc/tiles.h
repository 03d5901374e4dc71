// Rows of activations cut into tiles. Included inside of an instruction set, after FPC_INLINE.

// Call `tile.run<rows>(first row)` for tiles of nearly equal height, of at most kMost rows.
template <int kMost, class Tile>
FPC_INLINE void for_tiles(int64_t begin, int64_t end, const Tile& tile) {
    while (begin < end) {
        const int64_t left = end - begin, tiles = (left + kMost - 1) / kMost;
        const int64_t rows = (left + tiles - 1) / tiles;
        switch (rows) {
            case 1: tile.template run<1>(begin); break;
            case 2: if constexpr (kMost >= 2) tile.template run<2>(begin); break;
            case 3: if constexpr (kMost >= 3) tile.template run<3>(begin); break;
            case 4: if constexpr (kMost >= 4) tile.template run<4>(begin); break;
            case 5: if constexpr (kMost >= 5) tile.template run<5>(begin); break;
            default: if constexpr (kMost >= 6) tile.template run<6>(begin); break;
        }
        begin += rows;
    }
}
