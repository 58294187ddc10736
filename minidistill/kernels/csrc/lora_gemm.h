// A linear layer with its low-rank pair in one launch:
//
//   y = x W^T + b + t B^T,   t = s x A^T        x [M, K], W [N, K], b [N], A [R, K], B [N, R];  y [M, N], t [M, R]
//
// x, W, b, y and t are float16 or bfloat16. A and B are float32 and rounded on load, t is rounded before its product
// with B, and all sums are float32. The gradient dx = dy W + (s dy B) A has the same form with transposed weights
// (TRANSPOSED): x := dy, W [K, N], A := B [K, R], B := A [R, N].
//
// A block computes a BM x BN tile of y and the BM rows of t that belong to it. It walks along K in slabs of BK columns:
//
//                       W^T, A^T
//                  +---------------+----+
//               BK | slab of W     | A  |
//                  +---------------+----+
//                         BN         R
//        BK        +---------------+----+
//      +----+      |  y            | t  |   Each warp accumulates 32 rows x BN / 2 columns of y
//   BM | x  |      |  warp 0 | 1   |    |   and 16 rows of t in registers.
//      |    |      |  warp 2 | 3   |    |
//      +----+      +---------------+----+
//
// After the last slab comes one more product of the same kind, y += t B^T: t, scaled and rounded, is stored where the
// slabs were, beside B, loaded at the start. Slabs are copied asynchronously, STAGES - 1 ahead of the arithmetic.
// Blocks and slabs need not divide M, N and K (N and K are multiples of 8): elements outside are loaded as zero.
#pragma once
#include "launch.h"

struct Corner {
    unsigned row, column;
};

template <class T> struct Matrix {  // row-major
    T* data;
    unsigned rows, columns, stride;  // stride: elements from one row to the next

    DEVICE bool has(unsigned row, unsigned column) const { return row < rows && column < columns; }
    DEVICE T* at(unsigned row, unsigned column) const { return data + (row * stride + column); }
};

struct Problem {
    Matrix<const uint16_t> x, W;
    const uint16_t* b;  // may be null
    Matrix<const float> A, B;
    float scale;
    Matrix<uint16_t> y, t;
};

template <class T> Matrix<T> matrix(T* data, unsigned rows, unsigned columns) { return {data, rows, columns, columns}; }

inline Problem problem_of(const Operands& o) {
    const auto weights = [&](auto* data, unsigned out, unsigned in) {
        return o.transposed ? matrix(data, in, out) : matrix(data, out, in);
    };
    return {{o.x, o.M, o.K, o.x_stride}, weights(o.W, o.N, o.K),      o.b, weights(o.A, o.rank, o.K),
            weights(o.B, o.N, o.rank),   o.scale, matrix(o.y, o.M, o.N), matrix(o.t, o.M, o.rank)};
}

// ROWS x COLUMNS elements in shared memory, in chunks of eight (16 bytes). The chunks of a row are permuted
// ("swizzled") so that two access patterns are free of bank conflicts: the same chunk of eight neighbouring rows, as
// ldmatrix reads, and eight neighbouring chunks of one row. PERIOD chunks in each of 8 / PERIOD rows fill the 32 banks.
template <int ROWS_, int COLUMNS_> struct Tile {
    static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, CHUNKS = COLUMNS / 8, SIZE = ROWS * COLUMNS;
    static constexpr unsigned PERIOD = CHUNKS % 8 == 0 ? 8 : CHUNKS % 4 == 0 ? 4 : 2;
    static_assert(COLUMNS % 16 == 0);
    uint16_t* data;

    DEVICE uint16_t* at(unsigned row, unsigned column) const {
        const unsigned chunk = column / 8 ^ row / (8 / PERIOD) % PERIOD;
        return data + row * COLUMNS + chunk * 8 + column % 8;
    }
};

