// Runs a block of CUDA threads on a CPU: one fiber per thread, warps in random order, and shared memory that detects
// mistakes. A block stops with an error at the first of these:
//
//   - a read of shared memory that was never written (it holds NaN), whose asynchronous copy has not arrived, or that
//     another thread wrote since the last barrier;
//   - a write over shared memory that another thread may still read;
//   - an address outside the arrays, or not aligned;
//   - lanes of a warp, or threads of a block, that wait for different things.
//
// Bank conflicts are counted. This checks our reading of the PTX manual, not the hardware.
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

struct Copy {  // an asynchronous copy of 16 bytes that has not arrived yet
    uint16_t* to;
    const uint16_t* from;  // nullptr: zeros
};

// Barriers divide a run into numbered intervals.

struct Phase {  // the current phase of an mbarrier
    int parity = 0, arrivals = 1, bytes = 0;   // arrivals and bytes that are still missing
    int init_thread = -1, init_interval = -1;  // who initialised the mbarrier, and when
};

struct Thread {
    int index = 0;
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 16);
    enum { RUNS, WAITS_FOR_WARP, WAITS_FOR_COPY, WAITS_FOR_BLOCK, DONE } state = RUNS;
    const char* waits_for = nullptr;                 // the instruction it waits to execute with its warp
    void* operands = nullptr;                        // operands of that instruction
    std::vector<std::vector<Copy>> groups{1};        // groups of pending copies; the last is not committed yet
    std::vector<std::pair<int, unsigned>> accesses;  // shared memory accesses in this interval: (bytes, address)
    std::vector<const void*> unfenced;               // addresses it stored to, which wgmma cannot see yet
    std::vector<std::function<void()>> products, committed;  // wgmma of the warpgroup that it leads
    bool registers_fenced = false;                   // by wgmma.fence
};

struct Block {
    std::vector<Thread> threads;
    std::vector<uint16_t> shared;
    struct Trace {  // of an element of shared memory: the last writer and reader, and their intervals
        int writer = -1, write_interval = -1, reader = -1, read_interval = -1;
        int pending_copies = 0;
        bool fenced = true;  // visible to wgmma
    };
    static constexpr int SEVERAL = -2;  // as a reader: more than one thread
    static constexpr int ENGINE = -3;   // as a writer: TMA, which signals by an mbarrier instead of a barrier
    std::vector<Trace> traces;
    std::vector<Range> readable, writable;             // global memory
    std::vector<std::function<void()>> pending_boxes;  // TMA copies that have not arrived yet
    std::map<const void*, Phase> phases;               // by mbarrier
    Delivery delivery;
    std::mt19937 random;
    ucontext_t scheduler;
    Thread* current = nullptr;
    int index = 0, interval = 0;
    long conflicts = 0;
    std::string error;

    [[noreturn]] void fail(const std::string& message) {
        error = message + " (thread " + std::to_string(current->index) + " of block " + std::to_string(index) + ")";
        swapcontext(&current->context, &scheduler);  // never returns
        abort();
    }

    void wait(decltype(Thread::state) state) {
        current->state = state;
        swapcontext(&current->context, &scheduler);
    }

    // Executes an instruction of a warp or warpgroup. The last lane to arrive does the work for all.
    void together(const char* instruction, void* operands, const std::function<void(Thread* lanes)>& work,
                  int size = 32) {
        current->waits_for = instruction, current->operands = operands;
        Thread* const lanes = &threads[current->index / size * size];
        const auto others_wait = [&](Thread& t) { return &t == current || t.state == Thread::WAITS_FOR_WARP; };
        if (!std::all_of(lanes, lanes + size, others_wait)) return wait(Thread::WAITS_FOR_WARP);
        for (int i = 0; i < size; ++i)
            if (strcmp(lanes[i].waits_for, instruction)) fail(std::string("a warp diverged at ") + instruction);
        work(lanes);
        for (int i = 0; i < size; ++i) lanes[i].state = Thread::RUNS;
    }

    Trace* trace(const void* address, int bytes) {
        const auto* element = static_cast<const uint16_t*>(address);
        if (element < shared.data() || element + bytes / 2 > shared.data() + shared.size())
            fail("an address outside shared memory");
        if ((element - shared.data()) * 2 % bytes) fail("an unaligned address in shared memory");
        return &traces[element - shared.data()];
    }

