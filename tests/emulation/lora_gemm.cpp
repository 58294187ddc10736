// The kernel's own source under emulation, as one C function.
#include "primitives.h"

#include "lora_gemm.h"

template <class P> static void launch(const Problem& problem, unsigned seed) {
    const unsigned blocks = P::blocks(problem.y.rows, problem.y.columns);
    for (unsigned i = 0; i < blocks && block.error.empty(); ++i)
        block.run(i, P::THREADS, P::SHARED_BYTES, seed + i, [&] { lora_gemm<P>(problem); });
}

#ifndef PLAN
#define PLAN Plan<BFloat16, 64, 64, 16, false>
#endif

// Returns what went wrong, or an empty string. sizes: of x, W, b, A, B, y, t in bytes.
extern "C" const char* run(const Operands* o, const int64_t* bytes, int delivery, unsigned seed, long* conflicts) {
    const void* arrays[] = {o->x, o->W, o->b, o->A, o->B, o->y, o->t};
    block.error.clear(), block.readable.clear(), block.writable.clear(), block.conflicts = 0;
    for (int i = 0; i < 7; ++i) {
        const char* const begin = static_cast<const char*>(arrays[i]);
        (i < 5 ? block.readable : block.writable).push_back({begin, begin + bytes[i]});
    }
    block.delivery = static_cast<Delivery>(delivery);
    launch<PLAN>(problem_of(*o), seed);
    *conflicts = block.conflicts;
    return block.error.c_str();
}
