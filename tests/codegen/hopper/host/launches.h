// What tests look at after a call of fpc_gemm_run; behind the source of a library.

namespace fpc {

// Quotients of divide_by that are wrong, of all that blocks ask for.
static int wrong_quotients;

static int64_t residual;

static void check(int below, int divisor, uint32_t over) {
    for (int a = 0; a < below; a++) wrong_quotients += divide_by(a, over) != a / divisor;
}

void launched(const FewParameters& p, const cudaLaunchConfig_t&) {
    residual = (int64_t)p.residual;
    const int most = p.low_tiles + (p.more_tiles > 0), xs = Problem::kMode == kInt8 ? 1 : 2;
    const int row = p.part * kUnitK * xs / 16;
    check(most * p.part, p.part, p.over_part);
    check(row * p.m, row, p.over_row);
    check(most * p.m, p.m, p.over_m);
}

void launched(const ManyParameters& p, const cudaLaunchConfig_t&) {
    residual = (int64_t)p.residual;
}

}  // namespace fpc

FPC_EXPORT const char* test_calls() { return calls.c_str(); }
FPC_EXPORT int test_shared_allowed() { return shared_allowed; }
FPC_EXPORT int test_shared_launched() { return shared_launched; }
FPC_EXPORT void test_fail(int error) { next_error = error; }
FPC_EXPORT int test_last_error() { return last_error; }
FPC_EXPORT int test_grid() { return grid_launched; }
FPC_EXPORT int test_wrong_quotients() { return fpc::wrong_quotients; }
FPC_EXPORT int64_t test_residual() { return fpc::residual; }
FPC_EXPORT void test_reset() {
    calls.clear();
    shared_allowed = shared_launched = grid_launched = fpc::wrong_quotients = 0;
}