// All sizes known at compile time.
template <class Element_, int BM_, int BN_, int R_, bool TRANSPOSED_> struct Plan {
    using Element = Element_;
    static constexpr int BM = BM_, BN = BN_, BK = 32, R = R_;
    static constexpr bool TRANSPOSED = TRANSPOSED_;
    static constexpr int THREADS = BM / 32 * 2 * 32;  // two warps for every 32 rows
    static constexpr int STAGES = R <= 32 ? 4 : R <= 64 ? 3 : 2;  // fits into 99 KB, the minimum from sm_80 to sm_90

    template <int OUT, int IN> using Weights = Tile<TRANSPOSED ? IN : OUT, TRANSPOSED ? OUT : IN>;
    using X = Tile<BM, BK>;
    using W = Weights<BN, BK>;
    using A = Weights<R, BK>;
    using B = Weights<BN, R>;
    using Y = Tile<BM, BN>;
    using T = Tile<BM, R>;
    static constexpr int STAGE = X::SIZE + W::SIZE + A::SIZE;
    static constexpr int SHARED_BYTES = 2 * (STAGES * STAGE + B::SIZE);
    static_assert(Y::SIZE <= STAGES * STAGE && T::SIZE <= STAGES * STAGE);  // t and y reuse the memory of the slabs
    static_assert(SHARED_BYTES <= 99 * 1024);

    static unsigned blocks(unsigned M, unsigned N) { return ((M + BM - 1) / BM) * ((N + BN - 1) / BN); }
};

// tile <- matrix, starting at a corner: asynchronous copies of eight elements; cp_async_wait waits for them
template <int THREADS, int ROWS, int COLUMNS>
DEVICE void copy_async(Tile<ROWS, COLUMNS> tile, const Matrix<const uint16_t>& matrix, Corner from) {
    constexpr int CHUNKS = tile.CHUNKS;
#pragma unroll
    for (unsigned i = thread_index(); i < ROWS * CHUNKS; i += THREADS) {
        const unsigned r = i / CHUNKS, c = i % CHUNKS * 8;
        const bool inside = matrix.has(from.row + r, from.column + c);
        cp_async(tile.at(r, c), inside ? matrix.at(from.row + r, from.column + c) : matrix.data, inside);
    }
}

// The same for a float32 matrix, which has to be rounded: each thread loads its i-th pair of elements into registers
// and then stores it in the tile. Four threads cover a chunk, and a warp the same chunk of eight rows.
struct Pair {
    float low, high;
};

template <int THREADS, class Tile_> constexpr int PAIRS = (Tile_::ROWS * Tile_::COLUMNS / 2 + THREADS - 1) / THREADS;

template <int THREADS, class Tile_> DEVICE Corner corner_of_pair(unsigned i) {
    const unsigned pair = thread_index() + i * THREADS;
    return {pair / 4 % Tile_::ROWS, pair / 4 / Tile_::ROWS * 8 + pair % 4 * 2};
}

template <int THREADS, class Tile_>
DEVICE Pair load_pair(unsigned i, Tile_, const Matrix<const float>& matrix, Corner from) {
    const Corner pair = corner_of_pair<THREADS, Tile_>(i);
    const unsigned r = from.row + pair.row, c = from.column + pair.column;
    return {matrix.has(r, c) ? ld_global(matrix.at(r, c)) : 0,
            matrix.has(r, c + 1) ? ld_global(matrix.at(r, c + 1)) : 0};
}

template <class Element, int THREADS, class Tile_> DEVICE void store_pair(unsigned i, Tile_ tile, Pair values) {
    const Corner pair = corner_of_pair<THREADS, Tile_>(i);
    if (pair.column < Tile_::COLUMNS)
        st_shared(tile.at(pair.row, pair.column), pack(Element{}, values.low, values.high));
}

template <class Element, int THREADS, class Tile_>
DEVICE void copy_rounded(Tile_ tile, const Matrix<const float>& matrix, Corner from) {
#pragma unroll 8
    for (int i = 0; i < PAIRS<THREADS, Tile_>; ++i)
        store_pair<Element, THREADS>(i, tile, load_pair<THREADS>(i, tile, matrix, from));
}

