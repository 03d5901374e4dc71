// Nodes that quantize what the tree below them computes, for the next layer: the bytes that the
// quantizer of codegen/cuda would make of the stored output. They store the scales and give
// quotients by the scale of their block, for CUTLASS's conversions to the type of D: the same
// instructions.
//
// Tensors of coordinates count from a thread's first element; `rest` is M and N less where that is.
namespace fpc {

struct QuantizedArguments {
  uint8_t* scales = nullptr;  // of D, in atoms of 128 rows by 4 scales
  int32_t* status = nullptr;  // becomes 1 if a value is NaN or infinite
};

// What both nodes have in common.
template <class P>
struct QuantizedNode {
  using Arguments = QuantizedArguments;
  using Params = Arguments;
  Params const* params = nullptr;

  template <class Shape>
  static constexpr Params to_underlying_arguments(Shape const&, Arguments const& args, void*) {
    return args;
  }
  template <class Shape>
  static bool can_implement(Shape const& shape, Arguments const&) {
    return get<1>(shape) % 128 == 0;  // whole atoms, and no columns behind the last one
  }
  template <class Shape>
  static size_t get_workspace_size(Shape const&, Arguments const&) { return 0; }
  template <class Shape>
  static cutlass::Status initialize_workspace(Shape const&, Arguments const&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }
  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(
      fusion::detail::ProducerLoadArgs<Args...> const&) {
    return fusion::EmptyProducerLoadCallbacks{};
  }

  // Rows behind the last one belong to the atoms up to a multiple of 128; their scales are 0.
  CUTLASS_DEVICE static void store(Params const& params, ScaledBlock<P> const& block, int row,
                                   int column, int m, int n) {
    if (column >= n || row >= (m + 127) / 128 * 128) return;
    const bool there = row < m;
    if (there && !block.finite) *params.status = 1;
    params.scales[swizzled(row, column / P::kBlock, n / P::kBlock)] = there ? block.code : 0;
  }
};

// Data centre: a thread has whole blocks of a row. CUTLASS takes elements as shared memory has
// them.
template <class P, class Stored>
struct QuantizedRow100 : QuantizedNode<P> {
  using Base = QuantizedNode<P>;
  using Element = typename cutlass::detail::get_unpacked_element_type<Stored>::type;
  struct SharedStorage {};
  CUTLASS_HOST_DEVICE QuantizedRow100() {}
  CUTLASS_HOST_DEVICE QuantizedRow100(typename Base::Params const& params, SharedStorage const&)
      : Base{&params} {}

  template <class Coordinates, class Rest>
  struct Callbacks : fusion::EmptyConsumerStoreCallbacks {
    Coordinates coordinates;  // (CPY,CPY_M,CPY_N,EPI_M,EPI_N)
    Rest rest;
    int m, n;
    typename Base::Params const& params;

    CUTLASS_DEVICE Callbacks(Coordinates coordinates, Rest rest, int m, int n,
                             typename Base::Params const& params)
        : coordinates(coordinates), rest(rest), m(m), n(n), params(params) {}

    template <class Sum, class Input, int kSize>
    CUTLASS_DEVICE cutlass::Array<Element, kSize> visit(
        cutlass::Array<Sum, kSize> const&, int epi_v, int epi_m, int epi_n,
        cutlass::Array<Input, kSize> const& input) {
      static_assert(kSize % P::kBlock == 0, "a thread has whole blocks");
      const auto here = coordinates(_, _, _, epi_m, epi_n);
      cutlass::Array<float, kSize> quotients;
      CUTLASS_PRAGMA_UNROLL
      for (int b = 0; b < kSize; b += P::kBlock) {
        float values[P::kBlock];
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < P::kBlock; i++) values[i] = produced_of<P>(float(input[b + i]));
        const ScaledBlock<P> block(values);
        const auto at = here(epi_v * kSize + b);
        Base::store(params, block, m - int(get<0>(rest)) + int(get<0>(at)),
                    n - int(get<1>(rest)) + int(get<1>(at)), m, n);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < P::kBlock; i++) quotients[b + i] = block.quotient(values[i]);
      }
      return cutlass::NumericArrayConverter<Element, float, kSize>{}(quotients);
    }
  };

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      fusion::detail::ConsumerStoreArgs<Args...> const& args) {
    return Callbacks<decltype(args.tCcD), decltype(args.residue_tCcD)>(
        args.tCcD, args.residue_tCcD, int(get<0>(args.problem_shape_mnkl)),
        int(get<1>(args.problem_shape_mnkl)), *this->params);
  }
};

// RTX: a block's values are in eight threads of two warps, so they meet in shared memory, rounded
// to the type of the output. One thread finds a block's scale, in the order of the quantizer.
template <class P, class EpilogueTile>
struct QuantizedRow120 : QuantizedNode<P> {
  using Base = QuantizedNode<P>;
  static constexpr int kRows = size<0>(EpilogueTile{}), kColumns = size<1>(EpilogueTile{});
  static constexpr int kBlocks = kColumns / P::kBlock;
  static constexpr bool kHalves = P::kInput != kF32;
  using Kept = cute::conditional_t<kHalves, uint16_t, float>;
  static constexpr int kPitch = kColumns + (kHalves ? 2 : 1);  // rows begin in different banks
  static_assert(kColumns % P::kBlock == 0, "a tile has whole blocks");

