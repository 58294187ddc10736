// The parts of CUDA's runtime and driver that lora_gemm.cu uses, in plain C++: launches run under emulation, and tensor
// maps are checked as the driver's manual says.
#pragma once
#include <cstdint>

#include "primitives_sm90.h"

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorNotSupported, cudaErrorLaunchFailure };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

// Device 0 has so few multiprocessors that large blocks are always chosen, device 1 so many that small blocks are, and
// device 2 is an H200.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
    const int processors[] = {1, 1 << 20, 132};
    return *value = processors[device], cudaSuccess;
}

inline std::map<const void*, int> shared_bytes_allowed;  // by kernel; the default is 48 KB
template <class Kernel> cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
    shared_bytes_allowed[reinterpret_cast<const void*>(kernel)] = bytes;
    return bytes <= 227 * 1024 ? cudaSuccess : cudaErrorInvalidValue;
}

inline cudaError_t cudaGetLastError() { return block.error.empty() ? cudaSuccess : cudaErrorLaunchFailure; }
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorLaunchFailure ? block.error.c_str() : "an invalid argument to CUDA";
}

extern "C" {
inline int emulated_device = 0, threads_of_last_launch = 0;  // set and read by whole.py
}

// kernel<<<blocks, threads, bytes, stream>>>(problem, maps...)
template <class Kernel, class Problem, class... Maps>
void launch_emulated(Kernel kernel, unsigned blocks, int threads, int bytes, const Problem& p, const Maps&... maps) {
    const auto range = [](const auto& m) {
        const auto* const data = reinterpret_cast<const char*>(m.data);
        const size_t elements = m.rows && m.columns ? size_t{m.rows - 1} * m.stride + m.columns : 0;
        return Range{data, data + elements * sizeof(*m.data)};
    };
    const auto* const bias = reinterpret_cast<const char*>(p.b);
    block.readable = {range(p.x), range(p.W), range(p.A), range(p.B), {bias, bias ? bias + p.y.columns * 2 : bias}};
    block.writable = {range(p.y), range(p.t)};
    block.error.clear(), block.conflicts = 0, block.delivery = AT_RANDOM;
    threads_of_last_launch = threads;
    const auto allowed = shared_bytes_allowed.find(reinterpret_cast<const void*>(kernel));
    if (blocks == 0 || bytes > (allowed == shared_bytes_allowed.end() ? 48 * 1024 : allowed->second))
        block.error = "a launch without blocks, or with more shared memory than allowed";
    for (unsigned i = 0; i < blocks && block.error.empty(); ++i)
        block.run(i, threads, bytes, i, [&] { kernel(p, maps...); });
    if (block.conflicts && block.error.empty()) block.error = "bank conflicts";
}

// cuTensorMapEncodeTiled

enum CUresult { CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle {
    CU_TENSOR_MAP_SWIZZLE_32B = 32,
    CU_TENSOR_MAP_SWIZZLE_64B = 64,
    CU_TENSOR_MAP_SWIZZLE_128B = 128,
};
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_128B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };
using cuuint64_t = uint64_t;
using cuuint32_t = uint32_t;

inline CUresult cuTensorMapEncodeTiled(TensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* address,
                                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    bool valid = rank == 2 && reinterpret_cast<uintptr_t>(address) % 16 == 0;
    for (int i = 0; i < 2; ++i) {
        valid = valid && sizes[i] > 0 && sizes[i] <= uint64_t{1} << 32;
        valid = valid && box[i] > 0 && box[i] <= 256 && steps[i] == 1;
    }
    valid = valid && strides[0] % 16 == 0 && strides[0] < uint64_t{1} << 40 && strides[0] >= sizes[0] * 2;
    valid = valid && box[0] * 2 == swizzle;  // the manual allows narrower boxes; the emulation of tma_load does not
    if (!valid) return CUDA_ERROR_INVALID_VALUE;
    *map = {static_cast<uint16_t*>(address), static_cast<unsigned>(sizes[1]), static_cast<unsigned>(sizes[0]),
            static_cast<unsigned>(strides[0] / 2), box[1], box[0]};
    return CUDA_SUCCESS;
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult*) {
    return *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled), cudaSuccess;
}
