// The Hopper instructions (sm_90a) that lora_gemm_sm90.h uses, with their names in the PTX manual.
#pragma once
#include <cuda.h>

#include "primitives.h"

using TensorMap = CUtensorMap;
using Barrier = uint64_t;

// mbarrier: a phase completes when all its arrivals and all the bytes they announced are in.

// mbarrier.init.shared.b64: one arrival per phase; fence.mbarrier_init.release.cluster: makes it visible to TMA
DEVICE void mbarrier_init(Barrier* barrier) {
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// mbarrier.arrive.expect_tx.shared.b64: arrives, and announces this many bytes
DEVICE void mbarrier_arrive_expect(Barrier* barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// mbarrier.try_wait.parity.shared.b64: waits until the phase of this parity is complete
DEVICE void mbarrier_wait(Barrier* barrier, unsigned parity) {
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared.b64 complete, [%0], %1;\n"
        "@!complete bra again;\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// cp.async.bulk.tensor.2d (TMA): copies the map's box at (row, column); elements outside the matrix are zero
DEVICE void tma_load(uint16_t* to, const TensorMap& map, unsigned row, unsigned column, Barrier* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(to)),
        "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
        : "memory");
}

// fence.proxy.async.shared::cta: after a barrier, wgmma can read what this thread has stored
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// wgmma uses registers asynchronously. This emits no instruction, but keeps the compiler from moving accesses to these
// registers across it.
template <int N> DEVICE void pin(float (&registers)[N][4]) {
#pragma unroll
    for (int i = 0; i < N * 4; ++i) asm volatile("" : "+f"(registers[i / 4][i % 4])::"memory");
}
template <int N> DEVICE void pin(uint32_t (&registers)[N][4]) {
#pragma unroll
    for (int i = 0; i < N * 4; ++i) asm volatile("" : "+r"(registers[i / 4][i % 4])::"memory");
}

// wgmma.fence: orders accesses to these registers before the wgmma that follow
template <class... Registers> DEVICE void wgmma_fence(Registers&... registers) {
    (pin(registers), ...);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// wgmma.commit_group, wgmma.wait_group 0: waits for all wgmma of this warpgroup; these registers can be read
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <class... Registers> DEVICE void wgmma_wait(Registers&... registers) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    (pin(registers), ...);
}

// The descriptor by which wgmma finds a matrix in shared memory: panels of WIDTH columns, swizzled by the length of
// a row (128, 64 or 32 bytes). Bits 0-13: address of the first element; 16-29: bytes from one panel to the next
// (transposed matrices only); 32-45: bytes from eight rows to the next eight; 62-63: swizzle. Address and bytes are in
// units of 16.
template <int WIDTH> DEVICE uint64_t descriptor(const uint16_t* first, unsigned panel_bytes) {
    constexpr uint64_t EIGHT_ROWS = 8 * WIDTH * 2, SWIZZLE = WIDTH == 64 ? 1 : WIDTH == 32 ? 2 : 3;
    const uint64_t address = shared_address(first) & 0x3ffff;
    return address >> 4 | uint64_t{panel_bytes >> 4} << 16 | EIGHT_ROWS >> 4 << 32 | SWIZZLE << 62;
}

// wgmma.mma_async.sync.aligned.m64nNk16.f32, executed by four warps: c[64, N] += a[64, 16] b, with b stored as [N, 16]
// or, transposed, as [16, N]. Warp i holds rows 16 i to 16 i + 15 of c, laid out as for mma. a is in shared memory, or
// in registers with the layout of mma.

#define NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NAMES_32 NAMES_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_64 NAMES_32 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_128                                                                                              \
    NAMES_64 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50" \
             ", %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_160 NAMES_128 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"

#define EIGHT(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define COLUMNS_16 EIGHT(0), EIGHT(1)
#define COLUMNS_32 COLUMNS_16, EIGHT(2), EIGHT(3)
#define COLUMNS_64 COLUMNS_32, EIGHT(4), EIGHT(5), EIGHT(6), EIGHT(7)
#define COLUMNS_128 COLUMNS_64, EIGHT(8), EIGHT(9), EIGHT(10), EIGHT(11), EIGHT(12), EIGHT(13), EIGHT(14), EIGHT(15)
#define COLUMNS_160 COLUMNS_128, EIGHT(16), EIGHT(17), EIGHT(18), EIGHT(19)

// After the operands: accumulate into c, do not negate a or b, and whether a and b are transposed.
#define WGMMA(N, TYPE, A, FLAGS, ...)                                                                               \
    asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE \
                 "." TYPE " {" NAMES_##N "}, " A ", add, 1, 1, " FLAGS ";\n}"                                       \
                 : COLUMNS_##N                                                                                      \
                 : __VA_ARGS__)

#define WGMMA_OF_SHARED(N, ELEMENT, TYPE, OPERANDS, FLAGS)                                        \
    template <bool TRANSPOSED>                                                                    \
    DEVICE void wgmma(ELEMENT, float (&c)[N / 8][4], uint64_t a, uint64_t b) {                    \
        WGMMA(N, TYPE, OPERANDS, "0, " FLAGS, "l"(a), "l"(b), "n"(static_cast<int>(TRANSPOSED))); \
    }
#define WGMMA_OF_REGISTERS(N, ELEMENT, TYPE, OPERANDS, FLAGS)                               \
    template <bool TRANSPOSED>                                                              \
    DEVICE void wgmma(ELEMENT, float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t b) {  \
        WGMMA(N, TYPE, OPERANDS, FLAGS, "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), \
              "n"(static_cast<int>(TRANSPOSED)));                                           \
    }
#define WGMMA_OF(ELEMENT, TYPE)                            \
    WGMMA_OF_SHARED(16, ELEMENT, TYPE, "%8, %9", "%10")    \
    WGMMA_OF_SHARED(32, ELEMENT, TYPE, "%16, %17", "%18")  \
    WGMMA_OF_SHARED(64, ELEMENT, TYPE, "%32, %33", "%34")  \
    WGMMA_OF_SHARED(128, ELEMENT, TYPE, "%64, %65", "%66") \
    WGMMA_OF_SHARED(160, ELEMENT, TYPE, "%80, %81", "%82") \
    WGMMA_OF_REGISTERS(160, ELEMENT, TYPE, "{%80, %81, %82, %83}, %84", "%85")

WGMMA_OF(Float16, "f16")
WGMMA_OF(BFloat16, "bf16")
