// The operators that run compiled kernels, torch.ops.fpc_cuda: one library for all of them.
//
// It uses the stable C interface of torch only, so that a build serves every torch from 2.10 on,
// and no header of CUDA: it loads kernels by path and knows them by their C interface. What a
// launch writes is allocated by torch, and nothing is waited for, so that calls can be captured in a
// CUDA graph. Fake implementations are in operators.py.

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include "arguments.h"   // codegen/cuda: kernels that quantize
#include "attention.h"   // codegen/attention
#include "kernel_abi.h"  // codegen/cutlass/templates: GEMMs
#include "quantize_abi.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kVersion = 3;  // VERSION of operators.py
constexpr int64_t kMost = INT32_MAX;

// torch's own check would put this file and a line in front of the message.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
    if (condition) return;
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
}

// --- libraries of kernels ------------------------------------------------------------------------

struct Library {
    std::string path;
    bool on_host;  // a stand-in that tests compile for the CPU
    ScalarType output;  // of a GEMM
    int bits_a, bits_b;  // of a number of its operands
    int token_numbers;   // for each row of A: its scale, and for integers their sum
    int32_t (*run)(const FpcGemmArguments*);
    int64_t (*workspace)(int32_t, int32_t, int32_t, int32_t);
    int64_t (*scale_bytes_a)(int32_t, int32_t, int32_t);
    int64_t (*scale_bytes_b)(int32_t, int32_t, int32_t);
    int32_t (*quantize)(int32_t, const FpcQuantizeArguments*, void*);
    int32_t (*attend)(int32_t, const FpcAttendArguments*, void*);
    const char* (*error_text)(int32_t);  // of a cudaError_t; null in kernels of before
    int32_t bits;  // of the codes that a GEMM makes of its output; 0 if it gives the output
};

// They stay loaded: a captured graph may hold their kernels for as long as the process lives.
std::mutex mutex;
std::deque<Library> libraries;

template <class Function>
void find(void* handle, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(handle, name));
}

// The description is JSON as Python writes it.
ScalarType output_of(const std::string& description, const std::string& path) {
    if (description.find("\"output\": \"bf16\"") != std::string::npos) return ScalarType::BFloat16;
    if (description.find("\"output\": \"f16\"") != std::string::npos) return ScalarType::Half;
    const bool floats = description.find("\"output\": \"f32\"") != std::string::npos;
    require(floats, path, " gives results of a type that this version does not know.");
    return ScalarType::Float;
}

// What stands behind a key: the name of a number format, or a form of activations (stored.py).
std::string text_of(const std::string& description, const std::string& key) {
    const std::string before = "\"" + key + "\": \"";
    const size_t at = description.find(before);
    if (at == std::string::npos) return "";
    const size_t from = at + before.size();
    return description.substr(from, description.find('"', from) - from);
}

int bits_of(const std::string& name, const std::string& path) {
    if (name == "bf16") return 16;
    if (name == "i8") return 8;
    const int bits = name.size() > 1 && name[0] == 'f' ? name[1] - '0' : 0;
    require(bits == 4 || bits == 6 || bits == 8, path, " reads operands of a form that this ",
            "version does not know.");
    return bits;
}

Library load(const std::string& path) {
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    const char* error = handle ? "" : dlerror();
    require(handle != nullptr, "the kernels in ", path, " do not load: ", error);
    Library found{};
    found.path = path, found.on_host = dlsym(handle, "fpc_on_host") != nullptr;
    int32_t (*abi)() = nullptr;
    int32_t (*bits)() = nullptr;
    const char* (*description)() = nullptr;
    find(handle, "fpc_gemm_abi", abi);
    find(handle, "fpc_gemm_description", description);
    find(handle, "fpc_gemm_run", found.run);
    find(handle, "fpc_gemm_workspace", found.workspace);
    find(handle, "fpc_gemm_scale_bytes_a", found.scale_bytes_a);
    find(handle, "fpc_gemm_scale_bytes_b", found.scale_bytes_b);
    find(handle, "fpc_quantize_rows", found.quantize);
    find(handle, "fpc_attend_run", found.attend);
    find(handle, "fpc_cuda_error_text", found.error_text);
    find(handle, "fpc_gemm_quantized_bits", bits);
    if (bits) found.bits = bits();
    const bool gemm = abi && description && found.run && found.workspace && found.scale_bytes_a &&
                      found.scale_bytes_b;
    require(gemm || found.quantize || found.attend, path, " holds no kernels of fpcompiler.");
    if (!gemm) found.run = nullptr;
    const int32_t version = gemm ? abi() : FPC_GEMM_ABI;
    require(version == FPC_GEMM_ABI, path, " has version ", version,
            " of the interface of kernels, not ", FPC_GEMM_ABI, ": compile the model again.");
    if (!gemm) return found;
    const std::string said = description(), a = text_of(said, "a");
    found.output = output_of(said, path);
    found.bits_a = bits_of(a, path), found.bits_b = bits_of(text_of(said, "b"), path);
    found.token_numbers = a == "i8" ? 2 : 1;
    return found;
}

