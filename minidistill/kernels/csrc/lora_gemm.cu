// Which of the kernels is launched for which sizes. Built with SM90 (for sm_90a alone) it has those for Hopper too.
#include <type_traits>

#include "launch.h"
#include "primitives.h"

#include "lora_gemm.h"
#ifdef SM90
#include "primitives_sm90.h"

#include "lora_gemm_sm90.h"
#endif

template <class P, class Kernel, class... Maps>
static cudaError_t launch(Kernel kernel, cudaStream_t stream, const Problem& problem, const Maps&... maps) {
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (cudaError_t error = cudaFuncSetAttribute(kernel, attribute, P::SHARED_BYTES)) return error;
    kernel<<<P::blocks(problem.y.rows, problem.y.columns), P::THREADS, P::SHARED_BYTES, stream>>>(problem, maps...);
    return cudaGetLastError();
}

#ifdef SM90
// How TMA is to read a matrix: in boxes of one panel, with its swizzle, and zeros for what lies outside.
template <class Panels_, class Element>
static cudaError_t describe(TensorMap* map, const Matrix<const uint16_t>& matrix, Element) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {  // of the driver, asked for by name so that nothing has to be linked
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
        return reinterpret_cast<Encode>(function);
    }();
    if (!encode) return cudaErrorNotSupported;
    const cuuint64_t sizes[] = {matrix.columns, matrix.rows}, row_bytes[] = {cuuint64_t{matrix.stride} * 2};
    const cuuint32_t box[] = {Panels_::WIDTH, Panels_::ROWS}, steps[] = {1, 1};
    const auto swizzle = Panels_::WIDTH == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                         : Panels_::WIDTH == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                : CU_TENSOR_MAP_SWIZZLE_32B;
    const auto type = std::is_same_v<Element, BFloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                        : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const CUresult result =
        encode(map, type, 2, const_cast<uint16_t*>(matrix.data), sizes, row_bytes, box, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <class P> static cudaError_t launch_large(const Problem& problem, cudaStream_t stream) {
    TensorMap x_map, w_map;
    typename P::Element element;
    if (cudaError_t error = describe<typename P::X>(&x_map, problem.x, element)) return error;
    if (cudaError_t error = describe<typename P::W>(&w_map, problem.W, element)) return error;
    return launch<P>(lora_gemm_sm90<P>, stream, problem, x_map, w_map);
}
template <class Element, bool TRANSPOSED, int R> using Large = PlanSm90<Element, R, TRANSPOSED>;
#else
template <class P> static cudaError_t launch_large(const Problem& problem, cudaStream_t stream) {
    return launch<P>(lora_gemm<P>, stream, problem);
}
template <class Element, bool TRANSPOSED, int R> using Large = Plan<Element, 128, 160, R, TRANSPOSED>;
#endif
template <class Element, bool TRANSPOSED, int R> using Small = Plan<Element, 64, 64, R, TRANSPOSED>;

// Large blocks read x and W less often; small ones reach more processors where y is small.
template <class Element, bool TRANSPOSED, int R>
static cudaError_t launch_size(const Problem& problem, cudaStream_t stream) {
    using L = Large<Element, TRANSPOSED, R>;
    using S = Small<Element, TRANSPOSED, R>;
    int device, processors;
    if (cudaError_t error = cudaGetDevice(&device)) return error;
    if (cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return error;
    const int blocks = L::blocks(problem.y.rows, problem.y.columns);
    return blocks >= processors * 3 / 4 ? launch_large<L>(problem, stream) : launch<S>(lora_gemm<S>, stream, problem);
}

template <class Element, bool TRANSPOSED> static cudaError_t launch_rank(const Problem& problem, cudaStream_t stream) {
    const unsigned rank = problem.t.columns;
    if (rank <= 16) return launch_size<Element, TRANSPOSED, 16>(problem, stream);
    if (rank <= 32) return launch_size<Element, TRANSPOSED, 32>(problem, stream);
    if (rank <= 64) return launch_size<Element, TRANSPOSED, 64>(problem, stream);
    return launch_size<Element, TRANSPOSED, 128>(problem, stream);
}

template <class Element> static cudaError_t launch_way(const Problem& problem, bool transposed, cudaStream_t stream) {
    return transposed ? launch_rank<Element, true>(problem, stream) : launch_rank<Element, false>(problem, stream);
}

const char* launch_lora_gemm(const Operands& operands, void* handle) {
    const Problem problem = problem_of(operands);
    const auto stream = static_cast<cudaStream_t>(handle);
    const cudaError_t error = operands.bfloat16 ? launch_way<BFloat16>(problem, operands.transposed, stream)
                                                : launch_way<Float16>(problem, operands.transposed, stream);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
