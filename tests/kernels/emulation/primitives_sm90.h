// minidistill/kernels/csrc/primitives_sm90.h in plain C++. The layouts of wgmma are written out as in the PTX manual.
#pragma once
#include "primitives.h"

struct TensorMap {  // of a row-major matrix, in boxes; the swizzle is as wide as a box
    const uint16_t* data;
    unsigned rows, columns, stride, box_rows, box_columns;
};
using Barrier = uint64_t;

// The swizzle over 8, 4 or 2 chunks: the 3, 2 or 1 bits of an address from bit 4 are XORed with those from bit 7.
inline unsigned swizzled(unsigned address, unsigned chunks) { return address ^ (address >> 7 & (chunks - 1)) << 4; }

// mbarrier

inline void advance(Phase& phase) {
    if (phase.arrivals || phase.bytes) return;
    phase.parity ^= 1, phase.arrivals = 1;
    for (Thread& thread : block.threads)
        if (thread.state == Thread::WAITS_FOR_COPY) thread.state = Thread::RUNS;
}

inline void mbarrier_init(Barrier* barrier) {
    Phase& phase = block.phases[barrier] = {};
    phase.init_thread = block.current->index, phase.init_interval = block.interval;
}

inline Phase& phase_of(Barrier* barrier) {
    Phase& phase = block.phases[barrier];
    const bool visible = phase.init_interval < block.interval || phase.init_thread == static_cast<int>(thread_index());
    if (phase.init_interval < 0 || !visible)
        block.fail("an mbarrier that is not initialised, or not yet visible to this thread");
    return phase;
}

inline void mbarrier_arrive_expect(Barrier* barrier, unsigned bytes) {
    Phase& phase = phase_of(barrier);
    phase.bytes += bytes, phase.arrivals -= 1;
    advance(phase);
}

inline void mbarrier_wait(Barrier* barrier, unsigned parity) {
    const Phase& phase = phase_of(barrier);
    while (phase.parity == static_cast<int>(parity)) block.wait(Thread::WAITS_FOR_COPY);
}

// The copy engine

inline void tma_load(uint16_t* to, const TensorMap& map, unsigned row, unsigned column, Barrier* barrier) {
    const unsigned first = block.shared_offset(to);
    if (first % 1024) block.fail("a box that is not aligned to the swizzle");
    const unsigned chunks = map.box_columns / 8;
    const auto place = [=](unsigned r, unsigned chunk) {
        return block.shared.data() + swizzled(first + (r * chunks + chunk) * 16, chunks) / 2;
    };
    for (unsigned r = 0; r < map.box_rows; ++r)
        for (unsigned chunk = 0; chunk < chunks; ++chunk) {
            block.overwrites(*block.current, place(r, chunk), 16);
            for (auto *t = block.trace(place(r, chunk), 16), *end = t + 8; t < end; ++t) ++t->pending_copies;
        }
    block.pending_boxes.push_back([=] {
        for (unsigned r = 0; r < map.box_rows; ++r)
            for (unsigned chunk = 0; chunk < chunks; ++chunk) {
                uint16_t values[8] = {};
                for (unsigned i = 0; i < 8; ++i)
                    if (const unsigned c = column + chunk * 8 + i; row + r < map.rows && c < map.columns)
                        values[i] = map.data[static_cast<size_t>(row + r) * map.stride + c];
                for (auto *t = block.trace(place(r, chunk), 16), *end = t + 8; t < end; ++t) --t->pending_copies;
                block.writes(Block::ENGINE, place(r, chunk), values, 16);
            }
        Phase& phase = block.phases[barrier];
        phase.bytes -= map.box_rows * map.box_columns * 2;
        advance(phase);
    });
    if (block.delivery == AT_ONCE) {
        const auto deliver = block.pending_boxes.back();
        block.pending_boxes.pop_back();
        deliver();
    }
}

inline void fence_proxy_async() {
    for (const void* pair : block.current->unfenced)
        for (auto *t = block.trace(pair, 4), *end = t + 2; t < end; ++t) t->fenced = true;
    block.current->unfenced.clear();
}

// wgmma

template <int WIDTH> uint64_t descriptor(const uint16_t* first, unsigned panel_bytes) {
    const uint64_t address = block.shared_offset(first) & 0x3ffff, swizzle = WIDTH == 64 ? 1 : WIDTH == 32 ? 2 : 3;
    return address >> 4 | uint64_t{panel_bytes >> 4} << 16 | uint64_t{8 * WIDTH * 2 >> 4} << 32 | swizzle << 62;
}

// Chunks in a row of a panel; 16 means no swizzle.
inline unsigned chunks_of(uint64_t descriptor) { return 16 >> (descriptor >> 62); }

