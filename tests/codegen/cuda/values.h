// What a kernel quantizes, for tests: the values of a row as fp32.

namespace fpc {

struct ValuesArguments {
    FpcQuantizeArguments of;
    float* to;
};

template <class P>
__global__ void __launch_bounds__(kMostThreads)
write_values(const __grid_constant__ ValuesArguments v) {
    const int64_t m = blockIdx.x;
    Row<P, false> row(v.of, m, (int)((v.of.k + kChunk - 1) / kChunk));
    row.each_chunk([&](int chunk, float (&values)[kChunk]) {
        for (int i = 0; i < kChunk; i++)
            if (chunk * kChunk + i < v.of.k) v.to[m * v.of.k + chunk * kChunk + i] = values[i];
    });
}

template <class P>
int32_t values(FpcQuantizeArguments a, float* to, void* stream) {
    if (a.scale.repeat > a.m) a.scale.repeat = a.m;
    if (a.shift.repeat > a.m) a.shift.repeat = a.m;
    const ValuesArguments arguments{a, to};
    return launch(write_values<P>, dim3((unsigned)a.m), dim3(128), arguments, stream);
}

}  // namespace fpc