    void reads(const Thread& thread, const void* address, int bytes) {
        Trace* const traces = trace(address, bytes);
        for (Trace* t = traces; t < traces + bytes / 2; ++t) {
            if (t->pending_copies) fail("shared memory read before its copy arrived");
            if (t->write_interval < 0) fail("shared memory read that was never written");
            if (t->write_interval == interval && t->writer != thread.index && t->writer != ENGINE)
                fail("shared memory read without a barrier after the write");
            t->reader = t->read_interval == interval && t->reader != thread.index ? SEVERAL : thread.index;
            t->read_interval = interval;
        }
    }

    void overwrites(const Thread& thread, const void* address, int bytes) {
        Trace* const traces = trace(address, bytes);
        for (Trace* t = traces; t < traces + bytes / 2; ++t) {
            if (t->pending_copies) fail("shared memory written before a copy to it arrived");
            if (t->write_interval == interval && t->writer != thread.index)
                fail("shared memory written by two threads");
            if (t->read_interval == interval && t->reader != thread.index)
                fail("shared memory overwritten without a barrier after the read");
        }
    }

    void writes(int thread, void* address, const void* value, int bytes) {
        memcpy(address, value, bytes);
        for (Trace* t = trace(address, bytes), *end = t + bytes / 2; t < end; ++t)
            t->writer = thread, t->write_interval = interval, t->fenced = thread == ENGINE;
        if (thread != ENGINE) threads[thread].unfenced.push_back(address);
    }

    void global(const std::vector<Range>& ranges, const void* address, int bytes) {
        const char* const begin = static_cast<const char*>(address);
        if (reinterpret_cast<uintptr_t>(begin) % bytes) fail("an unaligned address in global memory");
        for (const Range& range : ranges)
            if (range.begin <= begin && begin + bytes <= range.end) return;
        fail("an address outside the arrays in global memory");
    }

    void deliver(Thread& thread, std::vector<Copy>& group) {
        static const uint16_t zeros[8] = {};
        for (const Copy& copy : group) {
            for (Trace* t = trace(copy.to, 16), *end = t + 8; t < end; ++t) --t->pending_copies;
            writes(thread.index, copy.to, copy.from ? copy.from : zeros, 16);
        }
        group.clear();
    }

    // There are 32 banks of 4 bytes. Lanes are served in groups that move 128 bytes; a bank serves one word per group.
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
            for (const auto& [bank, distinct] : words) most = std::max(most, distinct.size());
            conflicts += most - 1;
        }
    }

    unsigned shared_offset(const void* address) const {
        return static_cast<const char*>(address) - reinterpret_cast<const char*>(shared.data());
    }

    // Counts conflicts of plain loads and stores, taking the i-th accesses of a warp's lanes since the last barrier as
    // one instruction. That is right unless lanes branch differently.
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
        pending_boxes.clear(), phases.clear();
        random.seed(seed);
        shared.assign(shared_bytes / 2, 0xffff);  // NaN as float16, bfloat16 and float32
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
            std::vector<int> ready;
            for (int w = 0; w < warps; ++w)
                if (std::any_of(&threads[w * 32], &threads[w * 32] + 32, runs)) ready.push_back(w);
            if (!pending_boxes.empty() && (ready.empty() || (delivery == AT_RANDOM && random() % 4 == 0))) {
                std::swap(pending_boxes[random() % pending_boxes.size()], pending_boxes.back());  // in any order
                const auto deliver = pending_boxes.back();
                pending_boxes.pop_back();
                deliver();
                continue;
            }
            if (ready.empty()) break;
            // Usually stay with the same warp: missing barriers show when one warp runs ahead of the others.
            const bool stuck = std::find(ready.begin(), ready.end(), warp) == ready.end();
            if (stuck || random() % 8 == 0) warp = ready[random() % ready.size()];
            for (int i = warp * 32; i < warp * 32 + 32 && error.empty(); ++i)
                if (runs(threads[i])) {
                    current = &threads[i];
                    swapcontext(&scheduler, &current->context);
                }
            if (error.empty()) barrier();
        }
        for (const Thread& thread : threads)
            if (error.empty() && thread.state != Thread::DONE) error = "deadlock";
    }
};

inline Block* Block::running = nullptr;
