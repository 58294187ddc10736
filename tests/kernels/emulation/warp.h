// A block of CUDA threads on a CPU: one fiber a thread, warps in random order, and shared memory that notices mistakes.
//
// The block ends with the first of these: a number read before it was written (what is there is NaN), while its copy is
// under way, or in the same interval between barriers in which another thread wrote it, or overwritten while others may
// still read it; an address outside the arrays or not aligned; lanes of a warp, or threads of a block, that wait for
// different things. Bank conflicts are counted. What this proves is a reading of the PTX manual, not the hardware.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

enum Delivery { AT_ONCE, LATE, AT_RANDOM };  // when asynchronous copies arrive

struct Range {
    const char *begin, *end;
};

struct Copy {  // of 16 bytes, under way
    uint16_t* to;
    const uint16_t* from;  // nullptr: zeros
};

struct Phase {  // of an mbarrier
    int parity = 0, arrivals = 1, bytes = 0;  // that are still to come
    int beginner = -1, begun = -1;            // who initialised it, and between which barriers
};

struct Thread {
    int index = 0;
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 16);
    enum { RUNS, WAITS_FOR_WARP, WAITS_FOR_COPY, WAITS_FOR_BLOCK, DONE } state = RUNS;
    const char* waits_for = nullptr;                 // the instruction
    void* operands = nullptr;                        // of it
    std::vector<std::vector<Copy>> groups{1};        // of copies under way; the last is not committed yet
    std::vector<std::pair<int, unsigned>> accesses;  // to shared memory since the last barrier: (bytes, address)
    std::vector<const void*> unfenced;               // what it has stored, and wgmma cannot see yet
    std::vector<std::function<void()>> products, committed;  // of the warpgroup that it leads
    bool registers_fenced = false;                   // for wgmma
};

struct Block {
    std::vector<Thread> threads;
    std::vector<uint16_t> shared;
    struct Trace {  // of a number in shared memory: who last wrote and read it, and between which barriers
        int writer = -1, written = -1, reader = -1, read = -1, copies = 0;
        bool fenced = true;
    };
    static constexpr int SEVERAL = -2, ENGINE = -3;  // readers; the writer of bulk copies, whose barriers are others
    std::vector<Trace> traces;
    std::vector<Range> readable, writable;  // global memory
    std::vector<std::function<void()>> under_way;  // bulk copies
    std::map<const void*, Phase> phases;           // of mbarriers
    Delivery delivery;
    std::mt19937 random;
    ucontext_t scheduler;
    Thread* current = nullptr;
    int index = 0, interval = 0;
    long conflicts = 0;
    std::string error;

    [[noreturn]] void fail(const std::string& what) {
        error = what + " (thread " + std::to_string(current->index) + " of block " + std::to_string(index) + ")";
        swapcontext(&current->context, &scheduler);  // for good
        abort();
    }

    void wait(decltype(Thread::state) state) {
        current->state = state;
        swapcontext(&current->context, &scheduler);
    }

    // An instruction of a warp, or a warpgroup: the last of its lanes to arrive does it for all.
    void together(const char* instruction, void* operands, const std::function<void(Thread* lanes)>& work,
                  int size = 32) {
        current->waits_for = instruction, current->operands = operands;
        Thread* const lanes = &threads[current->index / size * size];
        const auto others_wait = [&](Thread& t) { return &t == current || t.state == Thread::WAITS_FOR_WARP; };
        if (!std::all_of(lanes, lanes + size, others_wait)) return wait(Thread::WAITS_FOR_WARP);
        for (int i = 0; i < size; ++i)
            if (strcmp(lanes[i].waits_for, instruction)) fail(std::string("a warp divided at ") + instruction);
        work(lanes);
        for (int i = 0; i < size; ++i) lanes[i].state = Thread::RUNS;
    }

    Trace* trace(const void* address, int bytes) {
        const auto* number = static_cast<const uint16_t*>(address);
        if (number < shared.data() || number + bytes / 2 > shared.data() + shared.size()) fail("outside shared memory");
        if ((number - shared.data()) * 2 % bytes) fail("shared memory: not aligned");
        return &traces[number - shared.data()];
    }

    void reads(const Thread& thread, const void* address, int bytes) {
        Trace* const traces = trace(address, bytes);
        for (Trace* t = traces; t < traces + bytes / 2; ++t) {
            if (t->copies) fail("shared memory read while a copy is under way");
            if (t->written < 0) fail("shared memory read that nobody wrote");
            if (t->written == interval && t->writer != thread.index && t->writer != ENGINE)
                fail("shared memory read without a barrier");
            t->reader = t->read == interval && t->reader != thread.index ? SEVERAL : thread.index;
            t->read = interval;
        }
    }

    void overwrites(const Thread& thread, const void* address, int bytes) {
        Trace* const traces = trace(address, bytes);
        for (Trace* t = traces; t < traces + bytes / 2; ++t) {
            if (t->copies) fail("shared memory written while a copy is under way");
            if (t->written == interval && t->writer != thread.index) fail("shared memory written by two threads");
            if (t->read == interval && t->reader != thread.index) fail("shared memory overwritten without a barrier");
        }
    }

    void writes(int thread, void* address, const void* value, int bytes) {
        memcpy(address, value, bytes);
        for (Trace* t = trace(address, bytes), *end = t + bytes / 2; t < end; ++t)
            t->writer = thread, t->written = interval, t->fenced = thread == ENGINE;
        if (thread != ENGINE) threads[thread].unfenced.push_back(address);
    }