// One warp: sum[16 M_TILES, 8 N_TILES] += x w^T, or x w if w is transposed. (row, column) is the corner of this part
// of the product.
template <class Element, bool TRANSPOSED, int M_TILES, int N_TILES, int ROWS, int K, class W>
DEVICE void multiply(float (&sum)[M_TILES][N_TILES][4], Tile<ROWS, K> x, W w, unsigned row, unsigned column) {
    const unsigned lane = thread_index() % 32;
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        uint32_t a[M_TILES][4];
#pragma unroll
        for (int i = 0; i < M_TILES; ++i) ldmatrix(a[i], x.at(row + i * 16 + lane % 16, k + lane / 16 * 8));
#pragma unroll
        for (int j = 0; j < N_TILES; j += 2) {
            uint32_t b[4];  // eight columns at k to k + 7 and k + 8 to k + 15, then the next eight columns
            if constexpr (TRANSPOSED)
                ldmatrix_trans(b, w.at(k + lane % 16, column + j * 8 + lane / 16 * 8));
            else
                ldmatrix(b, w.at(column + j * 8 + lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * 8));
#pragma unroll
            for (int i = 0; i < M_TILES; ++i) {
                mma(Element{}, sum[i][j], a[i], b[0], b[1]);
                mma(Element{}, sum[i][j + 1], a[i], b[2], b[3]);
            }
        }
    }
}

// The sums of a warp are laid out as mma leaves them: a lane has two neighbouring columns of row lane / 4, then the
// same columns eight rows below.

// sum <- b in all rows, starting at a column of b
template <class Element, int M_TILES, int N_TILES>
DEVICE void fill_with_bias(float (&sum)[M_TILES][N_TILES][4], const uint16_t* b, unsigned column, unsigned columns) {
#pragma unroll
    for (int j = 0; j < N_TILES; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const unsigned c = column + j * 8 + thread_index() % 4 * 2 + i % 2;
            const float value = b && c < columns ? unpack(Element{}, ld_global(b + c)) : 0;
#pragma unroll
            for (int k = 0; k < M_TILES; ++k) sum[k][j][i] = value;
        }
}

template <int N_TILES> DEVICE void scale(float (&sum)[1][N_TILES][4], float factor) {
#pragma unroll
    for (int i = 0; i < N_TILES * 4; ++i) sum[0][i / 4][i % 4] *= factor;
}

// tile <- sum, rounded
template <class Element, int M_TILES, int N_TILES, class Tile_>
DEVICE void round_into(Tile_ tile, const float (&sum)[M_TILES][N_TILES][4], unsigned row, unsigned column) {
    const unsigned lane = thread_index() % 32;
#pragma unroll
    for (int i = 0; i < M_TILES; ++i)
#pragma unroll
        for (int j = 0; j < N_TILES; ++j) {
            const unsigned r = row + i * 16 + lane / 4, c = column + j * 8 + lane % 4 * 2;
            st_shared(tile.at(r, c), pack(Element{}, sum[i][j][0], sum[i][j][1]));
            st_shared(tile.at(r + 8, c), pack(Element{}, sum[i][j][2], sum[i][j][3]));
        }
}

// matrix <- tile, starting at a corner of the matrix. store() moves single elements, for t, whose rows may have any
// length; store_chunks() moves eight at a time, for y.
template <int THREADS, int ROWS, int COLUMNS>
DEVICE void store(const Matrix<uint16_t>& matrix, Corner to, Tile<ROWS, COLUMNS> tile) {
    for (unsigned i = thread_index(); i < ROWS * COLUMNS; i += THREADS) {
        const unsigned r = i / COLUMNS, c = i % COLUMNS;
        if (matrix.has(to.row + r, to.column + c))
            st_global(matrix.at(to.row + r, to.column + c), ld_shared(tile.at(r, c)));
    }
}

template <int THREADS, int ROWS, int COLUMNS>
DEVICE void store_chunks(const Matrix<uint16_t>& matrix, Corner to, Tile<ROWS, COLUMNS> tile) {
    for (unsigned i = thread_index(); i < ROWS * tile.CHUNKS; i += THREADS) {
        const unsigned r = i / tile.CHUNKS, c = i % tile.CHUNKS * 8;
        if (matrix.has(to.row + r, to.column + c))
            st_global(matrix.at(to.row + r, to.column + c), ld_shared_chunk(tile.at(r, c)));
    }
}

