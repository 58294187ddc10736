// The instructions the kernel uses, with their names in the PTX manual (sm_80 and newer). To run the kernel on a CPU,
// the tests replace this file by plain C++ functions of the same names (tests/kernels/emulation/primitives.h).
#pragma once
#include <cstdint>

#define DEVICE __device__ __forceinline__
#define KERNEL(threads) __global__ void __launch_bounds__(threads)
#define GRID_CONSTANT __grid_constant__

// 16-bit floats are moved as uint16_t. These tags choose the type for the arithmetic.
struct Float16 {};
struct BFloat16 {};

struct alignas(16) Chunk {
    uint32_t words[4];
};

DEVICE unsigned thread_index() { return threadIdx.x; }
DEVICE unsigned block_index() { return blockIdx.x; }

DEVICE uint16_t* shared_memory() {
    extern __shared__ __align__(1024) Chunk memory[];  // aligned for the 128-byte swizzle
    return reinterpret_cast<uint16_t*>(memory);
}

// barrier.sync 0: waits until all threads of the block arrive; afterwards each sees what the others wrote
DEVICE void sync_threads() { __syncthreads(); }

// Plain loads and stores: ld.global, st.global, ld.shared, st.shared

DEVICE float ld_global(const float* from) { return __ldg(from); }
DEVICE uint16_t ld_global(const uint16_t* from) { return __ldg(from); }
DEVICE void st_global(uint16_t* to, uint16_t value) { *to = value; }
DEVICE void st_global(uint16_t* to, Chunk value) { *reinterpret_cast<Chunk*>(to) = value; }
DEVICE uint16_t ld_shared(const uint16_t* from) { return *from; }
DEVICE Chunk ld_shared_chunk(const uint16_t* from) { return *reinterpret_cast<const Chunk*>(from); }
DEVICE void st_shared(uint16_t* to, uint32_t pair) { *reinterpret_cast<uint32_t*>(to) = pair; }

// Asynchronous copies from global to shared memory

DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// cp.async.cg.shared.global with a src-size: copies 16 bytes, or writes 16 zero bytes without reading
DEVICE void cp_async(uint16_t* to, const uint16_t* from, bool read) {
    const int bytes = read ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
}

// cp.async.commit_group: this thread's copies since the previous commit form a group
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// cp.async.wait_group: waits until at most the last PENDING groups of this thread are incomplete
template <int PENDING> DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Fragments: the elements of a matrix that each lane of a warp holds

// ldmatrix.sync.aligned.m8n8.x4.shared.b16: loads four 8x8 matrices. Lane i passes the address of row i % 8 of matrix
// i / 8, and receives two neighbouring elements of each matrix: row i / 4, columns i % 4 * 2 and i % 4 * 2 + 1.
DEVICE void ldmatrix(uint32_t (&to)[4], const uint16_t* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// ldmatrix....trans: the same for the transposed matrices: rows i % 4 * 2 and i % 4 * 2 + 1, column i / 4.
DEVICE void ldmatrix_trans(uint32_t (&to)[4], const uint16_t* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

#define MMA(TYPE)                                                                                          \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                    \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                     \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// mma.sync.aligned.m16n8k16.row.col.f32: c[16, 8] += a[16, 16] b[16, 8]. With g = lane / 4 and j = lane % 4 * 2, a lane
// holds pairs that start at
//   a: (g, j), (g + 8, j), (g, j + 8), (g + 8, j + 8);  b: (j, g), (j + 8, g);  c: (g, j), (g + 8, j)
DEVICE void mma(Float16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { MMA("f16"); }
DEVICE void mma(BFloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { MMA("bf16"); }

// Conversions, rounding to nearest even

// cvt.rn.f16x2.f32, cvt.rn.bf16x2.f32: the upper half is the first operand
DEVICE uint32_t pack(Float16, float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
DEVICE uint32_t pack(BFloat16, float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// cvt.f32.f16; a bfloat16 is the upper half of its float32
DEVICE float unpack(Float16, uint16_t value) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value));
    return wide;
}
DEVICE float unpack(BFloat16, uint16_t value) { return __uint_as_float(static_cast<uint32_t>(value) << 16); }
