// There are no block scales: no bytes, and no index.
FPC_EXPORT int64_t fpc_gemm_scale_bytes_a(int32_t, int32_t, int32_t) { return 0; }
FPC_EXPORT int64_t fpc_gemm_scale_bytes_b(int32_t, int32_t, int32_t) { return 0; }
FPC_EXPORT int64_t fpc_gemm_scale_index_a(int32_t, int32_t, int32_t, int32_t, int32_t) {
  return -1;
}
FPC_EXPORT int64_t fpc_gemm_scale_index_b(int32_t, int32_t, int32_t, int32_t, int32_t) {
  return -1;
}
