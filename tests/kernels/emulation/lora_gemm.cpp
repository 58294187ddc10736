// Exports the kernel PLAN, run under emulation, as one C function. With SM90 defined, PLAN is one of Hopper's.
#ifdef SM90
#include "primitives_sm90.h"

#include "lora_gemm_sm90.h"
#else
#include "primitives.h"

#include "lora_gemm.h"
#endif

template <class P> static void launch(const Problem& problem, unsigned seed) {
#ifdef SM90
    const auto map = [](const Matrix<const uint16_t>& matrix, auto panels) {
        return TensorMap{matrix.data, matrix.rows, matrix.columns, matrix.stride, panels.ROWS, panels.WIDTH};
    };
    const TensorMap x_map = map(problem.x, typename P::X{}), w_map = map(problem.W, typename P::W{});
    const auto kernel = [&] { lora_gemm_sm90<P>(problem, x_map, w_map); };
#else
    const auto kernel = [&] { lora_gemm<P>(problem); };
#endif
    const unsigned blocks = P::blocks(problem.y.rows, problem.y.columns);
    for (unsigned i = 0; i < blocks && block.error.empty(); ++i)
        block.run(i, P::THREADS, P::SHARED_BYTES, seed + i, kernel);
}

// Returns an error message, or an empty string. bytes: the sizes of x, W, b, A, B, y and t.
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
