// Operators of runtime/native_ops.py for packages of AOTInductor, which call C functions.
//
// They are in the package beside the model, whose library is linked with this one: whoever loads a
// package loads them, in a process without Python too. Nothing is registered with torch, so that
// packages of several versions can be loaded side by side. It uses the stable C interface of torch
// only, as runtime/cuda/operators.cpp does. What is wrong is thrown: the model catches it.

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "native.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr size_t kAlignment = 64;  // ALIGNMENT of runtime/aligned.py

// torch's own check would put this file and a line in front of the message.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
    if (condition) return;
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
}

void require_same(bool condition, const char* layer) {
    require(condition, "layer '", layer, "': a tensor is none that the layer was made with, or the ",
            "package was put together from several. Export the model again.");
}

// --- tensors -------------------------------------------------------------------------------------

// The model keeps its handle.
Tensor borrow(AtenTensorHandle handle) {
    AtenTensorHandle own = nullptr;
    require(!aoti_torch_new_tensor_handle(handle, &own), "torch gives no handle of a tensor.");
    return Tensor(own);
}

AOTITorchError give(const Tensor& tensor, AtenTensorHandle* result) {
    return aoti_torch_new_tensor_handle(tensor.get(), result);
}

Tensor whole(const Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Memory of torch's allocator; it is aligned as kernels want it.
Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t axis = sizes.size(); axis-- > 1;)
        strides[axis - 1] = strides[axis] * std::max<int64_t>(sizes[axis], 1);
    AtenTensorHandle handle = nullptr;
    const auto failed = aoti_torch_empty_strided(
        (int64_t)sizes.size(), sizes.data(), strides.data(), (int32_t)dtype,
        aoti_torch_device_type_cpu(), 0, &handle);
    require(!failed, "torch gives no memory for a result.");
    return Tensor(handle);
}

bool is_aligned(const void* address) { return (uintptr_t)address % kAlignment == 0; }

Tensor aligned(const Tensor& bytes) {
    Tensor own = whole(bytes);
    if (is_aligned(own.data_ptr())) return own;
    Tensor copy = empty({own.numel()}, ScalarType::Byte);
    std::memcpy(copy.data_ptr(), own.data_ptr(), (size_t)own.numel());
    return copy;
}

int32_t input_of(ScalarType dtype, const char* layer) {
    if (dtype == ScalarType::Float) return FPC_INPUT_F32;
    if (dtype == ScalarType::Half) return FPC_INPUT_F16;
    require_same(dtype == ScalarType::BFloat16, layer);
    return FPC_INPUT_BF16;
}

int64_t bytes_of(ScalarType dtype) { return dtype == ScalarType::Float ? 4 : 2; }

std::vector<int64_t> rows_of(const Tensor& x, int64_t last) {
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = last;
    return sizes;
}

// --- what the library is told --------------------------------------------------------------------

struct Call {
    FpcWeights weights;
    FpcActivations activations;
    int32_t instructions, threads;
    const char* layer;

    Call(const Tensor& about, const char* layer) : layer(layer) {
        static const int32_t best = fpc_instructions();
        require_same(about.numel() == sizeof weights + sizeof activations, layer);
        const char* bytes = static_cast<const char*>(about.data_ptr());
        std::memcpy(&weights, bytes, sizeof weights);
        std::memcpy(&activations, bytes + sizeof weights, sizeof activations);
        require(weights.arithmetic != FPC_BF16 || best == FPC_AVX512_BF16, "layer '", layer,
                "': the package was made for processors with AVX-512 BF16, which this one lacks. ",
                "Export the model on such a processor as this.");
        instructions = best;
        threads = (int32_t)torch::stable::get_num_threads();
    }

    // Memory for rows that are made ready.
    Tensor memory(const Tensor& x, int64_t row_bytes) const {
        require_same(fpc_prepared_bytes(&weights, 1) == row_bytes, layer);
        return empty(rows_of(x, row_bytes), ScalarType::Byte);
    }

    void check(int32_t status, const char* operand) const {
        if (status == FPC_NO_MEMORY) throw std::bad_alloc();
        require(status == FPC_OK, "layer '", layer, "': input holds NaN/Inf (or values beyond fp32) ",
                "and cannot be quantized to ", operand, ". Check the inputs.");
    }
};

// --- what a norm or an activation reads ----------------------------------------------------------