  struct SharedStorage {
    Kept values[kRows * kPitch];
    float2 by[kRows * kBlocks];  // what quotients are products with
  };
  SharedStorage* shared = nullptr;

  CUTLASS_HOST_DEVICE QuantizedRow120() {}
  CUTLASS_HOST_DEVICE QuantizedRow120(typename Base::Params const& params,
                                      SharedStorage const& shared)
      : Base{&params}, shared(const_cast<SharedStorage*>(&shared)) {}

  CUTLASS_DEVICE static Kept kept(float value) {
    if constexpr (kHalves) return uint16_t(pair_in<P::kInput>(value, 0.0f) & 0xFFFF);
    else return value;
  }
  CUTLASS_DEVICE static float widened_of(Kept value) {
    if constexpr (kHalves) return widened<P::kInput>(value);
    else return value;
  }

  template <class Coordinates, class Rest>
  struct Callbacks : fusion::EmptyConsumerStoreCallbacks {
    Coordinates coordinates;  // (CPY,CPY_M,CPY_N,EPI_M,EPI_N)
    Rest rest;
    int m, n, row, column;  // row, column: where the tile begins
    int thread;
    typename Base::Params const& params;
    SharedStorage& shared;

    CUTLASS_DEVICE Callbacks(Coordinates coordinates, Rest rest, int m, int n, int row, int column,
                             int thread, typename Base::Params const& params,
                             SharedStorage& shared)
        : coordinates(coordinates), rest(rest), m(m), n(n), row(row), column(column),
          thread(thread), params(params), shared(shared) {}

    // The place of an element in its part of the tile.
    CUTLASS_DEVICE int row_of(int epi_m, int epi_n, int i) const {
      const auto at = coordinates(_, _, _, epi_m, epi_n)(i);
      return m - int(get<0>(rest)) + int(get<0>(at)) - row - epi_m * kRows;
    }
    CUTLASS_DEVICE int column_of(int epi_m, int epi_n, int i) const {
      const auto at = coordinates(_, _, _, epi_m, epi_n)(i);
      return n - int(get<1>(rest)) + int(get<1>(at)) - column - epi_n * kColumns;
    }

    template <class Sum, class Input, int kSize>
    CUTLASS_DEVICE cutlass::Array<float, kSize> visit(cutlass::Array<Sum, kSize> const&, int epi_v,
                                                      int epi_m, int epi_n,
                                                      cutlass::Array<Input, kSize> const& input) {
      cutlass::Array<float, kSize> values;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSize; i++) {
        values[i] = produced_of<P>(float(input[i]));
        const int at = epi_v * kSize + i;
        shared.values[row_of(epi_m, epi_n, at) * kPitch + column_of(epi_m, epi_n, at)] =
            kept(values[i]);
      }
      return values;
    }

    template <class Buffer, class Sync, class Values>
    CUTLASS_DEVICE void reduce(Buffer&&, Sync const& sync, int epi_m, int epi_n, bool,
                               Values values) {
      sync();
      CUTLASS_PRAGMA_NO_UNROLL
      for (int b = thread; b < kRows * kBlocks; b += kThreads) {
        const int in_tile = b % kRows, first = b / kRows * P::kBlock;
        float own[P::kBlock];
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < P::kBlock; i++)
          own[i] = widened_of(shared.values[in_tile * kPitch + first + i]);
        const ScaledBlock<P> block(own);
        Base::store(params, block, row + epi_m * kRows + in_tile,
                    column + epi_n * kColumns + first, m, n);
        shared.by[b] = make_float2(block.inverse, block.factor);
      }
      sync();
      CUTLASS_PRAGMA_UNROLL
      for (int v = 0; v < size(values); v++) {
        constexpr int kSize = cute::remove_cvref_t<decltype(values(0))>::kElements;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kSize; i++) {
          const int at = v * kSize + i;
          const float2 by = shared.by[column_of(epi_m, epi_n, at) / P::kBlock * kRows +
                                      row_of(epi_m, epi_n, at)];
          values(v)[i] = multiply(multiply(values(v)[i], by.x), by.y);
        }
      }
    }
  };

  static constexpr int kThreads = 256;  // two warpgroups share a tile

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      fusion::detail::ConsumerStoreArgs<Args...> const& args) {
    static_assert(size<0>(decltype(args.epi_tile){}) == kRows);
    static_assert(size<1>(decltype(args.epi_tile){}) == kColumns);
    static_assert(size(decltype(args.tiled_copy){}) == kThreads);
    const int row = int(get<0>(args.tile_coord_mnkl)) * int(size<0>(args.tile_shape_mnk));
    const int column = int(get<1>(args.tile_coord_mnkl)) * int(size<1>(args.tile_shape_mnk));
    return Callbacks<decltype(args.tCcD), decltype(args.residue_tCcD)>(
        args.tCcD, args.residue_tCcD, int(get<0>(args.problem_shape_mnkl)),
        int(get<1>(args.problem_shape_mnkl)), row, column, args.thread_idx, *this->params, *shared);
  }
};

}  // namespace fpc
