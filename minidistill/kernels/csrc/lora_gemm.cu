// Chooses a kernel by the sizes of the problem and launches it. SM90 (for sm_90a only) adds Hopper's kernels.
#include <atomic>
#include <type_traits>

#include "launch.h"
#include "primitives.h"

#include "lora_gemm.h"
#ifdef SM90
#include "primitives_sm90.h"

#include "lora_gemm_sm90.h"
#endif

struct Target {
    int device;
    cudaStream_t stream;
};

// These two call the driver once per device and cache the answer. Threads that race store the same value.
constexpr int MAX_DEVICES = 128;  // PyTorch's own limit is lower

static cudaError_t count_processors(int device, int* processors) {
    static std::atomic<int> counts[MAX_DEVICES];
    *processors = counts[device];
    if (*processors) return cudaSuccess;
    const cudaError_t error = cudaDeviceGetAttribute(processors, cudaDevAttrMultiProcessorCount, device);
    counts[device] = *processors;
    return error;
}

template <class P, class Kernel> static cudaError_t allow_shared_memory(Kernel kernel, int device) {
    static std::atomic<bool> allowed[MAX_DEVICES];
    if (allowed[device]) return cudaSuccess;
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const cudaError_t error = cudaFuncSetAttribute(kernel, attribute, P::SHARED_BYTES);
    allowed[device] = error == cudaSuccess;
    return error;
}

template <class P, class Kernel, class... Maps>
static cudaError_t launch(Kernel kernel, const Target& target, const Problem& problem, const Maps&... maps) {
    if (cudaError_t error = allow_shared_memory<P>(kernel, target.device)) return error;
    const unsigned blocks = P::blocks(problem.y.rows, problem.y.columns);
    kernel<<<blocks, P::THREADS, P::SHARED_BYTES, target.stream>>>(problem, maps...);
    return cudaGetLastError();
}

#ifdef SM90
// Makes the tensor map by which TMA reads a matrix: a box is one panel, swizzled; elements outside are zero.
template <class Panels_, class Element>
static cudaError_t make_tensor_map(TensorMap* map, const Matrix<const uint16_t>& matrix, Element) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {  // looked up by name, so that the driver library need not be linked
        void* function = nullptr;
        cudaDriverEntryPointQueryResult result;
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
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

template <class P> static cudaError_t launch_large(const Problem& problem, const Target& target) {
    TensorMap x_map, w_map;
    typename P::Element element;
    if (cudaError_t error = make_tensor_map<typename P::X>(&x_map, problem.x, element)) return error;
    if (cudaError_t error = make_tensor_map<typename P::W>(&w_map, problem.W, element)) return error;
    return launch<P>(lora_gemm_sm90<P>, target, problem, x_map, w_map);
}
template <class Element, bool TRANSPOSED, int R> using Large = PlanSm90<Element, R, TRANSPOSED>;
#else
template <class P> static cudaError_t launch_large(const Problem& problem, const Target& target) {
    return launch<P>(lora_gemm<P>, target, problem);
}
template <class Element, bool TRANSPOSED, int R> using Large = Plan<Element, 128, 160, R, TRANSPOSED>;
#endif
template <class Element, bool TRANSPOSED, int R> using Small = Plan<Element, 64, 64, R, TRANSPOSED>;

// Large blocks read x and W less often. Small blocks keep more multiprocessors busy if y is small.
template <class Element, bool TRANSPOSED, int R>
static cudaError_t launch_size(const Problem& problem, const Target& target) {
    using L = Large<Element, TRANSPOSED, R>;
    using S = Small<Element, TRANSPOSED, R>;
    int processors;
    if (cudaError_t error = count_processors(target.device, &processors)) return error;
    const int blocks = L::blocks(problem.y.rows, problem.y.columns);
    return blocks >= processors * 3 / 4 ? launch_large<L>(problem, target) : launch<S>(lora_gemm<S>, target, problem);
}

template <class Element, bool TRANSPOSED>
static cudaError_t launch_rank(const Problem& problem, const Target& target) {
    const unsigned rank = problem.t.columns;
    if (rank <= 16) return launch_size<Element, TRANSPOSED, 16>(problem, target);  // also rank 0, W alone
    if (rank <= 32) return launch_size<Element, TRANSPOSED, 32>(problem, target);
    if (rank <= 64) return launch_size<Element, TRANSPOSED, 64>(problem, target);
    return launch_size<Element, TRANSPOSED, 128>(problem, target);
}

template <class Element>
static cudaError_t launch_layout(const Problem& problem, bool transposed, const Target& target) {
    return transposed ? launch_rank<Element, true>(problem, target) : launch_rank<Element, false>(problem, target);
}

const char* launch_lora_gemm(const Operands& operands, int device, void* stream) {
    const Problem problem = problem_of(operands);
    const Target target{device, static_cast<cudaStream_t>(stream)};
    const cudaError_t error = operands.bfloat16 ? launch_layout<BFloat16>(problem, operands.transposed, target)
                                                : launch_layout<Float16>(problem, operands.transposed, target);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
