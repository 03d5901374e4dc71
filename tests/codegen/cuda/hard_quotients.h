// All quotients that one correction could round to the wrong side.
//
// For significands a and b of 24 bits, a * 2**s / b lies k / (2 * b) units in the last place from a
// middle (2 * n + 1) / 2, where k = |2**(s + 1) * a - (2 * n + 1) * b|. The corrected product is
// off by less than 2**-22 units before it is rounded, so only k below 8 matters, and these follow
// from b.

extern "C" int64_t fpc_test_hard_quotients(int64_t* wrong) {
    int64_t count = 0;
    *wrong = 0;
    for (uint64_t b = 1 << 23; b < 1 << 24; b++) {
        const int zeros = __builtin_ctzll(b);
        if (zeros > 2) continue;  // k is a multiple of 2**zeros
        const uint64_t odd = b >> zeros;
        uint64_t inverse = odd;
        for (int i = 0; i < 5; i++) inverse *= 2 - odd * inverse;  // modulo 2**64
        const float total = (float)b, factor = fpc::reciprocal(total);
        for (int shift = 24; shift <= 25; shift++)
            for (int k = -7; k <= 7; k += 2) {
                const uint64_t size = 1ull << (shift - zeros);
                for (uint64_t twice = (uint64_t)k * inverse & (size - 1); twice < 1 << 25;
                     twice += size) {
                    if (twice < 1 << 24 || twice % 2 == 0) continue;
                    const uint64_t a = (b * twice - ((uint64_t)k << zeros)) >> shift;
                    if (a < 1 << 23 || a >= 1 << 24) continue;
                    const float x = (float)a;
                    *wrong += fpc::corrected_quotient(x, total, factor) != x / total;
                    count++;
                }
            }
    }
    return count;
}
