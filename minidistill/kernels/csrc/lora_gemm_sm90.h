// lora_gemm.h for Hopper: the same sums in the same order, with the instructions that only Hopper has.
//
//   - One thread starts the copies of x and W, which the copy engine (TMA) makes box by box. Each stage has an mbarrier
//     that signals their arrival.
//   - A warpgroup of 128 threads multiplies 64 rows at a time, straight from shared memory (wgmma): with the slab of W
//     for y, with the slab of A for t. The accumulators of t are already laid out as a left operand of wgmma, so that
//     y += t B^T reads t, scaled and rounded, from registers.
//
// A block has 128 rows, for two warpgroups, and 160 columns, a divisor of Stable Diffusion's widths 320, 640, 1280, ...
#pragma once
#include "lora_gemm.h"

// A matrix in shared memory as TMA writes it and wgmma reads it: panels side by side. Each panel is a tile of 64, 32 or
// 16 columns, the widest that divides the matrix. Tile's swizzle equals the PTX manual's 128-, 64- or 32-byte swizzle,
// named after the bytes in a row of the panel.
template <int ROWS_, int COLUMNS_> struct Panels {
    static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, SIZE = ROWS * COLUMNS;
    static constexpr int WIDTH = COLUMNS % 64 == 0 ? 64 : COLUMNS % 32 == 0 ? 32 : 16, COUNT = COLUMNS / WIDTH;
    using Panel = Tile<ROWS, WIDTH>;
    static_assert(Panel::SIZE * 2 % 1024 == 0);  // the alignment of a swizzle
    uint16_t* data;

    DEVICE Panel panel(unsigned i) const { return {data + i * Panel::SIZE}; }
    DEVICE uint16_t* at(unsigned row, unsigned column) const { return panel(column / WIDTH).at(row, column % WIDTH); }
    // The wgmma descriptor of the part that starts at (row, column); row is a multiple of 8, where the swizzle repeats.
    DEVICE uint64_t descriptor_at(unsigned row, unsigned column) const {
        return descriptor<WIDTH>(panel(column / WIDTH).data + row * WIDTH + column % WIDTH, Panel::SIZE * 2);
    }
};

template <class Element_, int R_, bool TRANSPOSED_> struct PlanSm90 {
    using Element = Element_;
    static constexpr int BM = 128, BN = 160, BK = 64, R = R_, THREADS = 256, STAGES = 3;
    static constexpr bool TRANSPOSED = TRANSPOSED_;

    template <int OUT, int IN> using Weights = Panels<TRANSPOSED ? IN : OUT, TRANSPOSED ? OUT : IN>;
    using X = Panels<BM, BK>;
    using W = Weights<BN, BK>;
    using A = Weights<R, BK>;
    using B = Weights<BN, R>;
    using Y = Tile<BM, BN>;
    using T = Tile<BM, R>;
    static constexpr int STAGE = X::SIZE + W::SIZE + A::SIZE;
    static constexpr int BARRIERS = STAGES * STAGE + B::SIZE;
    static constexpr int SHARED_BYTES = 2 * BARRIERS + STAGES * sizeof(Barrier);
    static_assert(Y::SIZE <= STAGES * STAGE && SHARED_BYTES <= 227 * 1024);

    static unsigned blocks(unsigned M, unsigned N) { return ((M + BM - 1) / BM) * ((N + BN - 1) / BN); }
};

// Starts the copies into all panels, one box per panel, from a corner of the matrix.
template <class Panels_> DEVICE void copy_boxes(Panels_ to, const TensorMap& map, Corner from, Barrier* arrived) {
    for (int i = 0; i < Panels_::COUNT; ++i)
        tma_load(to.panel(i).data, map, from.row, from.column + i * Panels_::WIDTH, arrived);
}