int64_t version() { return kVersion; }

int64_t open_library(std::string path) {
    const std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = 0; i < libraries.size(); i++)
        if (libraries[i].path == path) return static_cast<int64_t>(i);
    libraries.push_back(load(path));
    return static_cast<int64_t>(libraries.size() - 1);
}

const Library& library_of(int64_t index) {
    const std::lock_guard<std::mutex> lock(mutex);
    require(index >= 0 && index < static_cast<int64_t>(libraries.size()), "there is no library ",
            index, "; open() returns the numbers of those there are.");
    return libraries[static_cast<size_t>(index)];  // elements of a deque stay where they are
}

// --- tensors -------------------------------------------------------------------------------------

void check_place(const Library& library, const Tensor& x) {
    require(x.is_cuda() != library.on_host, "the kernels of ", library.path, " run on ",
            library.on_host ? "the CPU" : "a GPU", ", and their input is elsewhere.");
}

void check(const Tensor& tensor, const Tensor& x, ScalarType dtype, int64_t count,
           const char* name) {
    require(tensor.scalar_type() == dtype && tensor.is_contiguous(), name,
            " has another type than the kernel reads, or gaps.");
    require(tensor.numel() >= count, name, " has ", tensor.numel(), " numbers; the kernel ",
            "reads ", count, ".");
    require(tensor.is_cuda() == x.is_cuda() && tensor.get_device_index() == x.get_device_index(),
            name, " is on another device than the first input.");
}

const void* address(const MaybeTensor& tensor) {
    return tensor ? tensor->const_data_ptr() : nullptr;
}

const float* floats(const MaybeTensor& tensor, const Tensor& x, int64_t count, const char* name) {
    if (tensor) check(*tensor, x, ScalarType::Float, count, name);
    return static_cast<const float*>(address(tensor));
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> size, ScalarType dtype) {
    return torch::stable::new_empty(like, size, dtype);
}

// A tensor with the same values that begins where kernels read 32 bytes at once.
Tensor at_boundary(const Tensor& x) {
    if (reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 32 == 0) return x;
    return torch::stable::clone(x);
}

// The current device and stream of torch, while a kernel is launched.
class Launch {
   public:
    explicit Launch(const Tensor& x) {
        if (!x.is_cuda()) return;
        guard_.emplace(x.get_device_index());
        // Only builds of torch for CUDA have it, so it cannot be linked.
        using Get = AOTITorchError (*)(int32_t, void**);
        static const Get get = [] {
            void* torch = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
            return torch ? reinterpret_cast<Get>(dlsym(torch, "aoti_torch_get_current_cuda_stream"))
                         : nullptr;
        }();
        require(get && !get(x.get_device_index(), &stream_),
                "this torch tells no current stream of CUDA; install a build for CUDA.");
    }

    void* stream() const { return stream_; }

   private:
    std::optional<torch::stable::accelerator::DeviceGuard> guard_;
    void* stream_ = nullptr;
};

// --- GEMM ----------------------------------------------------------------------------------------

