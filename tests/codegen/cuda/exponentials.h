// How many numbers have another exp(x) + 1 than exp_of says: every `step`-th one by its bits.

extern "C" int64_t fpc_test_exp_plus_one(uint32_t first, uint32_t step, int64_t count) {
    int64_t wrong = 0;
    for (int64_t i = 0; i < count; i++) {
        const float x = fpc::float_of((int32_t)(first + (uint32_t)i * step));
        if (x != x) continue;
        wrong += fpc::exp_plus_one(x) != fpc::add(fpc::exp_of(x), 1.0f);
    }
    return wrong;
}
