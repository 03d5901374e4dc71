// A GEMM whose output is quantized for the next layer: D has packed codes, n a multiple of 128.
struct FpcQuantizingArguments : FpcGemmArguments {
  void* d_scales;   // of blocks of 32, in atoms of 128 rows by 4 scales; all of them are written
  int32_t* status;  // becomes 1 if a value is NaN or infinite, and is left alone otherwise
};