const char* cause_of(int32_t status) {
    switch (status & 0xFF) {
        case FPC_NULL_POINTER: return "an operand that it needs is missing";
        case FPC_MISALIGNED: return "an operand does not begin at a multiple of 32 bytes";
        case FPC_SMALL_WORKSPACE: return "its workspace is too small";
        case FPC_UNSUPPORTED_SHAPE: return "it does not compute these sizes";
        case FPC_INITIALIZE: return "it could not be prepared; was it compiled for this GPU?";
        case FPC_LAUNCH: return "CUDA refused the launch; was it compiled for this GPU?";
        default: return "it gave an unknown status";
    }
}

// Rows of packed codes, or of other numbers of so many bits.
void check_codes(const Tensor& codes, const Tensor& x, int64_t rows, int64_t k, int bits,
                 const char* name) {
    check(codes, x, ScalarType::Byte, 0, name);
    const bool whole = codes.dim() == 2 && codes.size(0) == rows && codes.size(1) * 8 == bits * k;
    require(whole, name, " does not hold ", rows, " rows of ", k, " codes of ", bits, " bits.");
}

// What CUDA said of a launch, where the kernels tell it: its number, and in words.
std::string error_of(const Library& kernel, int32_t error) {
    const char* text = kernel.error_text && error ? kernel.error_text(error) : nullptr;
    return text ? " (CUDA error " + std::to_string(error) + ": " + text + ")" : "";
}

void check_sizes(const Library& kernel, int64_t m, int64_t n, int64_t k) {
    require(kernel.run != nullptr, kernel.path, " holds no GEMM.");
    require(m >= 0 && n > 0 && k > 0 && m <= kMost && n <= kMost && k <= kMost,
            "there is no GEMM of M = ", m, ", N = ", n, " and K = ", k, ".");
}

// Check operands and launch a kernel that writes to `args.d` and what else is set of `args`.
void multiply(const Library& kernel, FpcGemmArguments& args, const Tensor& a,
              const MaybeTensor& a_scales, const Tensor& b, const MaybeTensor& b_scales,
              const MaybeTensor& token_scale, const MaybeTensor& row_scale, const MaybeTensor& bias,
              const MaybeTensor& scalar, double alpha, int64_t m, int64_t n, int64_t k,
              int64_t sms) {
    check_place(kernel, a);
    check_codes(a, a, m, k, kernel.bits_a, "A");
    check_codes(b, a, n, k, kernel.bits_b, "B");
    const int32_t sizes[] = {(int32_t)m, (int32_t)n, (int32_t)k};
    const int64_t bytes_a = kernel.scale_bytes_a(sizes[0], sizes[1], sizes[2]);
    const int64_t bytes_b = kernel.scale_bytes_b(sizes[0], sizes[1], sizes[2]);
    if (a_scales) check(*a_scales, a, ScalarType::Byte, bytes_a, "A's scales");
    if (b_scales) check(*b_scales, a, ScalarType::Byte, bytes_b, "B's scales");
    if (m == 0) return;

    const Tensor codes = at_boundary(a);
    args.a = codes.const_data_ptr(), args.a_scales = address(a_scales);
    args.b = b.const_data_ptr(), args.b_scales = address(b_scales);
    const int64_t token_numbers = m * kernel.token_numbers;
    args.token_scale = floats(token_scale, a, token_numbers, "the scales of tokens");
    args.row_scale = floats(row_scale, a, n, "the scales of rows");
    args.bias = floats(bias, a, n, "the bias");
    args.scalar_a = floats(scalar, a, 1, "the scale of A");
    args.alpha = (float)alpha;
    args.m = sizes[0], args.n = sizes[1], args.k = sizes[2], args.sm_count = (int32_t)sms;
    const Launch launch(a);
    args.stream = launch.stream();
    const int64_t bytes = kernel.workspace(args.m, args.n, args.k, args.sm_count);
    require(bytes >= 0, "the kernel of ", kernel.path, " needs an impossible workspace.");
    // Torch keeps memory of this stream, and of a graph that is captured, for the next call.
    const Tensor workspace = empty(a, {bytes}, ScalarType::Byte);
    args.workspace = bytes ? workspace.mutable_data_ptr() : nullptr;
    args.workspace_bytes = (size_t)bytes;
    const int32_t status = kernel.run(&args);
    require(status == FPC_OK, "the kernel of ", kernel.path, " did not compute M = ", m, ", N = ",
            n, ", K = ", k, ": ", cause_of(status), " (status ", status, ")",
            (status & 0xFF) == FPC_LAUNCH ? error_of(kernel, status >> 8) : "");
}