    void global(const std::vector<Range>& ranges, const void* address, int bytes) {
        const char* const begin = static_cast<const char*>(address);
        if (reinterpret_cast<uintptr_t>(begin) % bytes) fail("global memory: not aligned");
        for (const Range& range : ranges)
            if (range.begin <= begin && begin + bytes <= range.end) return;
        fail("outside the arrays in global memory");
    }

    void deliver(Thread& thread, std::vector<Copy>& group) {
        static const uint16_t zeros[8] = {};
        for (const Copy& copy : group) {
            for (Trace* t = trace(copy.to, 16), *end = t + 8; t < end; ++t) --t->copies;
            writes(thread.index, copy.to, copy.from ? copy.from : zeros, 16);
        }
        group.clear();
    }

    // 32 banks of 4 bytes. Lanes meet in phases of 128 bytes; in a phase each bank gives one word.
    void count_conflicts(const std::vector<unsigned>& addresses, int bytes) {
        const size_t lanes = std::min(32, 128 / bytes);
        for (size_t first = 0; first < addresses.size(); first += lanes) {
            std::map<unsigned, std::vector<unsigned>> words;  // by bank
            for (size_t i = first; i < std::min(first + lanes, addresses.size()); ++i)
                for (unsigned word = addresses[i] / 4; word <= (addresses[i] + bytes - 1) / 4; ++word) {
                    auto& bank = words[word % 32];
                    if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
                }
            size_t most = 1;
            for (const auto& [bank, different] : words) most = std::max(most, different.size());
            conflicts += most - 1;
        }
    }

    unsigned shared_offset(const void* address) const {
        return static_cast<const char*>(address) - reinterpret_cast<const char*>(shared.data());
    }

    // The i-th accesses of a warp's lanes between two barriers are one instruction's, unless lanes took different ways.
    void count_accesses() {
        for (size_t warp = 0; warp < threads.size(); warp += 32)
            for (size_t i = 0, some = 1; some; ++i) {
                std::map<int, std::vector<unsigned>> addresses;  // by size
                for (size_t lane = warp; lane < warp + 32; ++lane)
                    if (i < threads[lane].accesses.size())
                        addresses[threads[lane].accesses[i].first].push_back(threads[lane].accesses[i].second);
                some = !addresses.empty();
                for (const auto& [bytes, where] : addresses) count_conflicts(where, bytes);
            }
        for (Thread& thread : threads) thread.accesses.clear();
    }

    void access(const void* address, int bytes) { current->accesses.push_back({bytes, shared_offset(address)}); }

    void barrier() {
        const auto waits = [&](const Thread& t) { return t.state == Thread::WAITS_FOR_BLOCK; };
        if (!std::all_of(threads.begin(), threads.end(), waits)) return;
        count_accesses();
        ++interval;
        for (Thread& thread : threads) thread.state = Thread::RUNS;
    }

    std::function<void()> body;
    static Block* running;

    static void enter() {
        Block& block = *running;
        block.body();
        block.current->state = Thread::DONE;
        swapcontext(&block.current->context, &block.scheduler);
    }

    void run(int block, int count, int shared_bytes, unsigned seed, const std::function<void()>& kernel) {
        index = block, interval = 0, body = kernel, running = this;
        under_way.clear(), phases.clear();
        random.seed(seed);
        shared.assign(shared_bytes / 2, 0xffff);  // NaN, in either type and in float32
        traces.assign(shared.size(), {});
        threads.resize(count);
        for (int i = 0; i < count; ++i) {
            Thread& thread = threads[i];
            thread.index = i, thread.state = Thread::RUNS, thread.groups.assign(1, {}), thread.accesses.clear();
            thread.unfenced.clear(), thread.products.clear(), thread.committed.clear(), thread.registers_fenced = false;
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = thread.stack.data();
            thread.context.uc_stack.ss_size = thread.stack.size();
            thread.context.uc_link = nullptr;
            makecontext(&thread.context, enter, 0);
        }
        const int warps = count / 32;
        int warp = 0;
        while (error.empty()) {
            const auto runs = [](const Thread& thread) { return thread.state == Thread::RUNS; };
            std::vector<int> able;
            for (int w = 0; w < warps; ++w)
                if (std::any_of(&threads[w * 32], &threads[w * 32] + 32, runs)) able.push_back(w);
            if (able.empty() ? !under_way.empty() : delivery == AT_RANDOM && !under_way.empty() && random() % 4 == 0) {
                std::swap(under_way[random() % under_way.size()], under_way.back());  // bulk copies overtake each other
                const auto deliver = under_way.back();
                under_way.pop_back();
                deliver();
                continue;
            }
            if (able.empty()) break;
            // Mostly go on with the same warp: one that runs ahead of the others is what barriers are for.
            const bool stuck = std::find(able.begin(), able.end(), warp) == able.end();
            if (stuck || random() % 8 == 0) warp = able[random() % able.size()];
            for (int i = warp * 32; i < warp * 32 + 32 && error.empty(); ++i)
                if (runs(threads[i])) {
                    current = &threads[i];
                    swapcontext(&scheduler, &current->context);
                }
            if (error.empty()) barrier();
        }
        for (const Thread& thread : threads)
            if (error.empty() && thread.state != Thread::DONE) error = "threads wait for what never comes";
    }
};

inline Block* Block::running = nullptr;