// The part of y that a block computes, and the layout of its shared memory: STAGES slabs of x, W and A, then B. At the
// end t and y reuse the memory of the slabs.
template <class P> struct BlockTiles {
    unsigned m, n;  // the block's corner in y
    uint16_t* shared;

    DEVICE explicit BlockTiles(const Matrix<uint16_t>& y) : shared(shared_memory()) {
        const unsigned blocks_n = (y.columns + P::BN - 1) / P::BN;
        m = block_index() / blocks_n * P::BM;
        n = block_index() % blocks_n * P::BN;
    }
    DEVICE typename P::X x_tile(unsigned slab) const { return {shared + slab % P::STAGES * P::STAGE}; }
    DEVICE typename P::W w_tile(unsigned slab) const { return {x_tile(slab).data + P::X::SIZE}; }
    DEVICE typename P::A a_tile(unsigned slab) const { return {w_tile(slab).data + P::W::SIZE}; }
    DEVICE typename P::B b_tile() const { return {shared + P::STAGES * P::STAGE}; }
    DEVICE typename P::T t_tile() const { return {shared}; }
    DEVICE typename P::Y y_tile() const { return {shared}; }

    // The corner of a slab of weights, which may be stored transposed.
    static DEVICE Corner weights(unsigned out, unsigned in) {
        return P::TRANSPOSED ? Corner{in, out} : Corner{out, in};
    }
};

template <class P> KERNEL(P::THREADS) lora_gemm(const GRID_CONSTANT Problem p) {
    using Element = typename P::Element;
    constexpr int BN = P::BN, BK = P::BK, R = P::R, THREADS = P::THREADS, STAGES = P::STAGES;
    constexpr bool TRANSPOSED = P::TRANSPOSED;

    const BlockTiles<P> block(p.y);
    const unsigned m = block.m, n = block.n;
    const unsigned warp = thread_index() / 32;
    const unsigned row = warp / 2 * 32, column = warp % 2 * (BN / 2);  // this warp's corner within the block
    const unsigned t_row = row + warp % 2 * 16;

    const unsigned slabs = (p.x.columns + BK - 1) / BK;
    const auto copy_slab = [&](unsigned slab) {
        if (slab < slabs) {
            copy_async<THREADS>(block.x_tile(slab), p.x, {m, slab * BK});
            copy_async<THREADS>(block.w_tile(slab), p.W, block.weights(n, slab * BK));
        }
        cp_async_commit();
    };

    // Load the first slabs, and B.
    for (unsigned slab = 0; slab < STAGES - 1; ++slab) copy_slab(slab);
    copy_rounded<Element, THREADS>(block.b_tile(), p.B, block.weights(n, 0));
#pragma unroll
    for (unsigned slab = 0; slab < STAGES - 1; ++slab)
        copy_rounded<Element, THREADS>(block.a_tile(slab), p.A, block.weights(0, slab * BK));

    float y_sum[2][BN / 16][4], t_sum[1][R / 8][4] = {};
    fill_with_bias<Element>(y_sum, p.b, n + column, p.y.columns);  // y = b

    for (unsigned slab = 0; slab < slabs; ++slab) {
        cp_async_wait<STAGES - 2>();  // this thread's copies for the slab have arrived
        sync_threads();               // so have all others, and no thread reads the previous slab, overwritten next
        const unsigned next = slab + STAGES - 1;
        copy_slab(next);
        constexpr int PAIRS_A = PAIRS<THREADS, typename P::A>;
        Pair a_next[PAIRS_A];
#pragma unroll
        for (int i = 0; i < PAIRS_A; ++i)
            a_next[i] = load_pair<THREADS>(i, block.a_tile(next), p.A, block.weights(0, next * BK));
        multiply<Element, TRANSPOSED>(y_sum, block.x_tile(slab), block.w_tile(slab), row, column);  // y += x W^T
        multiply<Element, TRANSPOSED>(t_sum, block.x_tile(slab), block.a_tile(slab), t_row, 0);     // t += x A^T
#pragma unroll
        for (int i = 0; i < PAIRS_A; ++i) store_pair<Element, THREADS>(i, block.a_tile(next), a_next[i]);
    }
    sync_threads();  // all threads are done with the slabs

    scale(t_sum, p.scale);
    round_into<Element>(block.t_tile(), t_sum, t_row, 0);
    sync_threads();
    multiply<Element, TRANSPOSED>(y_sum, block.t_tile(), block.b_tile(), row, column);  // y += t B^T
    if (n == 0) store<THREADS>(p.t, {m, 0}, block.t_tile());
    sync_threads();

    round_into<Element>(block.y_tile(), y_sum, row, column);
    sync_threads();
    store_chunks<THREADS>(p.y, {m, n}, block.y_tile());
}