Tensor gemm(int64_t library, const Tensor& a, const MaybeTensor& a_scales, const Tensor& b,
            const MaybeTensor& b_scales, const MaybeTensor& token_scale,
            const MaybeTensor& row_scale, const MaybeTensor& bias, const MaybeTensor& residual,
            const MaybeTensor& scalar, double alpha, int64_t m, int64_t n, int64_t k, int64_t sms,
            ScalarType out) {
    const Library& kernel = library_of(library);
    check_sizes(kernel, m, n, k);
    require(!kernel.bits, "the kernel of ", kernel.path, " gives codes, not results.");
    require(out == kernel.output, "the kernel of ", kernel.path, " gives results of another type.");
    if (residual) check(*residual, a, out, m * n, "the residual");
    const Tensor d = empty(a, {m, n}, out);
    FpcGemmArguments args{};
    const MaybeTensor added = residual ? MaybeTensor(at_boundary(*residual)) : std::nullopt;
    args.d = d.mutable_data_ptr(), args.residual = address(added);
    multiply(kernel, args, a, a_scales, b, b_scales, token_scale, row_scale, bias, scalar, alpha, m,
             n, k, sms);
    return d;
}

// Codes of the output, and the scales of its blocks of 32 in atoms of 128 rows.
std::tuple<Tensor, Tensor> gemm_quantize(
    int64_t library, const Tensor& a, const MaybeTensor& a_scales, const Tensor& b,
    const MaybeTensor& b_scales, const MaybeTensor& token_scale, const MaybeTensor& row_scale,
    const MaybeTensor& bias, const MaybeTensor& scalar, double alpha, int64_t m, int64_t n,
    int64_t k, int64_t sms, const Tensor& status) {
    const Library& kernel = library_of(library);
    check_sizes(kernel, m, n, k);
    require(kernel.bits > 0, "the kernel of ", kernel.path, " gives results, not codes.");
    require(n % 128 == 0, "there are no whole rows of scales of ", n, " outputs.");
    check(status, a, ScalarType::Int, 1, "the status");
    const Tensor codes = empty(a, {m, n * kernel.bits / 8}, ScalarType::Byte);
    const Tensor scales = empty(a, {(m + 127) / 128 * 128 * (n / 32)}, ScalarType::Byte);
    FpcQuantizingArguments args{};
    args.d = codes.mutable_data_ptr(), args.d_scales = scales.mutable_data_ptr();
    args.status = static_cast<int32_t*>(status.mutable_data_ptr());
    multiply(kernel, args, a, a_scales, b, b_scales, token_scale, row_scale, bias, scalar, alpha, m,
             n, k, sms);
    return {codes, scales};
}

// --- quantizing ----------------------------------------------------------------------------------

// The arguments are those of FpcQuantizeArguments; the sizes of scales are in numbers.
std::tuple<Tensor, Tensor, Tensor> quantize(
    int64_t library, int64_t problem, const Tensor& x, int64_t m, int64_t k, int64_t stride,
    const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& scale,
    int64_t scale_repeat, int64_t scale_stride, const MaybeTensor& shift, int64_t shift_repeat,
    int64_t shift_stride, double eps, int64_t pitch, int64_t outer, int64_t blocks,
    int64_t scale_pitch, const Tensor& status) {
    const Library& kernel = library_of(library);
    require(kernel.quantize != nullptr, kernel.path, " holds no kernels that quantize.");
    check_place(kernel, x);
    check(status, x, ScalarType::Int, 1, "the status");
    const Tensor codes = empty(x, {m, pitch}, ScalarType::Byte);
    const Tensor outer_scale = empty(x, {outer}, ScalarType::Float);
    const Tensor block_scale = empty(x, {blocks}, ScalarType::Byte);
    const Tensor amax = empty(x, {1}, ScalarType::Int);
    FpcQuantizeArguments args{};
    args.x = x.const_data_ptr(), args.m = m, args.k = k, args.stride = stride;
    args.weight = address(weight), args.bias = address(bias);
    args.scale = {address(scale), scale_repeat, scale_stride};
    args.shift = {address(shift), shift_repeat, shift_stride};
    args.eps = (float)eps;
    args.codes = static_cast<uint8_t*>(codes.mutable_data_ptr()), args.pitch = pitch;
    args.outer_scale = static_cast<float*>(outer_scale.mutable_data_ptr());
    args.block_scale = block_scale.mutable_data_ptr(), args.scale_pitch = scale_pitch;
    args.amax = static_cast<int32_t*>(amax.mutable_data_ptr());
    args.status = static_cast<int32_t*>(status.mutable_data_ptr());
    const Launch launch(x);
    const int32_t result = kernel.quantize((int32_t)problem, &args, launch.stream());
    require(result != FPC_REFUSED, "kernel ", problem, " of ", kernel.path, " does not quantize ",
            m, " rows of ", k, " values.");
    require(result == FPC_LAUNCHED, "CUDA error ", result, " at the launch of kernel ", problem,
            " of ", kernel.path, "; was it compiled for this GPU?", error_of(kernel, result));
    return {codes, outer_scale, block_scale};
}

