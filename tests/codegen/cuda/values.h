// What tests look into: the values of a row as fp32, and quotients.

namespace fpc {

struct ValuesArguments {
    FpcQuantizeArguments of;
    float* to;
};

template <class P>
__global__ void __launch_bounds__(kMostThreads)
write_values(const __grid_constant__ ValuesArguments v) {
    follow();
    const int64_t m = blockIdx.x;
    Row<P, 0> row(v.of, m, (int)((v.of.k + kChunk - 1) / kChunk), {});
    row.each_chunk([&](int chunk, float (&values)[kChunk]) {
        for (int i = 0; i < kChunk; i++)
            if (chunk * kChunk + i < v.of.k) v.to[m * v.of.k + chunk * kChunk + i] = values[i];
    });
}

// The quotients of chunks by one total for each.
template <class Arguments>
__global__ void __launch_bounds__(32) divide_chunks(const __grid_constant__ Arguments of) {
    follow();
    float values[kChunk];
    for (int i = 0; i < kChunk; i++) values[i] = of.x[blockIdx.x * kChunk + i];
    divide_all<false, false>(values, of.totals[blockIdx.x]);
    for (int i = 0; i < kChunk; i++) of.to[blockIdx.x * kChunk + i] = values[i];
}

struct Quotients {
    const float* x;
    const float* totals;
    float* to;
};

template <class P>
int32_t values(FpcQuantizeArguments a, float* to, void* stream) {
    if (a.scale.repeat > a.m) a.scale.repeat = a.m;
    if (a.shift.repeat > a.m) a.shift.repeat = a.m;
    const ValuesArguments arguments{a, to};
    return launch(write_values<P>, dim3((unsigned)a.m), dim3(128), arguments, stream);
}

}  // namespace fpc

extern "C" __attribute__((visibility("default"))) int32_t fpc_test_quotients(
    const float* x, const float* totals, float* to, int64_t chunks, void* stream) {
    const fpc::Quotients of{x, totals, to};
    const auto kernel = fpc::divide_chunks<fpc::Quotients>;
    return fpc::launch(kernel, dim3((unsigned)chunks), dim3(1), of, stream);
}
