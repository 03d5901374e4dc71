// Where scales lie: bytes of a whole tensor, and the byte of the one for row `row` and input `k`.
FPC_EXPORT int64_t fpc_gemm_scale_bytes_a(int32_t m, int32_t n, int32_t k) {
  using Scales = Mainloop::Sm1xxBlkScaledConfig;
  return size(filter_zeros(Scales::tile_atom_to_shape_SFA(make_shape(m, n, k, 1))));
}
FPC_EXPORT int64_t fpc_gemm_scale_bytes_b(int32_t m, int32_t n, int32_t k) {
  using Scales = Mainloop::Sm1xxBlkScaledConfig;
  return size(filter_zeros(Scales::tile_atom_to_shape_SFB(make_shape(m, n, k, 1))));
}
FPC_EXPORT int64_t fpc_gemm_scale_index_a(int32_t m, int32_t n, int32_t k, int32_t row, int32_t i) {
  using Scales = Mainloop::Sm1xxBlkScaledConfig;
  return Scales::tile_atom_to_shape_SFA(make_shape(m, n, k, 1))(make_coord(row, i, 0));
}
FPC_EXPORT int64_t fpc_gemm_scale_index_b(int32_t m, int32_t n, int32_t k, int32_t row, int32_t i) {
  using Scales = Mainloop::Sm1xxBlkScaledConfig;
  return Scales::tile_atom_to_shape_SFB(make_shape(m, n, k, 1))(make_coord(row, i, 0));
}
