// The CUDA operator: checks the tensors, then passes pointers, sizes and the current stream. Needs no CUDA header.
#include <ATen/ATen.h>
#include <ATen/DeviceAccelerator.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>

#include "launch.h"

namespace {

using at::Tensor;
using Pair = std::tuple<Tensor, Tensor>;

bool aligned(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0; }

template <class T> const T* data(const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); }

// Returns (y, t): y = x W^T + b + t B^T, t = scale x A^T; or, if transposed, y = x W + t B, t = scale x A.
Pair fused(const Tensor& x, const Tensor& W, const std::optional<Tensor>& b, const Tensor& A, const Tensor& B,
           double scale, bool transposed) {
    const int out = transposed ? 1 : 0, in = 1 - out;
    const int64_t K = W.size(in), N = W.size(out), rank = A.size(out);
    const auto type = x.scalar_type();
    TORCH_CHECK(type == at::kHalf || type == at::kBFloat16, "lora_linear needs float16 or bfloat16, not ", type);
    TORCH_CHECK(W.scalar_type() == type && (!b || b->scalar_type() == type), "x, W and b must have the same dtype");
    TORCH_CHECK(A.scalar_type() == at::kFloat && B.scalar_type() == at::kFloat, "A and B must be float32");
    TORCH_CHECK(K > 0 && N > 0 && K % 8 == 0 && N % 8 == 0, "W must have sizes that are positive multiples of 8, not ",
                W.sizes());
    TORCH_CHECK(rank <= 128, "the rank must be from 0 to 128, not ", rank);
    TORCH_CHECK(x.size(-1) == K && A.size(in) == K && B.size(out) == N && B.size(in) == rank && (!b || b->numel() == N),
                "shapes do not match: x ", x.sizes(), ", W ", W.sizes(), ", A ", A.sizes(), ", B ", B.sizes());
    for (const Tensor* weights : {&W, &A, &B})
        TORCH_CHECK(weights->device() == x.device(), "x and the weights are on different devices");
    TORCH_CHECK(!b || b->device() == x.device(), "x and b are on different devices");

    const int64_t M = x.numel() / K, limit = int64_t{1} << 32;  // the kernel's offsets have 32 bits
    const int64_t largest = std::max({M * std::max({K, N, rank}), N * std::max(K, rank), K * rank});
    TORCH_CHECK(largest < limit, "an operand has 2^32 elements or more");

    const c10::DeviceGuard guard(x.device());
    const auto copy = [](const Tensor& tensor) { return tensor.clone(at::MemoryFormat::Contiguous); };
    const auto contiguous = [&](const Tensor& tensor) {
        return tensor.is_contiguous() && aligned(tensor) ? tensor : copy(tensor);
    };
    Tensor rows = x;  // used as [M, K]
    int64_t stride = K;
    if (!x.is_contiguous() || !aligned(x)) {
        rows = x.reshape({-1, K});
        stride = rows.stride(0);
        const bool allowed = stride >= K && stride % 8 == 0 && M * stride < limit;  // 8 elements are 16 bytes
        if (rows.stride(1) != 1 || !allowed || !aligned(rows)) rows = copy(rows), stride = K;
    }
    const Tensor W_ = contiguous(W), A_ = contiguous(A), B_ = contiguous(B), b_ = b ? contiguous(*b) : Tensor();

    auto shape = x.sizes().vec();
    shape.back() = N;
    const Tensor y = at::empty(shape, x.options());
    shape.back() = rank;
    const Tensor t = at::empty(shape, x.options());
    if (M == 0) return {y, t};

    const Operands operands{.x = data<uint16_t>(rows),
                            .W = data<uint16_t>(W_),
                            .b = b ? data<uint16_t>(b_) : nullptr,
                            .A = data<float>(A_),
                            .B = data<float>(B_),
                            .y = static_cast<uint16_t*>(y.mutable_data_ptr()),
                            .t = static_cast<uint16_t*>(t.mutable_data_ptr()),
                            .M = static_cast<unsigned>(M),
                            .N = static_cast<unsigned>(N),
                            .K = static_cast<unsigned>(K),
                            .rank = static_cast<unsigned>(rank),
                            .x_stride = static_cast<unsigned>(stride),
                            .scale = static_cast<float>(scale),
                            .bfloat16 = type == at::kBFloat16,
                            .transposed = transposed};
    const auto device = x.device().index();
    const auto stream = at::accelerator::getCurrentStream(device);
    const char* const error = launch_lora_gemm(operands, device, stream.native_handle());
    TORCH_CHECK(!error, "lora_linear: ", error);
    return {y, t};
}

Pair layer(const Tensor& x, const Tensor& W, const std::optional<Tensor>& b, const Tensor& A, const Tensor& B,
           double scale) {
    return fused(x, W, b, A, B, scale, false);
}

Pair layer_dx(const Tensor& dy, const Tensor& W, const Tensor& A, const Tensor& B, double scale) {
    return fused(dy, W, std::nullopt, B, A, scale, true);
}

}  // namespace

TORCH_LIBRARY_IMPL(minidistill, CUDA, library) {
    library.impl("lora_linear", layer);
    library.impl("lora_linear_dx", layer_dx);
}
