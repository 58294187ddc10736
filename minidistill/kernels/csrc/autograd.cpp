// The gradient of linear.py in C++. In Python a call takes as long as the kernel itself at Stable Diffusion's sizes.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext, torch::autograd::Variable, torch::autograd::variable_list;
using Pair = std::tuple<Tensor, Tensor>;

using Layer = Pair(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, double);
using LayerDx = Pair(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double);

Pair layer(const Tensor& x, const Tensor& W, const OptionalTensor& b, const Tensor& A, const Tensor& B, double scale) {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("minidistill::lora_linear", "").typed<Layer>();
    return op.call(x, W, b, A, B, scale);
}

Pair layer_dx(const Tensor& dy, const Tensor& W, const Tensor& A, const Tensor& B, double scale) {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("minidistill::lora_linear_dx", "").typed<LayerDx>();
    return op.call(dy, W, A, B, scale);
}

struct LoRALinear : torch::autograd::Function<LoRALinear> {
    static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& W, const OptionalTensor& b,
                                 const Tensor& A, const Tensor& B, double scale) {
        at::AutoDispatchBelowADInplaceOrView below;
        auto [y, t] = layer(x, W, b, A, B, scale);
        ctx->save_for_backward({x, W, A, B, t});
        ctx->saved_data["scale"] = scale;
        ctx->mark_non_differentiable({t});
        ctx->set_materialize_grads(false);
        return {y, t};
    }

    static variable_list backward(AutogradContext* ctx, variable_list gradients) {
        const auto saved = ctx->get_saved_variables();
        const Tensor &x = saved[0], &W = saved[1], &A = saved[2], &B = saved[3], &t = saved[4], &dy = gradients[0];
        const double scale = ctx->saved_data["scale"].toDouble();
        Tensor dx, dt;
        if (ctx->needs_input_grad(0))
            std::tie(dx, dt) = layer_dx(dy, W, A, B, scale);  // dx = dy W + dt A
        else
            dt = scale * at::matmul(dy, B.to(dy.scalar_type()));  // dt = s dy B
        const auto rows = [](const Tensor& tensor) { return at::atleast_2d(tensor).flatten(0, -2); };
        const Tensor dA = at::mm(rows(dt).t(), rows(x)).to(A.scalar_type());
        const Tensor dB = at::mm(rows(dy).t(), rows(t)).to(B.scalar_type());
        return {dx, Tensor(), Tensor(), dA, dB, Tensor()};
    }
};

Pair layer_with_gradient(const Tensor& x, const Tensor& W, const OptionalTensor& b, const Tensor& A, const Tensor& B,
                         double scale) {
    const auto outputs = LoRALinear::apply(x, W, b, A, B, scale);
    return {outputs[0], outputs[1]};
}

}  // namespace

// Both override the gradient that linear.py registers for all devices.
TORCH_LIBRARY_IMPL(minidistill, AutogradCUDA, library) { library.impl("lora_linear", layer_with_gradient); }
TORCH_LIBRARY_IMPL(minidistill, AutogradCPU, library) { library.impl("lora_linear", layer_with_gradient); }
