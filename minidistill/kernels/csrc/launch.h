// The kernel as the binding sees it: pointers, sizes, the current device, and a stream as an opaque handle.
#pragma once
#include <cstdint>

struct Operands {  // y = x W^T + b + t B^T, t = scale x A^T (lora_gemm.h), of fewer than 2^32 numbers each
    const uint16_t *x, *W, *b;  // b may be null
    const float *A, *B;
    uint16_t *y, *t;
    unsigned M, N, K, rank, x_stride;
    float scale;
    bool bfloat16, transposed;
};

// Returns nullptr, or what went wrong.
const char* launch_lora_gemm(const Operands& operands, int device, void* stream);