// The names of runtime/fused.py, in the order of FpcHead and FpcTail.
constexpr const char* kHeads[] = {"rms_norm", "rms_norm_wide", "layer_norm", "silu",
                                  "gelu",     "gelu_tanh",     "relu"};
constexpr const char* kTails[] = {"", "_mul", "_add", "_modulate"};

std::pair<int32_t, int32_t> parse(const std::string& producer, const char* layer) {
    for (size_t head = 0; head < std::size(kHeads); head++)
        for (size_t tail = 0; tail < std::size(kTails); tail++)
            if (producer == std::string(kHeads[head]) + kTails[tail])
                return {(int32_t)head, (int32_t)tail};
    require_same(false, layer);
    return {};
}

// Where the rows of a tensor are that is broadcast to a shape: row r begins r / repeat * stride
// values behind the first one. False if no such numbers say it; see native_producers.py.
bool place(const Tensor& tensor, const Tensor& x, int64_t& repeat, int64_t& stride) {
    const auto sizes = tensor.sizes(), strides = tensor.strides(), to = x.sizes();
    const int64_t rank = tensor.dim(), missing = x.dim() - rank;
    if (missing < 0 || !rank || sizes[rank - 1] != to[x.dim() - 1] ||
        (strides[rank - 1] != 1 && sizes[rank - 1] != 1))
        return false;
    std::vector<std::pair<int64_t, int64_t>> axes;
    for (int64_t axis = 0; axis < x.dim() - 1; axis++) {
        const bool own = axis >= missing && sizes[axis - missing] == to[axis];
        if (axis >= missing && !own && sizes[axis - missing] != 1) return false;
        if (to[axis] != 1) axes.emplace_back(to[axis], own ? strides[axis - missing] : 0);
    }
    for (repeat = 1; !axes.empty() && axes.back().second == 0; axes.pop_back())
        repeat *= axes.back().first;
    repeat = std::max<int64_t>(repeat, 1);
    stride = axes.empty() ? 0 : axes.back().second;
    int64_t reach = stride;
    for (auto axis = axes.rbegin(); axis != axes.rend(); ++axis) {
        if (axis->second != reach) return false;
        reach *= axis->first;
    }
    return true;
}

// A tensor, broadcast to a shape and copied: what `place` has no numbers for.
Tensor spread(const Tensor& tensor, const Tensor& x, const char* layer) {
    const auto sizes = tensor.sizes(), strides = tensor.strides(), to = x.sizes();
    const int64_t missing = x.dim() - tensor.dim(), width = bytes_of(tensor.scalar_type());
    require_same(missing >= 0, layer);
    Tensor copy = empty({to.begin(), to.end()}, tensor.scalar_type());
    const char* from = static_cast<const char*>(tensor.data_ptr());
    char* data = static_cast<char*>(copy.data_ptr());
    for (int64_t index = 0; index < x.numel(); index++) {
        int64_t rest = index, offset = 0;
        for (int64_t axis = x.dim() - 1; axis >= 0; axis--) {
            if (axis >= missing && sizes[axis - missing] != 1)
                offset += rest % to[axis] * strides[axis - missing];
            rest /= to[axis];
        }
        std::memcpy(data + index * width, from + offset * width, (size_t)width);
    }
    return copy;
}

// Tensors that a structure has the addresses of live in `kept` until it has been used.
FpcRows rows(AtenTensorHandle* handle, const Tensor& x, std::vector<Tensor>& kept,
             const char* layer) {
    FpcRows found{};
    if (!handle) return found;
    Tensor tensor = borrow(*handle);
    int64_t stride = 0;
    if (!place(tensor, x, found.repeat, stride)) {
        tensor = spread(tensor, x, layer);
        found.repeat = 1, stride = x.sizes()[x.dim() - 1];
    }
    found.data = tensor.data_ptr(), found.type = input_of(tensor.scalar_type(), layer);
    found.stride = stride * bytes_of(tensor.scalar_type());
    kept.push_back(tensor);
    return found;
}

const void* vector(AtenTensorHandle* handle, int64_t k, int32_t& type, std::vector<Tensor>& kept,
                   const char* layer) {
    if (!handle) return nullptr;
    kept.push_back(whole(borrow(*handle)));
    require_same(kept.back().numel() == k, layer);
    type = input_of(kept.back().scalar_type(), layer);
    return kept.back().data_ptr();
}

