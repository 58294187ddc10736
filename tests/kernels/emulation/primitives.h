// minidistill/kernels/csrc/primitives.h in plain C++. The layouts of fragments are written out as in the PTX manual.
#pragma once
#include <cmath>

#include "warp.h"

#define DEVICE inline
#define KERNEL(threads) void
#define GRID_CONSTANT

struct Float16 {};
struct BFloat16 {};

struct alignas(16) Chunk {
    uint32_t words[4];
};

static Block block;

inline unsigned thread_index() { return block.current->index; }
inline unsigned block_index() { return block.index; }
inline uint16_t* shared_memory() { return block.shared.data(); }
inline void sync_threads() { block.wait(Thread::WAITS_FOR_BLOCK); }

// Plain loads and stores

template <class T> T ld_global(const T* from) { return block.global(block.readable, from, sizeof(T)), *from; }

inline void st_global(uint16_t* to, uint16_t value) { block.global(block.writable, to, 2), *to = value; }
inline void st_global(uint16_t* to, Chunk value) { block.global(block.writable, to, 16), memcpy(to, &value, 16); }

template <class T> T ld_shared_as(const uint16_t* from) {
    T value;
    block.reads(*block.current, from, sizeof(T));
    block.access(from, sizeof(T));
    memcpy(&value, from, sizeof(T));
    return value;
}
inline uint16_t ld_shared(const uint16_t* from) { return ld_shared_as<uint16_t>(from); }
inline Chunk ld_shared_chunk(const uint16_t* from) { return ld_shared_as<Chunk>(from); }

inline void st_shared(uint16_t* to, uint32_t pair) {
    block.overwrites(*block.current, to, 4);
    block.access(to, 4);
    block.writes(block.current->index, to, &pair, 4);
}

// Asynchronous copies

inline void cp_async(uint16_t* to, const uint16_t* from, bool read) {
    if (read) block.global(block.readable, from, 16);
    block.overwrites(*block.current, to, 16);
    block.access(to, 16);
    for (auto *t = block.trace(to, 16), *end = t + 8; t < end; ++t) ++t->pending_copies;
    auto& group = block.current->groups.back();
    group.push_back({to, read ? from : nullptr});
    if (block.delivery == AT_ONCE || (block.delivery == AT_RANDOM && block.random() % 2)) {
        std::vector<Copy> now{group.back()};
        group.pop_back();
        block.deliver(*block.current, now);
    }
}

inline void cp_async_commit() { block.current->groups.emplace_back(); }

template <int PENDING> void cp_async_wait() {
    auto& groups = block.current->groups;
    while (groups.size() > PENDING + 1) {
        block.deliver(*block.current, groups.front());
        groups.erase(groups.begin());
    }
}

// Fragments

struct Rows {
    uint32_t* to;
    const uint16_t* row;
};

inline void load_matrices(const char* instruction, uint32_t (&to)[4], const uint16_t* row, bool transposed) {
    Rows mine{to, row};
    block.together(instruction, &mine, [&](Thread* lanes) {
        const auto of = [&](int lane) -> Rows& { return *static_cast<Rows*>(lanes[lane].operands); };
        std::vector<unsigned> addresses;
        for (int lane = 0; lane < 32; ++lane) {
            block.reads(lanes[lane], of(lane).row, 16);
            addresses.push_back(block.shared_offset(of(lane).row));
        }
        block.count_conflicts(addresses, 16);
        for (int matrix = 0; matrix < 4; ++matrix)
            for (int lane = 0; lane < 32; ++lane) {
                uint16_t pair[2];
                for (int i = 0; i < 2; ++i) {
                    const int line = lane / 4, place = lane % 4 * 2 + i;
                    pair[i] = transposed ? of(matrix * 8 + place).row[line] : of(matrix * 8 + line).row[place];
                }
                of(lane).to[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
            }
    });
}
inline void ldmatrix(uint32_t (&to)[4], const uint16_t* row) { load_matrices("ldmatrix", to, row, false); }
inline void ldmatrix_trans(uint32_t (&to)[4], const uint16_t* row) { load_matrices("ldmatrix.trans", to, row, true); }

inline float widen(Float16, uint16_t bits) {
    _Float16 value;
    memcpy(&value, &bits, 2);
    return value;
}
inline float widen(BFloat16, uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

inline uint16_t narrow(Float16, float value) {
    const _Float16 half = value;
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
}
inline uint16_t narrow(BFloat16, float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return std::isnan(value) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

template <class Element> float unpack(Element type, uint16_t bits) { return widen(type, bits); }
template <class Element> uint32_t pack(Element type, float low, float high) {
    return narrow(type, low) | static_cast<uint32_t>(narrow(type, high)) << 16;
}

struct Fragments {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
};

template <class Element> void mma(Element type, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Fragments mine{c, a, {b0, b1}};
    block.together("mma", &mine, [&](Thread* lanes) {
        float A[16][16], B[16][8];
        const auto half = [&](uint32_t pair, int i) { return widen(type, static_cast<uint16_t>(pair >> 16 * i)); };
        const auto of = [&](int lane) { return static_cast<Fragments*>(lanes[lane].operands); };
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 2; ++i) {
                const int g = lane / 4, j = lane % 4 * 2 + i;
                A[g][j] = half(of(lane)->a[0], i);
                A[g + 8][j] = half(of(lane)->a[1], i);
                A[g][j + 8] = half(of(lane)->a[2], i);
                A[g + 8][j + 8] = half(of(lane)->a[3], i);
                B[j][g] = half(of(lane)->b[0], i);
                B[j + 8][g] = half(of(lane)->b[1], i);
            }
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
                for (int k = 0; k < 16; ++k) of(lane)->c[i] += A[row][k] * B[k][column];
            }
    });
}