// Element (row, k) of a matrix, found as wgmma finds it.
inline uint16_t element_at(uint64_t descriptor, unsigned row, unsigned k, bool transposed, Thread& reader) {
    const unsigned first = (descriptor & 0x3fff) << 4, panel = (descriptor >> 16 & 0x3fff) << 4;
    const unsigned eight_rows = (descriptor >> 32 & 0x3fff) << 4, chunks = chunks_of(descriptor), width = chunks * 8;
    if (chunks > 8 || (descriptor >> 49 & 7)) block.fail("a descriptor without swizzle, or that starts within one");
    const unsigned address =
        transposed ? first + row / width * panel + (row % width + k % 8 * width) * 2 + k / 8 * eight_rows
                   : first + row / 8 * eight_rows + (row % 8 * width + k) * 2;
    const uint16_t* const element = block.shared.data() + swizzled(address, chunks) / 2;
    block.reads(reader, element, 2);
    auto* const trace = block.trace(element, 2);
    if (!trace->fenced) block.fail("wgmma reads a store without fence.proxy.async");
    trace->reader = Block::SEVERAL;
    return *element;
}

struct Factors {
    void* c;
    const uint32_t* a_registers;  // or nullptr
    uint64_t a, b;
};

template <bool TRANSPOSED, int N, class Element> void wgmma(Element type, Factors mine) {
    block.together("wgmma", &mine, [&](Thread* lanes) {
        std::vector<Factors> all;
        for (int i = 0; i < 128; ++i) {
            all.push_back(*static_cast<Factors*>(lanes[i].operands));
            if (!lanes[i].registers_fenced) block.fail("wgmma without wgmma.fence");
            if (all[i].a != all[0].a || all[i].b != all[0].b) block.fail("a warpgroup with different descriptors");
        }
        // The manual's layouts consist of whole panels.
        if (TRANSPOSED && N % (chunks_of(mine.b) * 8)) block.fail("a matrix that ends within a panel");
        const auto product = [=] {
            std::vector<float> A(64 * 16), B(N * 16);
            for (int row = 0; row < 64; ++row)
                for (int k = 0; k < 16; ++k) {
                    const uint32_t* const pairs = all[row / 16 * 32 + row % 8 * 4 + k % 8 / 2].a_registers;
                    const uint16_t bits = pairs ? pairs[k / 8 * 2 + row % 16 / 8] >> 16 * (k % 2)
                                                : element_at(all[0].a, row, k, false, lanes[0]);
                    A[row * 16 + k] = widen(type, bits);
                }
            for (int column = 0; column < N; ++column)
                for (int k = 0; k < 16; ++k)
                    B[column * 16 + k] = widen(type, element_at(all[0].b, column, k, TRANSPOSED, lanes[0]));
            for (int lane = 0; lane < 128; ++lane)
                for (int j = 0; j < N / 8; ++j)
                    for (int i = 0; i < 4; ++i) {
                        const int row = lane / 32 * 16 + lane % 32 / 4 + i / 2 * 8;
                        const int column = j * 8 + lane % 4 * 2 + i % 2;
                        float& sum = static_cast<float(*)[4]>(all[lane].c)[j][i];
                        for (int k = 0; k < 16; ++k) sum += A[row * 16 + k] * B[column * 16 + k];
                    }
        };
        if (block.delivery == AT_ONCE) return product();
        lanes[0].products.push_back(product);
    }, 128);
}
template <bool TRANSPOSED, class Element, int EIGHTS>
void wgmma(Element type, float (&c)[EIGHTS][4], uint64_t a, uint64_t b) {
    wgmma<TRANSPOSED, EIGHTS * 8>(type, {c, nullptr, a, b});
}
template <bool TRANSPOSED, class Element, int EIGHTS>
void wgmma(Element type, float (&c)[EIGHTS][4], const uint32_t (&a)[4], uint64_t b) {
    wgmma<TRANSPOSED, EIGHTS * 8>(type, {c, a, 0, b});
}

template <class... Registers> void wgmma_fence(Registers&...) { block.current->registers_fenced = true; }

inline void wgmma_commit() {
    block.together("wgmma.commit_group", nullptr, [](Thread* lanes) {
        std::move(lanes->products.begin(), lanes->products.end(), std::back_inserter(lanes->committed));
        lanes->products.clear();
    }, 128);
}

template <class... Registers> void wgmma_wait(Registers&...) {
    block.together("wgmma.wait_group", nullptr, [](Thread* lanes) {
        for (const auto& product : lanes->committed) product();
        lanes->committed.clear();
        for (int i = 0; i < 128; ++i) lanes[i].registers_fenced = false;
    }, 128);
}
