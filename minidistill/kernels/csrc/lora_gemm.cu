// Which of the kernels is launched for which sizes.
#include "launch.h"
#include "primitives.h"

#include "lora_gemm.h"

template <class P> static cudaError_t launch(const Problem& problem, cudaStream_t stream) {
    const unsigned blocks = P::blocks(problem.y.rows, problem.y.columns);
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (cudaError_t error = cudaFuncSetAttribute(lora_gemm<P>, attribute, P::SHARED_BYTES)) return error;
    lora_gemm<P><<<blocks, P::THREADS, P::SHARED_BYTES, stream>>>(problem);
    return cudaGetLastError();
}

// Large blocks read x and W less often; small ones reach more processors where y is small.
template <class Element, bool TRANSPOSED, int R>
static cudaError_t launch(const Problem& problem, cudaStream_t stream) {
    using Large = Plan<Element, 128, 160, R, TRANSPOSED>;
    using Small = Plan<Element, 64, 64, R, TRANSPOSED>;
    int device, processors;
    if (cudaError_t error = cudaGetDevice(&device)) return error;
    if (cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return error;
    const int blocks = Large::blocks(problem.y.rows, problem.y.columns);
    return blocks >= processors * 3 / 4 ? launch<Large>(problem, stream) : launch<Small>(problem, stream);
}

template <class Element, bool TRANSPOSED> static cudaError_t launch(const Problem& problem, cudaStream_t stream) {
    const unsigned rank = problem.t.columns;
    if (rank <= 16) return launch<Element, TRANSPOSED, 16>(problem, stream);
    if (rank <= 32) return launch<Element, TRANSPOSED, 32>(problem, stream);
    if (rank <= 64) return launch<Element, TRANSPOSED, 64>(problem, stream);
    return launch<Element, TRANSPOSED, 128>(problem, stream);
}

const char* launch_lora_gemm(const Operands& operands, void* stream) {
    const Problem problem = problem_of(operands);
    const auto on = static_cast<cudaStream_t>(stream);
    const cudaError_t error =
        operands.bfloat16
            ? (operands.transposed ? launch<BFloat16, true>(problem, on) : launch<BFloat16, false>(problem, on))
            : (operands.transposed ? launch<Float16, true>(problem, on) : launch<Float16, false>(problem, on));
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