// --- attention -----------------------------------------------------------------------------------

void check_rows(const Tensor& tensor, const Tensor& q, const char* name) {
    const bool like = tensor.dim() == 4 && tensor.size(0) == q.size(0) &&
                      tensor.size(3) == q.size(3) && tensor.stride(3) == 1;
    require(like, name, " are not like the queries, or have gaps.");
    require(tensor.get_device_index() == q.get_device_index(), name, " are on another device.");
}

// A tensor whose rows begin at multiples of 16 bytes; others are copied.
Tensor in_quads(const Tensor& x) {
    bool even = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
    for (int64_t i = 0; i < 3; i++) even = even && (x.size(i) == 1 || x.stride(i) % 8 == 0);
    if (even) return x;
    Tensor whole = empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type());
    return torch::stable::copy_(whole, x);
}

// Strides that lead nowhere need not be even.
void set_rows(int64_t (&to)[3], const Tensor& from) {
    for (int64_t i = 0; i < 3; i++) to[i] = from.size(i) == 1 ? 0 : from.stride(i);
}

// Keys or values: numbers of the queries' type, or bytes with a scale [B, G, N, 1] for each row.
const float* scales_of(const Tensor& rows, const MaybeTensor& scale, const Tensor& q,
                       int64_t (&strides)[3]) {
    const ScalarType type = scale ? ScalarType::Byte : q.scalar_type();
    require(rows.scalar_type() == type, "keys and values are of another type than queries.");
    if (!scale) return nullptr;
    bool like = scale->dim() == 4 && scale->scalar_type() == ScalarType::Float;
    for (int64_t i = 0; i < 3; i++) like = like && scale->size(i) == rows.size(i);
    require(like, "the scales are not those of the keys or values.");
    require(scale->get_device_index() == q.get_device_index(), "scales are on another device.");
    set_rows(strides, *scale);
    return static_cast<const float*>(scale->const_data_ptr());
}