template <class P>
KERNEL(P::THREADS)
lora_gemm_sm90(const GRID_CONSTANT Problem p, const GRID_CONSTANT TensorMap x_map,
               const GRID_CONSTANT TensorMap w_map) {
    using Element = typename P::Element;
    constexpr int BN = P::BN, BK = P::BK, R = P::R, THREADS = P::THREADS, STAGES = P::STAGES;
    constexpr bool TRANSPOSED = P::TRANSPOSED;

    const BlockTiles<P> block(p.y);
    const unsigned m = block.m, n = block.n;
    const unsigned warp = thread_index() / 32;
    const unsigned row = warp * 16, group_row = warp / 4 * 64;  // first rows of this warp and of its warpgroup

    const auto arrived = [&](unsigned slab) {
        return reinterpret_cast<Barrier*>(block.shared + P::BARRIERS) + slab % STAGES;
    };

    const auto weights_at = [](auto tile, unsigned k) {
        return TRANSPOSED ? tile.descriptor_at(k, 0) : tile.descriptor_at(0, k);
    };
    const unsigned slabs = (p.x.columns + BK - 1) / BK;
    const auto copy_slab = [&](unsigned slab) {
        if (thread_index() == 0 && slab < slabs) {
            mbarrier_arrive_expect(arrived(slab), 2 * (P::X::SIZE + P::W::SIZE));
            copy_boxes(block.x_tile(slab), x_map, {m, slab * BK}, arrived(slab));
            copy_boxes(block.w_tile(slab), w_map, block.weights(n, slab * BK), arrived(slab));
        }
    };

    // Load the first slabs, and B.
    if (thread_index() == 0)
        for (unsigned stage = 0; stage < STAGES; ++stage) mbarrier_init(arrived(stage));
    sync_threads();
    for (unsigned slab = 0; slab < STAGES - 1; ++slab) copy_slab(slab);
    copy_rounded<Element, THREADS>(block.b_tile(), p.B, block.weights(n, 0));
#pragma unroll
    for (unsigned slab = 0; slab < STAGES - 1; ++slab)
        copy_rounded<Element, THREADS>(block.a_tile(slab), p.A, block.weights(0, slab * BK));
    fence_proxy_async();

    float y_sum[1][BN / 8][4], t_sum[1][R / 8][4] = {};
    fill_with_bias<Element>(y_sum, p.b, n, p.y.columns);  // y = b

    for (unsigned slab = 0; slab < slabs; ++slab) {
        mbarrier_wait(arrived(slab), slab / STAGES % 2);  // x and W have arrived
        sync_threads();  // so has A, and no thread reads the previous slab, overwritten next
        const unsigned next = slab + STAGES - 1;
        copy_slab(next);
        wgmma_fence(y_sum[0], t_sum[0]);
#pragma unroll
        for (int k = 0; k < BK; k += 16) {
            const uint64_t x = block.x_tile(slab).descriptor_at(group_row, k);
            wgmma<TRANSPOSED>(Element{}, y_sum[0], x, weights_at(block.w_tile(slab), k));  // y += x W^T
            wgmma<TRANSPOSED>(Element{}, t_sum[0], x, weights_at(block.a_tile(slab), k));  // t += x A^T
        }
        wgmma_commit();
        copy_rounded<Element, THREADS>(block.a_tile(next), p.A, block.weights(0, next * BK));
        fence_proxy_async();
        wgmma_wait(y_sum[0], t_sum[0]);
    }
    sync_threads();  // all threads are done with the slabs

    scale(t_sum, p.scale);
    uint32_t t[R / 16][4];
#pragma unroll
    for (int k = 0; k < R / 16; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // rows g and g + 8 of eight columns, then of the next eight
            const float(&pair)[4] = t_sum[0][k * 2 + i / 2];
            t[k][i] = pack(Element{}, pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
        }
    wgmma_fence(y_sum[0], t);
#pragma unroll
    for (int k = 0; k < R / 16; ++k)
        wgmma<TRANSPOSED>(Element{}, y_sum[0], t[k], weights_at(block.b_tile(), k * 16));  // y += t B^T
    wgmma_commit();
    wgmma_wait(y_sum[0], t);

    if (n == 0) {
        round_into<Element>(block.t_tile(), t_sum, row, 0);
        sync_threads();
        store<THREADS>(p.t, {m, 0}, block.t_tile());
        sync_threads();
    }
    round_into<Element>(block.y_tile(), y_sum, row, 0);
    sync_threads();
    store_chunks<THREADS>(p.y, {m, n}, block.y_tile());
}