Tensor prepare(const Tensor& x, int64_t stride, const Tensor& about, int64_t row_bytes,
               const FpcProducer* producer, const FpcRows* scale, const FpcRows* shift,
               const char* operand, const char* layer) {
    const Call call(about, layer);
    const int64_t k = call.weights.k;
    require_same(x.dim() > 0 && x.sizes()[x.dim() - 1] == k, layer);
    const Tensor result = call.memory(x, row_bytes);
    call.check(fpc_prepare_produced(&call.weights, &call.activations, producer, scale, shift,
                                    x.data_ptr(), input_of(x.scalar_type(), layer), x.numel() / k,
                                    stride, (uint8_t*)result.data_ptr(), call.threads,
                                    call.instructions),
               operand);
    return result;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

AOTITorchError aoti_torch_cpu_native_prepare(AtenTensorHandle values, AtenTensorHandle about,
                                             int64_t row_bytes, const char* operand,
                                             const char* layer, AtenTensorHandle* result) {
    const Tensor x = whole(borrow(values));
    require_same(x.dim() > 0, layer);
    const int64_t stride = x.sizes()[x.dim() - 1];
    return give(prepare(x, stride, borrow(about), row_bytes, nullptr, nullptr, nullptr, operand,
                        layer),
                result);
}

AOTITorchError aoti_torch_cpu_native_prepare_produced(
    AtenTensorHandle values, AtenTensorHandle* weight, AtenTensorHandle* bias,
    AtenTensorHandle* scale, AtenTensorHandle* shift, const char* producer, double eps,
    AtenTensorHandle about, int64_t row_bytes, const char* operand, const char* layer,
    AtenTensorHandle* result) {
    Tensor x = borrow(values);
    require_same(x.dim() > 0, layer);
    const int64_t k = x.sizes()[x.dim() - 1];
    int64_t repeat = 0, stride = 0;
    if (!place(x, x, repeat, stride) || repeat != 1) x = whole(x), stride = k;
    std::vector<Tensor> kept;
    FpcProducer own{};
    std::tie(own.head, own.tail) = parse(producer, layer);
    own.eps = (float)eps;
    own.weight = vector(weight, k, own.weight_type, kept, layer);
    own.bias = vector(bias, k, own.bias_type, kept, layer);
    const FpcRows scales = rows(scale, x, kept, layer), shifts = rows(shift, x, kept, layer);
    return give(prepare(x, stride, borrow(about), row_bytes, &own, scale ? &scales : nullptr,
                        shift ? &shifts : nullptr, operand, layer),
                result);
}

AOTITorchError aoti_torch_cpu_native_multiply(AtenTensorHandle values, AtenTensorHandle about,
                                              AtenTensorHandle data, AtenTensorHandle scale,
                                              AtenTensorHandle* bias, int64_t outputs,
                                              int32_t dtype, const char* layer,
                                              AtenTensorHandle* residual,
                                              AtenTensorHandle* result) {
    Call call(borrow(about), layer);
    FpcWeights& weights = call.weights;
    const Tensor ready = aligned(borrow(values)), packed = aligned(borrow(data));
    const Tensor factors = whole(borrow(scale));
    const int64_t row = fpc_prepared_bytes(&weights, 1);
    const Tensor prepared = borrow(values);
    require_same(weights.n == outputs && !weights.bias == !bias &&
                     packed.numel() == fpc_weight_bytes(&weights) && prepared.dim() > 0 &&
                     prepared.sizes()[prepared.dim() - 1] == row && factors.numel() >= outputs,
                 layer);
    const Tensor terms = bias ? whole(borrow(*bias)) : factors;
    require_same(terms.numel() >= outputs, layer);
    weights.data = (const uint8_t*)packed.data_ptr();
    weights.row_scale = (const float*)factors.data_ptr();
    weights.bias = bias ? (const float*)terms.data_ptr() : nullptr;
    const Tensor y = empty(rows_of(prepared, outputs), (ScalarType)dtype);
    const Tensor added = residual ? whole(borrow(*residual)) : y;
    require_same(added.numel() == y.numel() && added.scalar_type() == y.scalar_type(), layer);
    call.check(fpc_multiply(&weights, (const uint8_t*)ready.data_ptr(), ready.numel() / row,
                            y.data_ptr(), residual ? added.data_ptr() : nullptr,
                            input_of((ScalarType)dtype, layer), outputs, call.threads,
                            call.instructions),
               "");
    return give(y, result);
}

}  // extern "C"
#pragma GCC visibility pop