// q [B, H, M, D], k and v [B, G, N, D], a mask [B, H, M, N] of truth values; y is [B, M, H, D].
Tensor attend(int64_t library, int64_t problem, const Tensor& q, const Tensor& k,
              const MaybeTensor& k_scale, const Tensor& v, const MaybeTensor& v_scale,
              const MaybeTensor& mask, double scale, bool causal, int64_t sms) {
    const Library& kernel = library_of(library);
    require(kernel.attend != nullptr, kernel.path, " holds no kernels of attention.");
    check_place(kernel, q);
    check_rows(q, q, "queries");
    check_rows(k, q, "keys");
    check_rows(v, q, "values");
    require(v.size(1) == k.size(1) && v.size(2) == k.size(2), "keys and values differ in number.");
    FpcAttendArguments args{};
    args.k_scales = scales_of(k, k_scale, q, args.k_scale_strides);
    args.v_scales = scales_of(v, v_scale, q, args.v_scale_strides);
    if (mask) {
        require(mask->dim() == 4 && mask->scalar_type() == ScalarType::Bool, "the mask is none.");
        for (int64_t i = 0; i < 4; i++)
            require(mask->size(i) == (i == 3 ? k.size(2) : q.size(i)), "the mask has other sizes.");
        for (int64_t i = 0; i < 4; i++) args.mask_strides[i] = mask->stride(i);
        require(mask->get_device_index() == q.get_device_index(), "the mask is on another device.");
    }
    for (const Tensor* each : {&q, &k}) {
        const bool few = each->size(0) <= kMost && each->size(1) <= kMost && each->size(2) <= kMost;
        require(few, "there are more rows than kernels count.");
    }
    const Tensor y = empty(q, {q.size(0), q.size(2), q.size(1), q.size(3)}, q.scalar_type());
    const Tensor rows[] = {in_quads(q), in_quads(k), in_quads(v)};
    args.q = rows[0].const_data_ptr(), args.k = rows[1].const_data_ptr();
    args.v = rows[2].const_data_ptr();
    set_rows(args.q_strides, rows[0]), set_rows(args.k_strides, rows[1]);
    set_rows(args.v_strides, rows[2]);
    args.mask = static_cast<const uint8_t*>(address(mask)), args.y = y.mutable_data_ptr();
    args.batch = (int32_t)q.size(0), args.heads = (int32_t)q.size(1);
    args.groups = (int32_t)k.size(1), args.queries = (int32_t)q.size(2);
    args.keys = (int32_t)k.size(2), args.scale = (float)scale, args.causal = causal;
    args.sm_count = (int32_t)sms;
    const Launch launch(q);
    const int32_t result = kernel.attend((int32_t)problem, &args, launch.stream());
    require(result != FPC_ATTEND_REFUSED, "kernel ", problem, " of ", kernel.path,
            " does not take such queries, keys and values.");
    require(result == FPC_ATTEND_OK, "CUDA error ", result, " at the launch of kernel ", problem,
            " of ", kernel.path, "; was it compiled for this GPU?", error_of(kernel, result));
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY(fpc_cuda, m) {
    m.def("version() -> int");
    m.def("open(str path) -> int");
    m.def(
        "gemm(int library, Tensor a, Tensor? a_scales, Tensor b, Tensor? b_scales, "
        "Tensor? token_scale, Tensor? row_scale, Tensor? bias, Tensor? residual, Tensor? scalar, "
        "float alpha, int m, int n, int k, int sms, ScalarType out) -> Tensor");
    m.def(
        "gemm_quantize(int library, Tensor a, Tensor? a_scales, Tensor b, Tensor? b_scales, "
        "Tensor? token_scale, Tensor? row_scale, Tensor? bias, Tensor? scalar, float alpha, int m, "
        "int n, int k, int sms, Tensor(status!) status) -> (Tensor, Tensor)");
    m.def(
        "quantize(int library, int problem, Tensor x, int m, int k, int stride, Tensor? weight, "
        "Tensor? bias, Tensor? scale, int scale_repeat, int scale_stride, Tensor? shift, "
        "int shift_repeat, int shift_stride, float eps, int pitch, int outer, int blocks, "
        "int scale_pitch, Tensor(status!) status) -> (Tensor, Tensor, Tensor)");
    m.def(
        "attend(int library, int problem, Tensor q, Tensor k, Tensor? k_scale, Tensor v, "
        "Tensor? v_scale, Tensor? mask, float scale, bool causal, int sms) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fpc_cuda, CompositeExplicitAutograd, m) {
    m.impl("version", TORCH_BOX(&version));
    m.impl("open", TORCH_BOX(&open_library));
}

STABLE_TORCH_LIBRARY_IMPL(fpc_cuda, CPU, m) {
    m.impl("gemm", TORCH_BOX(&gemm));
    m.impl("gemm_quantize", TORCH_BOX(&gemm_quantize));
    m.impl("quantize", TORCH_BOX(&quantize));
    m.impl("attend", TORCH_BOX(&attend));
}

STABLE_TORCH_LIBRARY_IMPL(fpc_cuda, CUDA, m) {
    m.impl("gemm", TORCH_BOX(&gemm));
    m.impl("gemm_quantize", TORCH_BOX(&gemm_quantize));
    m.impl("quantize", TORCH_BOX(&quantize));
    m.impl("attend", TORCH_BOX(&attend));
}
