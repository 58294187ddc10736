// The interface between binding and launcher: pointers, sizes, the device, and the stream as an opaque handle.
#pragma once
#include <cstdint>

// y = x W^T + b + t B^T, t = scale x A^T (lora_gemm.h). Each operand has fewer than 2^32 elements.
struct Operands {
    const uint16_t *x, *W, *b;  // b may be null
    const float *A, *B;
    uint16_t *y, *t;
    unsigned M, N, K, rank, x_stride;
    float scale;
    bool bfloat16, transposed;
};

// Returns nullptr, or an error message.
const char* launch_lora_gemm(const Operands& operands, int device, void* stream);
